"""The page on which people judge: blind, safe, saved by itself, and used in a real browser down to the votes file."""

import json
import re
import time

import browser
import pytest

from trl_sft import cli, run_folder
from trl_sft.evaluation import answer_pairs, blind_items
from trl_sft.reports import judge_page

PLANTED = "</script><script>document.title = 'planted'</script><img src=x onerror=\"document.title = 'planted'\">"


@pytest.fixture
def make_page(tmp_path):
    """Return a function that makes a run with answers, and the page and key of it by the command line."""

    def make(*words, count=12):
        folder = tmp_path / "a-run-with-a-name"
        folder.mkdir(exist_ok=True)
        (folder / run_folder.RUN).write_text('{"outcome": "done"}')
        samples = [
            {
                "row": row,
                "task": "",
                "prompt": [{"role": "user", "content": f"题目 {row} {PLANTED}"}],
                "reference": f"expected {row}",
                "before": f"short {row} \u202e\udcff{PLANTED}",
                "after": f"long {row} " * 30 if row else "",
            }
            for row in range(count)
        ]
        (folder / run_folder.SAMPLES).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        output = tmp_path / "page.html"
        assert cli.main(["judge", str(folder), "-o", str(output), *words]) == 0
        return output, json.loads((tmp_path / "page.key.json").read_text(encoding="utf-8"))

    return make


def test_page_names_neither_model_nor_run_nor_key(make_page):
    page, key = make_page()
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert set(data) == {"page", "format", "items", "texts"}
    assert set().union(*data["items"]) == {"item", "turns", "left", "right", "reference"}
    assert not re.search(r"a-run-with-a-name|\bbase\b(?!-uri)|\btuned\b|expected 1|row \d", text)
    assert [entry["item"] for entry in key["items"]] == [item["item"] for item in data["items"]]


def test_every_text_of_the_page_is_in_english_and_chinese():
    blind = blind_items.build(answer_pairs.read_pairs([]), seed=0, max_pairs=1)
    text = judge_page.format_page(blind.items, "x")
    texts = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["texts"]
    named = set(re.findall(r'data-text="(\w+)"', text)) | set(re.findall(r"texts\.(\w+)", text))
    assert named == set(texts) - {"needs_script"}
    assert all(len(both) == 2 and re.search("[一-鿿]", both[1]) for both in texts.values())


def test_expected_answers_are_shown_where_they_are_wanted(make_page):
    page, _ = make_page("--show-reference")
    assert "expected 1" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "Write a number of at least 1."),
        (["--key", "{page}"], "the key says which model each answer is of"),
    ],
)
def test_wrong_options_are_refused(make_page, words, message, tmp_path, capsys):
    page, _ = make_page()
    words = [word.replace("{page}", str(page)) for word in words]
    assert cli.main(["judge", str(tmp_path / "a-run-with-a-name"), "-o", str(page), *words]) == 2
    assert message in capsys.readouterr().err


def test_key_of_another_page_is_not_replaced(make_page, tmp_path, capsys):
    page, key = make_page()
    make_page()  # the same page again
    run = tmp_path / "a-run-with-a-name"
    assert cli.main(["judge", str(run), "-o", str(page), "--seed", "1"]) == 2
    assert "is the key of another page" in capsys.readouterr().err
    assert json.loads((tmp_path / "page.key.json").read_text(encoding="utf-8")) == key
    assert cli.main(["judge", str(run), "-o", str(tmp_path / "other.html"), "--seed", "1"]) == 0


def test_run_without_answers_or_with_equal_ones_has_no_page(tmp_path, capsys):
    (tmp_path / run_folder.RUN).write_text('{"outcome": "done"}')
    assert cli.main(["judge", str(tmp_path), "-o", str(tmp_path / "p.html")]) == 2
    assert "no prompt that both base and tuned model answered" in capsys.readouterr().err
    (tmp_path / run_folder.SAMPLES).write_text('{"row": 0, "prompt": "p", "before": "a", "after": "a "}\n')
    assert cli.main(["judge", str(tmp_path), "-o", str(tmp_path / "p.html")]) == 2
    assert "both models gave the same answer to each of 1 prompts" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def choose(known):
    """Return the key that a rater who always prefers the tuned model presses."""
    if known["kind"] == blind_items.IDENTICAL:
        return "0"
    return "1" if known["left"] == answer_pairs.TUNED else "2"


