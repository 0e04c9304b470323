"""The report: one page about a run or several, which says what the files say, and is safe whatever they hold."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from trl_sft import cli, run_folder
from trl_sft.evaluation import answer_format
from trl_sft.reports import charts, chinese, comparison, page, run_files

PLANTED = "<script>document.title = 'planted'</script>"
LOG = [
    {"eval_loss": 2.0, "step": 0},
    *({"loss": 2.0 - step / 10, "learning_rate": 1e-4, "grad_norm": 1.0, "step": step} for step in range(1, 11)),
    {"loss": float("nan"), "step": 11},
    {"eval_loss": 0.5, "step": 11},
]
RECORD = {
    "outcome": "done",
    "steps": 11,
    "seconds": 75.0,
    "metrics": {"eval_loss": 0.5},
    "recipe": {"train.learning_rate": 1e-4},
    "versions": {"trl": "1.16.0", "torch": "2.13.0+cpu"},
    "verdict": {"code": "better", "text": "Better: eval loss 2 -> 0.5."},
}
ROWS = {"input": 12, "kept": 10, "truncated": 1, "rejected": {"empty answer": 2}}
COUNTS = {"rows": ROWS, "tokens": {"kept": 90, "loss": 30}}
LENGTHS = {"min": 3, "median": 9, "p90": 12, "p99": 14, "max": 20}
TRAIN = COUNTS | {"tokens_per_row": LENGTHS, "sources": [COUNTS | {"name": "skills"}]}
LEDGER = {"train": TRAIN, "eval": {"eval": COUNTS}}
SEGMENTS = [["<|user|>", False, True], [PLANTED, False, False], ["yes", True, False]]
ROW = {"name": "row 1", "segments": SEGMENTS, "num_tokens": 5, "num_loss_tokens": 1, "num_truncated": 0}


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes the files of a run."""

    def make(name="first", after="yes", **changes):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        sample = {"reference": "yes", "before": "no"}
        answers = ["no", after] * 10
        samples = [sample | {"prompt": f"{PLANTED} {row}", "after": text} for row, text in enumerate(answers)]
        sides = {side: {"loss": loss, "exact_match": 0.5} for side, loss in (("before", 2.0), ("after", 0.5))}
        files = {
            run_folder.RUN: json.dumps(RECORD | changes),
            run_folder.LOG: lines(LOG),
            run_folder.LEDGER: json.dumps(LEDGER),
            run_folder.EVAL: json.dumps(sides | {"prompts": 20, "tasks": {}}),
            run_folder.SAMPLES: lines(samples),
            run_folder.ROWS: lines([ROW]),
            run_folder.RECIPE: f"model: x  # {PLANTED}\n",
            run_folder.RESOLVED: "train: {learning_rate: 1e-4}\n",
        }
        for file, text in files.items():
            (folder / file).write_text(text)
        return folder

    return make


LOADING = ("src", "srcset", "href", "action", "onload", "onerror")


class Texts(HTMLParser):
    """Collects the text of a page outside scripts and styles, and the elements that could load something."""

    def __init__(self):
        super().__init__()
        self.text, self.loads, self._skipped = "", [], False

    def handle_starttag(self, tag, attrs):
        self._skipped = tag in ("script", "style")
        self.loads += [(tag, name) for name, _ in attrs if name in LOADING]

    def handle_endtag(self, tag):
        self._skipped = False

    def handle_data(self, data):
        if not self._skipped:
            self.text += data


def read(text):
    parser = Texts()
    parser.feed(text)
    return parser


def test_page_shows_what_the_files_hold(make_run):
    text = page.format_page([run_files.read_run(make_run())])
    shown = read(text).text
    for expected in (
        "Better: eval loss 2 -> 0.5.",
        "Train loss and eval loss by step",
        "empty answer: 2",
        "min 3",
        "skills",
        "row 1: 5 tokens, 1 with loss",
        "pip install trl==1.16.0 torch==2.13.0",
        "resolved.yaml",
        "20",
        "1 min 15 s",
    ):
        assert expected in shown
    assert len(text) < 2_000_000


