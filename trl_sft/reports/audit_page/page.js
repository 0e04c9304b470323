"use strict";
// Shows the findings of the gate that is chosen, a hundred at a time. Texts of rows reach the page by `textContent`
// only, so nothing in them is markup. A row is written into the page when it is opened.
(() => {
  const {findings, texts} = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const step = 100;
  let language = "en", gate = "", count = 0;

  function write(name) {
    return texts[name][language === "zh" ? 1 : 0];
  }

  function add(parent, kind, name, text) {
    const element = document.createElement(kind);
    element.className = name;
    element.textContent = text;
    parent.append(element);
    return element;
  }

  function fill(details, finding) {
    if (details.childElementCount > 1) return;
    finding.turns.forEach((turn) => {
      add(details, "div", "role", turn.role);
      add(details, "div", "text", turn.content).dir = "auto"; // Arabic and Hebrew run from right to left
    });
    if (!finding.turns.length) add(details, "div", "text", write("no_turns"));
  }

  function show() {
    const chosen = findings.filter((finding) => !gate || finding.gate === gate);
    const end = Math.min(count + step, chosen.length);
    chosen.slice(count, end).forEach((finding) => {
      const details = document.createElement("details");
      const summary = add(details, "summary", "", "");
      add(summary, "span", "gate", finding.gate);
      summary.append(finding.row + ": " + finding.reason);
      details.addEventListener("toggle", () => fill(details, finding));
      find("list").append(details);
    });
    count = end;
    find("shown").textContent = write("shown").replace("{shown}", count).replace("{all}", chosen.length);
    find("more").hidden = count >= chosen.length;
  }

  function choose(name) {
    gate = name;
    count = 0;
    find("list").replaceChildren();
    document.querySelectorAll("[data-gate]").forEach((button) => {
      button.setAttribute("aria-pressed", String(button.dataset.gate === gate));
    });
    show();
  }

  function translate(value) {
    language = value;
    document.documentElement.lang = language;
    document.querySelectorAll("[data-text]").forEach((element) => {
      element.textContent = write(element.dataset.text);
    });
    find("english").setAttribute("aria-pressed", String(language === "en"));
    find("chinese").setAttribute("aria-pressed", String(language === "zh"));
    choose(gate);
  }

  document.querySelectorAll("[data-gate]").forEach((button) => {
    button.addEventListener("click", () => choose(gate === button.dataset.gate ? "" : button.dataset.gate));
  });
  find("more").addEventListener("click", show);
  find("english").addEventListener("click", () => translate("en"));
  find("chinese").addEventListener("click", () => translate("zh"));
  choose("");
})();