def give_scores(page, scores):
    """Choose scores with the keyboard; the digits are no votes."""
    page.click("#scores summary")
    for (dimension, side), score in scores.items():
        page.evaluate(f"document.querySelector('[data-score={dimension}][data-side={side}]').focus()")
        page.press(score)


def check_screen(out, known):
    """Check what `votes` says about the votes of the test."""
    assert "result    tuned 12, base 0, ties 0; win rate 100% [74%, 100%]" in out
    base, tuned = (4, 2) if known["left"] == answer_pairs.BASE else (2, 4)
    assert f"note      Ana 王/1, {known['pair']}: 2 or 3, wrong unit" in out
    assert f"score     honesty: {base:.2f} -> {tuned:.2f} of 5 in 1 pairs" in out
    assert "score     format" not in out  # one answer alone has a score


@browser.NEEDS_CHROMIUM
def test_rater_votes_in_a_browser_and_the_file_is_read_back(make_page, tmp_path, capsys):
    """On a phone, with the keyboard and the mouse, closed in between; then `votes` on what was downloaded."""
    path, key = make_page()
    count, downloads = len(key["items"]), tmp_path / "downloads"
    with browser.open_browser(tmp_path / "profile", downloads) as page:
        page.set_width(390)
        page.open(path)
        page.press("1")  # votes for nothing before a rater has begun
        page.click("#start")
        assert not page.evaluate("document.querySelector('#name_needed').hidden")
        page.click("#rater")
        page.write("Ana 王/1")
        page.press("Enter")
        assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing runs out of a phone
        for known in key["items"][:5]:
            page.press(choose(known))
        page.press("ArrowLeft")
        page.click("#note")
        page.write("2 or 3, wrong unit")  # digits in a note are no votes
        give_scores(page, {("honesty", "left"): "4", ("honesty", "right"): "2", ("format", "left"): "1"})
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.click("#harmful_left")
        assert page.evaluate("document.querySelector('#count').textContent") == f"5 / {count}  (5 votes of {count})"
    with browser.open_browser(tmp_path / "profile", downloads) as page:  # the browser was closed: the votes are there
        page.open(path)
        page.click("#start")
        page.click("#chinese")
        assert page.evaluate("document.querySelector('h1').innerText") == "哪个回答更好？"
        assert page.evaluate("document.querySelector('#note').value") == "2 or 3, wrong unit"
        assert page.evaluate("document.querySelector('[data-score=honesty][data-side=left]').value") == "4"
        page.press("ArrowRight")
        for known in key["items"][5:-1]:
            page.press(choose(known))
        page.click(f"[data-choice={'left' if choose(key['items'][-1]) == '1' else 'right'}]")
        assert page.evaluate("document.querySelector('#all_done').checkVisibility()")
        assert page.evaluate("document.querySelector('#copy').value.includes('wrong unit')")
        page.click("#download")
        name = f"votes-Ana-王-1-{key['page']}.json"
        wait_for_file(downloads / name)
        assert page.evaluate("document.title") == "哪个回答更好？"  # no text of a model ran as a script
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        assert set(page.list_requests()) == {path.as_uri()}
        assert page.list_problems() == []
    written = json.loads((downloads / name).read_text(encoding="utf-8"))
    assert (written["rater"], written["language"], len(written["votes"])) == ("Ana 王/1", "zh", count)
    fifth = written["votes"][4]
    assert fifth["scores"] == {"left": {"honesty": 4, "format": 1}, "right": {"honesty": 2}}
    assert written["votes"][5]["scores"] == {}
    assert (fifth["note"], fifth["harmful"]) == ("2 or 3, wrong unit", ["left"])
    assert cli.main(["votes", str(tmp_path / "page.key.json"), str(downloads / name)]) == 0
    check_screen(capsys.readouterr().out, key["items"][4])


def wait_for_file(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not downloaded"
        time.sleep(0.02)


@browser.NEEDS_CHROMIUM
def test_page_says_so_where_a_browser_saves_nothing(make_page, tmp_path):
    path, _ = make_page()
    with browser.open_browser(tmp_path / "profile", tmp_path / "downloads") as page:
        blocked = "Storage.prototype.setItem = () => { throw new Error('blocked') }"
        page.call("Page.addScriptToEvaluateOnNewDocument", source=blocked)
        page.open(path)
        page.click("#rater")
        page.write("wei")
        page.press("Enter")
        page.press("1")
        assert page.evaluate("document.querySelector('#unsaved').checkVisibility()")
        assert page.evaluate("document.querySelector('#count').textContent").startswith("2 / ")