def test_page_has_verdict_findings_and_phases_in_both_languages(make_run):
    numbers = {"eval_loss_before": 2.0, "eval_loss_after": 0.5, "best_step": 11, "best_eval_loss": 0.5}
    verdict = RECORD["verdict"] | {"advice": "", "numbers": numbers}
    finding = {"code": "zero_loss", "steps": [3], "observation": "The train loss is exactly 0 at step 3."}
    finding |= {"meaning": "m", "advice": "a", "numbers": {"entries": 1}}
    unknown = finding | {"code": "new_code", "observation": "Seen."}
    phase = {"name": "levelling off", "first_step": 4, "last_step": 11, "loss": 1.25}
    record = {"verdict": verdict, "findings": [finding, unknown], "phases": [phase, {"name": 3}]}
    text = page.format_page([run_files.read_run(make_run(**record))])
    assert (
        '<span lang="en">Better: eval loss 2 -&gt; 0.5.</span><span lang="zh">评估损失 2 → 0.5（降低 75.0%）。</span>'
        in text
    )
    assert '<span lang="zh">第 3 步的训练损失正好为 0。</span>' in text
    assert "Seen." in text  # a code of another version has the English text in both
    shown = read(text).text
    assert "levelling off趋于平缓: step步 4 – 11, loss at its end结束时的损失 1.25" in " ".join(shown.split())


def test_page_loads_nothing_and_shows_planted_markup_as_text(make_run):
    parser = read(page.format_page([run_files.read_run(make_run())]))
    assert parser.loads == []
    assert parser.text.count(PLANTED) >= 3  # a prompt, a row, the recipe


def test_every_label_is_in_english_and_chinese():
    texts = page._read_texts()
    assert all(len(pair) == 2 and all(pair) for pair in texts.values())
    assert all(re.search(r"[\u4e00-\u9fff]", chinese) for _, chinese in texts.values())
    used = set(re.findall(r'\bt\("(\w+)"\)', (page._HERE / "page.html.jinja").read_text(encoding="utf-8")))
    assert used <= set(texts)
    assert {f"chart_{name}" for name in charts._CHARTS} <= set(texts)


def test_values_that_are_not_finite_are_left_out_and_counted(make_run):
    run = run_files.read_run(make_run())
    loss = charts.make_charts([run], ["first"])[0].series[0]
    assert (loss.name, len(loss.values), loss.omitted) == ("loss", 10, 1)


def test_long_curve_is_thinned_and_keeps_its_last_step():
    curve = charts._collect([{"loss": 1.0, "step": step} for step in range(9001)], "loss", "loss")
    assert len(curve.steps) <= charts._MAX_POINTS + 1
    assert curve.steps[-1] == 9000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (5, 5), (0, 0), (-3, 1e9), (1e-9, 2e-9), (1e300, 2e300)])
def test_ticks_cover_the_range_and_are_few(low, high):
    ticks = charts.find_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 12


def test_several_runs_show_keys_that_differ_and_the_paired_difference(make_run):
    first = make_run("first")
    second = make_run("second", after="no", recipe={"train.learning_rate": 2e-4, "train.seed": 1})
    runs = [run_files.read_run(folder) for folder in (first, second)]
    assert comparison.find_differing_keys(runs) == [
        ("train.learning_rate", ["0.0001", "0.0002"]),
        ("train.seed", ["-", "1"]),
    ]
    (difference,) = comparison.compare_runs(runs, ["first", "second"])
    assert (difference.metric, difference.pairs, difference.mean) == ("exact_match", 20, -0.5)
    # of ten differences of 0 and ten of -1: standard error sqrt(0.25 * 20 / 19 / 20)
    assert difference.low == pytest.approx(-0.5 - 1.96 * (0.25 / 19) ** 0.5)
    assert difference.high == pytest.approx(-0.5 + 1.96 * (0.25 / 19) ** 0.5)
    shown = read(page.format_page(runs)).text
    assert "first: loss" in shown
    assert "second: loss" in shown
    assert "-0.5" in shown


