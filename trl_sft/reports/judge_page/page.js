"use strict";
// Shows one item at a time, saves each vote in this browser, and writes the file with the votes. Texts of models reach
// the page by `textContent` only, so nothing in them is markup.
(() => {
  const {page, format, items, texts} = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const keys = {1: "left", 2: "right", 0: "equal", 3: "both_bad"};
  const store = "trl_sft judge " + page;
  let language = "en", rater = "", votes = {}, drafts = {}, position = 0, shownAt = 0, started = "", downloaded = true;

  function read(name) {
    try {
      return localStorage.getItem(name);
    } catch {
      return null;
    }
  }

  function write(name, text) {
    try {
      localStorage.setItem(name, text);
      find("unsaved").hidden = true;
      return true;
    } catch {
      find("unsaved").hidden = false;
      return false;
    }
  }

  function save() {
    const isSaved = write(store + " " + rater, JSON.stringify({votes, drafts, position, started}));
    downloaded = isSaved;
  }

  function load() {
    let state = {};
    try {
      state = JSON.parse(read(store + " " + rater)) || {};
    } catch {
      state = {};
    }
    votes = state.votes || {};
    drafts = state.drafts || {};
    position = Math.min(state.position || 0, items.length);
    started = state.started || new Date().toISOString();
  }

  function translate() {
    const column = language === "zh" ? 1 : 0;
    document.documentElement.lang = language;
    document.title = texts.title[column];
    document.querySelectorAll("[data-text]").forEach((element) => {
      element.textContent = texts[element.dataset.text][column];
    });
    find("english").setAttribute("aria-pressed", String(language === "en"));
    find("chinese").setAttribute("aria-pressed", String(language === "zh"));
    if (rater) show();
  }

  function setLanguage(value) {
    language = value;
    write("trl_sft judge language", value);
    translate();
  }

  function fill(id, text) {
    const element = find(id);
    element.textContent = text || texts.empty[language === "zh" ? 1 : 0];
    element.classList.toggle("empty", !text);
  }

  function describeCount() {
    const count = Object.keys(votes).length;
    find("progress").value = count;
    const text = `${count} ${texts.done[language === "zh" ? 1 : 0]} ${items.length}`;
    find("count").textContent = `${Math.min(position + 1, items.length)} / ${items.length}  (${text})`;
    find("end_count").textContent = text;
  }

  function show() {
    const isEnd = position >= items.length;
    find("begin").hidden = true;
    find("judging").hidden = isEnd;
    find("end").hidden = !isEnd;
    describeCount();
    if (isEnd) {
      const isComplete = items.every(({item}) => votes[item]);
      find("all_done").hidden = !isComplete;
      find("not_done").hidden = isComplete;
      find("copy").value = format_votes();
      return;
    }
    const item = items[position];
    find("turns").replaceChildren(...item.turns.map(([role, text]) => {
      const turn = document.createElement("div"), name = document.createElement("div"), body = document.createElement("div");
      turn.className = "turn";
      name.className = "role";
      body.className = "text";
      name.textContent = role;
      body.textContent = text;
      turn.append(...(role ? [name] : []), body);
      return turn;
    }));
    find("reference").hidden = !item.reference;
    find("reference_text").textContent = item.reference;
    fill("left", item.left);
    fill("right", item.right);
    const vote = votes[item.item], extra = vote || drafts[item.item] || {};
    document.querySelectorAll("[data-choice]").forEach((button) => {
      button.setAttribute("aria-pressed", String(Boolean(vote) && vote.choice === button.dataset.choice));
    });
    find("harmful_left").checked = (extra.harmful || []).includes("left");
    find("harmful_right").checked = (extra.harmful || []).includes("right");
    find("note").value = extra.note || "";
    document.querySelectorAll("[data-score]").forEach((select) => {
      select.value = ((extra.scores || {})[select.dataset.side] || {})[select.dataset.score] || "";
    });
    find("previous").disabled = position === 0;
    shownAt = Date.now();
  }

  function go(to) {
    position = Math.max(0, Math.min(items.length, to));
    save();
    show();
    scrollTo(0, 0);
  }

  function readExtras() {
    const harmful = ["left", "right"].filter((side) => find("harmful_" + side).checked);
    const scores = {};
    document.querySelectorAll("[data-score]").forEach(({value, dataset}) => {
      if (value) (scores[dataset.side] = scores[dataset.side] || {})[dataset.score] = Number(value);
    });
    return {harmful, note: find("note").value.trim(), scores};
  }

  function keepExtras() {
    const item = items[position].item;
    if (votes[item]) Object.assign(votes[item], readExtras());
    else drafts[item] = readExtras();
    save();
  }

  function vote(choice) {
    const item = items[position].item, earlier = votes[item] ? votes[item].seconds : 0;
    const seconds = Math.round(10 * earlier + (Date.now() - shownAt) / 100) / 10;
    votes[item] = {item, choice, seconds, ...readExtras()};
    delete drafts[item];
    go(position + 1);
  }

  function format_votes() {
    const list = items.map(({item}) => votes[item]).filter(Boolean);
    const content = {format, page, rater, language, started, written: new Date().toISOString(), votes: list};
    return JSON.stringify(content, null, 1) + "\n";
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([format_votes()], {type: "application/json"}));
    const name = rater.normalize("NFKC").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 40);
    link.download = `votes-${name || "rater"}-${page}.json`;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    downloaded = true;
  }

  function start() {
    rater = find("rater").value.trim();
    find("name_needed").hidden = Boolean(rater);
    if (!rater) return find("rater").focus();
    find("rater").blur();  // the next key is a vote, and no part of the name
    write("trl_sft judge rater", rater);
    load();
    save();
    show();
  }

  document.querySelectorAll("[data-choice]").forEach((button) => {
    button.addEventListener("click", () => vote(button.dataset.choice));
  });
  find("english").addEventListener("click", () => setLanguage("en"));
  find("chinese").addEventListener("click", () => setLanguage("zh"));
  find("start").addEventListener("click", start);
  find("rater").addEventListener("keydown", (event) => event.key === "Enter" && !event.isComposing && start());
  find("previous").addEventListener("click", () => go(position - 1));
  find("back").addEventListener("click", () => go(items.length - 1));
  find("next").addEventListener("click", () => go(position + 1));
  find("first_open").addEventListener("click", () => go(items.findIndex(({item}) => !votes[item])));
  find("download").addEventListener("click", download);
  ["harmful_left", "harmful_right"].forEach((id) => find(id).addEventListener("change", keepExtras));
  find("note").addEventListener("input", keepExtras);
  document.querySelectorAll("[data-score]").forEach((select) => select.addEventListener("change", keepExtras));
  document.addEventListener("keydown", (event) => {
    const isText = event.target.matches("textarea, input[type=text], select");
    if (!rater || isText || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") go(position - 1);
    else if (event.key === "ArrowRight") go(position + 1);
    else if (event.key in keys && position < items.length) vote(keys[event.key]);
    else return;
    event.preventDefault();
  });
  addEventListener("beforeunload", (event) => {
    if (!downloaded) event.preventDefault();
  });
  find("rater").value = read("trl_sft judge rater") || "";
  language = read("trl_sft judge language") || (navigator.language.startsWith("zh") ? "zh" : "en");
  translate();
})();
