"""The page of an audit in a browser: gates filter the rows, rows open on a click, nothing is loaded or executed."""

import browser
from browser import NEEDS_CHROMIUM

from trl_sft.reports import audit_page

ARABIC = "لماذا السماء حمراء في المساء؟"
HOSTILE = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> </script>"


def make_content():
    turns = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "An answer.\n\nIts end."}]
    turns.append({"role": "user", "content": ARABIC})
    findings = [
        {"gate": gate, "row": f"rows.jsonl row {number} {HOSTILE}", "reason": f"{gate}: {HOSTILE}", "turns": turns}
        for gate, count in (("empty", 3), ("duplicate", 150), ("novelty", 2))
        for number in range(count)
    ]
    counts = {"kinds": 2, "effective": 1.5, "most": [{"name": HOSTILE, "rows": 150}, {"name": "latin", "rows": 50}]}
    lengths = {"quantiles": {"0": 1, "0.5": 7, "1": 12}, "histogram": [[0, 120], [6, 80]], "sum": 1300}
    gates = [{"gate": "empty", "rows": 3, "removes": True}, {"gate": "duplicate", "rows": 150, "removes": True}]
    return {
        "data": f"rows.jsonl {HOSTILE}",
        "rows": 200,
        "clean": 47,
        "removed": 153,
        "gates": [*gates, {"gate": "novelty", "rows": 2, "removes": False}],
        "statistics": {"unit": "words", "lengths": lengths, "answer_lengths": lengths, "languages_are": "scripts"}
        | dict.fromkeys(("languages", "turns", "tasks", "beginnings"), counts),
        "set_findings": [{"finding": HOSTILE, "fix": "Vary them."}],
        "findings": findings,
        "most_findings": 200,
    }


def test_page_has_no_markup_of_rows_and_its_policy_lets_nothing_be_loaded():
    page = audit_page.format_page(make_content())
    assert "<img" not in page
    assert page.count("<script") == 2
    assert "default-src 'none'" in page
    assert page == audit_page.format_page(make_content())


@NEEDS_CHROMIUM
def test_page_filters_by_gate_and_opens_rows_on_a_click(tmp_path):
    path = tmp_path / "audit.html"
    path.write_text(audit_page.format_page(make_content()), encoding="utf-8")
    with browser.open_browser(tmp_path / "profile", tmp_path / "downloads") as page:
        page.open(path)
        assert page.evaluate("document.title").startswith("Audit of rows.jsonl <script>")
        shown = "document.getElementById('shown').textContent"
        number = "document.querySelectorAll('#list details').length"
        assert (page.evaluate(shown), page.evaluate(number)) == ("100 of 155 findings are shown", 100)
        page.click("#more")
        assert (page.evaluate(number), page.evaluate("document.getElementById('more').hidden")) == (155, True)
        page.click("[data-gate=novelty]")
        assert (page.evaluate(shown), page.evaluate(number)) == ("2 of 2 findings are shown", 2)
        assert page.evaluate("document.querySelectorAll('#list .text').length") == 0
        page.click("#list details summary")
        page.wait_for("document.querySelectorAll('#list details[open] .text').length === 3")
        texts = page.evaluate("[...document.querySelectorAll('#list .text')].map((text) => text.textContent)")
        assert texts == [HOSTILE, "An answer.\n\nIts end.", ARABIC]
        direction = "getComputedStyle([...document.querySelectorAll('#list .text')].at(-1)).direction"
        assert page.evaluate(direction) == "rtl"
        page.evaluate("document.querySelectorAll('#list details summary')[1].focus()")
        page.press(" ")
        page.wait_for("document.querySelectorAll('#list details[open]').length === 2")
        page.click("#chinese")
        assert page.evaluate(shown) == "已显示 2 / 2 条"
        assert page.evaluate("document.documentElement.lang") == "zh"
        page.click("[data-gate=novelty]")
        assert page.evaluate(number) == 100
        page.set_width(360)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate("document.title").startswith("Audit of")
        assert page.list_problems() == []
        assert page.list_requests() == [path.as_uri()]