def test_runs_without_common_rows_have_no_paired_difference(make_run):
    runs = [run_files.read_run(make_run("first")), run_files.read_run(make_run("second"))]
    other = [sample | {"prompt": "another"} for sample in runs[1].samples]
    runs[1] = dataclasses.replace(runs[1], samples=other)
    assert comparison.compare_runs(runs, ["a", "b"]) == []


READ = (run_folder.LOG, run_folder.LEDGER, run_folder.EVAL, run_folder.SAMPLES, run_folder.ROWS)
ODD = b'{"train": 3, "before": [], "tasks": {"a": 1}}'


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("damage", [None, b"", b"\xff\x00", b"[1, 2]", ODD], ids=str)
def test_page_is_written_whatever_a_file_holds(make_run, name, damage):
    path = make_run() / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    run = run_files.read_run(path.parent)
    assert "</html>" in page.format_page([run])
    assert bool(run.damaged) == (damage in (b"\xff\x00", b"[1, 2]"))


def test_record_with_values_of_other_types_makes_a_page(make_run):
    odd = {"verdict": "x", "findings": {"a": 1}, "versions": [1], "metrics": 3, "best": [], "hardware": "cpu"}
    assert "</html>" in page.format_page([run_files.read_run(make_run(**odd))])


def test_command_refuses_several_runs_without_a_file_and_a_folder_without_a_run(make_run, tmp_path, capsys):
    first, second = make_run("first"), make_run("second")
    assert cli.main(["report", str(first), str(second)]) == 2
    assert "Name it, for example -o comparison.html." in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "the folder holds no run" in capsys.readouterr().err
    assert cli.main(["report", str(first), str(second), "-o", str(tmp_path / "both.html")]) == 0
    assert "second" in (tmp_path / "both.html").read_text()


def test_form_of_the_answers_is_shown_base_beside_tuned(make_run):
    shown = " ".join(read(page.format_page([run_files.read_run(make_run(after="- one\n- two"))])).text.split())
    assert "length in words长度（词）1 (1 ... 1)1.5 (1 ... 2)" in shown
    assert "with a bullet list有项目列表0% (0 / 20)50% (10 / 20)" in shown
    assert "with a heading" not in shown
    labels = {f"format_{name}" for name in answer_format._FEATURES}
    assert labels <= set(page._read_texts())


def test_finished_run_has_a_report_with_its_rows(go, here):
    code, out, err = go()
    assert code == 0, err
    assert out.endswith("Report: open out/report.html in a browser.\n")
    shown = read((here / "out" / "report.html").read_text(encoding="utf-8")).text
    stored = [json.loads(line) for line in (here / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(stored) == 3
    for row in stored:
        assert f"{row['name']}: {row['num_tokens']} tokens, {row['num_loss_tokens']} with loss" in shown
        assert all(text.strip("\n ") in shown for text, has_loss, _ in row["segments"] if has_loss)


def test_report_that_cannot_be_written_does_not_fail_a_finished_run(make_run, capsys):
    folder = make_run()
    (folder / run_folder.REPORT).mkdir()
    page.write_at_end(folder)
    assert "Report: not written: " in capsys.readouterr().out


def browse(path, tmp_path):
    """Open a page in headless Chromium; return its document, the lines of its console, and the URLs it requested."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000 --dump-dom"
    net_log = tmp_path / "net.json"
    command = ["chromium", *flags.split(), f"--log-net-log={net_log}", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    events = json.loads(net_log.read_text(encoding="utf-8"))["events"]
    requests = [event["params"] for event in events if "initiator" in event.get("params", {})]
    # what Chromium itself asks for has no origin; that of a local page is null
    urls = {request["url"] for request in requests if request["initiator"] == "null"}
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, {url for url in urls if not url.startswith("data:")}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_browser_draws_the_curves_without_an_error_or_a_request(make_run, tmp_path):
    path = tmp_path / "report.html"
    text = page.format_page([run_files.read_run(make_run())])
    path.write_text(text, encoding="utf-8")
    document, console, requests = browse(path, tmp_path)
    assert document.count("<canvas") == 3  # loss, learning rate, gradient norm
    assert "<title>first - trl_sft</title>" in document
    assert console == []
    assert requests == set()
    # the same with a picture of another host and without the policy: this test would notice a request
    leaky = re.sub("<meta http-equiv[^>]*>", "", text).replace("<main", "<img src='http://127.0.0.1:9/x'><main", 1)
    path.write_text(leaky, encoding="utf-8")
    assert browse(path, tmp_path)[2] == {"http://127.0.0.1:9/x"}


def test_marks_of_the_curve_are_named_below_it_in_both_languages(make_run):
    finding = {"code": "zero_loss", "steps": [3], "observation": "x", "meaning": "m", "advice": "a"}
    record = {"findings": [finding | {"numbers": {"entries": 1}}], "best": {"step": 7}}
    text = page.format_page([run_files.read_run(make_run(**record))])
    marks = re.search(r'<p class="marks">(.*?)</p>', text)[1]
    shown = re.sub(r"<[^>]+>", "", marks)
    assert shown == "step步 3: zero loss损失为零; step步 7: the step whose weights were saved保存的是这一步的权重"
    assert "<title>zero loss / 损失为零</title>" in text
    assert "<title>Train loss and eval loss by step / 训练损失与评估损失（按步）</title>" in text


def test_why_a_run_stopped_is_said_in_chinese_too(make_run):
    outcome = "stopped by SIGTERM after step 3 of 10; saved in out/checkpoint-3\nTo resume: python -m trl_sft r.yaml"
    text = page.format_page([run_files.read_run(make_run(outcome=outcome))])
    assert f'<span lang="en">{outcome}</span>' in text
    chinese = (
        "第 3 步（共 10 步）之后因信号 SIGTERM 停止，已保存到 out/checkpoint-3\n继续训练：python -m trl_sft r.yaml"
    )
    assert f'<span lang="zh">{chinese}</span>' in text


OUTCOMES = {
    "stopped at the time limit (run.max_hours) after step 2 of 9; saved in a/checkpoint-2": "之后达到时间上限",
    "stopped at once at step 0; no checkpoint was saved yet": "在第 0 步立即停止；还没有保存过检查点",
    "out of memory in the evaluation at step 4; the last checkpoint is a/checkpoint-2": "评估时内存不足；最后",
    "out of memory at step 4; no checkpoint was saved yet": "第 4 步内存不足；还没有保存过检查点",
    "the training failed: loss, grad_norm not finite at step 7; no checkpoint was saved yet": "loss, grad_norm 不是",
    "the training failed: weights not finite after step 9; nothing is saved": "没有保存任何内容",
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_outcome_in_chinese_has_every_part(outcome):
    translated = chinese.translate_outcome(f"{outcome}\nWhat to try: train.x: 1")
    assert OUTCOMES[outcome] in translated
    assert translated.endswith("\n建议：train.x: 1")


def test_outcome_of_another_form_stays_in_english():
    assert chinese.translate_outcome("ValueError: bad") is None
    assert chinese.translate_outcome("") is None


def test_tables_of_the_chinese_page_have_no_english_words(make_run):
    runs = [run_files.read_run(make_run(name)) for name in ("first", "second")]
    text = re.sub(r'<span lang="en">.*?</span>', "", page.format_page(runs))
    heads = re.findall(r"<th>(.*?)</th>", text)
    assert len(heads) > 20
    words = [head for head in heads if re.search(r"[a-z]{3}", re.sub(r"<[^>]+>", "", head))]
    assert {word.partition(": ")[0] for word in words} == {"first", "second"}  # runs, and their curves as logged
    assert '<span lang="zh">变好</span>' in text
    assert '<span lang="zh">已完成</span>' in text
