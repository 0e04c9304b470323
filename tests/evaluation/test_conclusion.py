"""All findings of an evaluation make one verdict, say what improved and what needs attention, and give advice."""

import re

import pytest
from test_suite import HELP, REFUSAL, make_answers

from trl_sft.evaluation import advice, conclusion, evidence, suite_result, verdict, vote_files
from trl_sft.evaluation.answer_pairs import BASE, TUNED
from trl_sft.evaluation.judging import rubric
from trl_sft.evaluation.suite import GENERAL, HARMLESS, UNSAFE
from trl_sft.evaluation.text_loss import TextLoss
from trl_sft.reports import chinese_evaluation, evaluation_chapter, opinions_chapter


def make_evaluation(base, tuned, *, task="", check="exact", **others):
    """Return an evaluation of scores, with findings of other commands."""
    answer = {"text": "a", "thought": "", "is_closed": True, "stop": "stop_token", "tokens": 1, "ended": True}
    records = [
        {
            "id": number,
            "task": task,
            "prompt": f"p{number}",
            "prompt_key": f"{task}{number}",
            "reference": "a",
            "check": check,
            "answers": dict.fromkeys((BASE, TUNED), answer),
            "scores": {BASE: {check: one}, TUNED: {check: other}},
        }
        for number, (one, other) in enumerate(zip(base, tuned, strict=True))
    ]
    model = {"kind": "model", "name": "m", "step": None}
    facts = {"model": model, "template": "t", "thinking": "none"}
    return conclusion.conclude(verdict.build(records, {BASE: facts, TUNED: facts}) | others)


RISEN, FALLEN = ([0] * 40 + [1] * 20, [1] * 40 + [1] * 20), ([1] * 40 + [0] * 20, [0] * 60)
UNCLEAR = ([0, 1] * 30, [1, 0] * 30)
SAME = ([0, 1] * 30, [0, 1] * 30)
LOST = make_answers(UNSAFE, (20, REFUSAL, REFUSAL), (12, REFUSAL, HELP))
NEEDLESS = make_answers(HARMLESS, (20, HELP, HELP), (12, HELP, REFUSAL))
FORGOTTEN = make_answers(GENERAL, (20, "right", "right"), (20, "right", "wrong"))
LEARNT = make_answers(GENERAL, (20, "right", "right"), (20, "wrong", "right"))


def make_votes(tuned, base, tie=0, winner=None):
    """Return votes as the command `votes` adds them."""
    count = tuned + base
    rate = {"value": tuned / count, "low": 0.1, "high": 0.9} if count else {"value": None, "low": 0, "high": 1}
    wins = {"tuned": tuned, "base": base, "tie": tie, "win_rate": rate, "winner": winner or "not_resolved"}
    return {"result": wins, "tasks": {}, "counted_raters": ["a", "b"], "raters": [{}, {}], "scores": {}}


def make_judge(resolution, code="", *, passed=True):
    """Return a judge's verdict as the command `judge` adds it."""
    rate, part = {"value": 0.7, "low": 0.6, "high": 0.8}, {"resolution": resolution, "prompts": 60}
    scores = {"difference": {"value": 1.5, "low": 1.0, "high": 2.0}, "resolution": "improved", "rows": 60}
    consistency = {"value": 0.4, "low": 0.3, "high": 0.5}
    judge = part | {"win_rate": rate, "verdict": {"code": code or resolution}, "swap_consistency": consistency}
    judge |= {"audit": {"has_passed": passed, "skipped": not passed, "passed_rows": 39, "rows": 40}}
    counts = {"pairs": 60, "tuned": 40, "tie": 4, "base": 16, "invalid": 0, "not_judged": 0, "sign_test_p": 0.002}
    judge |= counts | {"is_partial": False, "first_position_rate": rate, "reliability": {"is_reliable": not code}}
    judge |= {"judge": {"model": "m"}, "warnings": [], "needed_prompts": 900}
    part = part | counts | {"win_rate": rate, "length_controlled": {"win_rate": rate}}
    scores |= {"base": 2.5, "tuned": 4.0, "holm_p": 0.01}
    judge["verdict"]["text"] = "The judge prefers the tuned model."
    return (
        judge | {"length_controlled": {"win_rate": None}} | {"tasks": {"sums": part}, "dimensions": {"honesty": scores}}
    )


def make_tasks(resolution, value=-0.2, **changes):
    """Return tasks of lm-eval as `evaluate --tasks` adds them."""
    interval = {"value": value, "low": value - 0.1, "high": value + 0.1}
    part = {"difference": interval, "base": 0.6, "tuned": 0.4, "higher_is_better": True, "observations": 60} | changes
    return {"tasks": {"gsm8k": {"metric": "acc,none", "metrics": {"acc,none": part}, "resolution": resolution}}}


@pytest.mark.parametrize(
    ("scores", "others", "code"),
    [
        (RISEN, {}, "improved"),
        (RISEN, {"suite": suite_result.build(LOST, {})}, "mixed"),
        (RISEN, {"suite": suite_result.build(NEEDLESS, {})}, "mixed"),
        (RISEN, {"suite": suite_result.build(FORGOTTEN, {})}, "mixed"),
        (UNCLEAR, {"suite": suite_result.build(FORGOTTEN, {})}, "worse"),
        (UNCLEAR, {"suite": suite_result.build(LEARNT, {})}, "not_resolved"),  # the suite saves no verdict
        (SAME, {"suite": suite_result.build(LEARNT, {})}, "no_difference"),
        (UNCLEAR, {"votes": make_votes(40, 10, winner="tuned")}, "improved"),
        (UNCLEAR, {"votes": make_votes(10, 40, winner="base")}, "worse"),
        (RISEN, {"votes": make_votes(10, 40, winner="base")}, "mixed"),
        (RISEN, {"votes": make_votes(20, 20)}, "improved"),
        (RISEN, {"votes": make_votes(0, 0, 40)}, "improved"),
        (UNCLEAR, {"judge": make_judge("improved")}, "improved"),
        (UNCLEAR, {"judge": make_judge("improved", code="unreliable")}, "not_resolved"),
        (UNCLEAR, {"judge": make_judge("not_resolved", code="length")}, "not_resolved"),
        (UNCLEAR, {"judge": make_judge("improved", passed=False)}, "not_resolved"),
        (UNCLEAR, {"lm_eval": make_tasks("worse")}, "worse"),
        (RISEN, {"lm_eval": make_tasks("worse")}, "mixed"),
        (UNCLEAR, {"lm_eval": make_tasks("improved", 0.2)}, "improved"),
        (FALLEN, {"judge": make_judge("worse")}, "worse"),
        (FALLEN, {"judge": make_judge("improved")}, "mixed"),
        (([0] * 20, [1] * 20), {}, "not_resolved"),
    ],
)
def test_verdict_follows_from_all_resolved_findings(scores, others, code):
    result = make_evaluation(*scores, **others)
    assert result["verdict"]["code"] == code
    assert conclusion.conclude(result) == result
    assert chinese_evaluation.translate_verdict(result)


def test_part_that_became_worse_is_named_in_the_verdict_the_attention_list_and_the_advice():
    result = make_evaluation(*RISEN, suite=suite_result.build(LOST, {}))
    change = -12 / 32
    assert f"Worse: general suite, refusals of unsafe prompts {change:+.1%} (" in result["verdict"]["text"]
    assert result["verdict"]["text"].startswith("Better in part and worse in part. The tuned model is better than")
    (entry,) = result["needs_attention"]
    assert (entry["name"], entry["value"], entry["count"]) == ("unsafe", change, 32)
    assert result["suite"]["unsafe"]["ids"] == {"newly": [0] * 12, "no_longer": []}  # planted answers have no number
    first = result["advice"][0]
    assert (first["rule"], first["numbers"]) == ("refusals_lost", {"newly": 12, "prompts": 32})


def test_loss_of_general_text_needs_attention_and_changes_no_verdict():
    losses = {side: [TextLoss(10.0 * (1 + (side == TUNED)) + n, 10) for n in range(20)] for side in (BASE, TUNED)}
    result = make_evaluation(*RISEN, suite=suite_result.build([], losses))
    assert result["verdict"]["code"] == "improved"
    (entry,) = result["needs_attention"]
    assert (entry["name"], entry["unit"]) == ("text_loss", "nats")
    assert entry["value"] == pytest.approx(-1)
    assert "text_loss_rose" in {given["rule"] for given in result["advice"]}


def test_judge_whose_verdict_depends_on_the_order_resolves_nothing():
    for code, resolution in (("", "improved"), ("unreliable", "not_resolved")):
        found = make_evaluation(*RISEN, judge=make_judge("improved", code))["evidence"]
        entries = [entry for entry in found if entry["source"] == "judge"]
        assert [entry["name"] for entry in entries] == ["", "sums", "honesty"]
        assert {entry["resolution"] for entry in entries} == {resolution}
        assert [round(entry["value"], 3) for entry in entries] == [0.2, 0.2, 1.5]


def test_task_of_lm_eval_is_an_improvement_where_its_perplexity_falls():
    fall = make_tasks("improved", -5.0, base=30.0, tuned=25.0, higher_is_better=False)
    (entry,) = make_evaluation(*UNCLEAR, lm_eval=fall)["best_improved"]
    assert (entry["name"], entry["unit"]) == ("gsm8k", "score")
    assert (entry["low"], entry["value"], entry["high"]) == (4.9, 5, 5.1)
    texts = make_tasks("not_resolved", difference=dict.fromkeys(("value", "low", "high")))
    assert all(entry["source"] != "task_suite" for entry in make_evaluation(*UNCLEAR, lm_eval=texts)["evidence"])


def test_what_became_worse_stands_before_what_is_not_resolved_and_by_the_lower_end_of_the_interval():
    entries = [
        evidence.EvaluationFinding.read(
            {"source": source, "name": name, "role": "detail", "resolution": resolution, "unit": "share", "count": 9}
            | {"value": low + 0.1, "low": low, "high": 1}
        )
        for source, name, resolution, low in [
            ("task", "wide", "improved", 0.01),
            ("task", "sure", "improved", 0.3),
            ("task", "unclear", "not_resolved", -0.9),
            ("task", "lost", "worse", -0.3),
            ("general_suite", "general", "worse", -0.5),
            ("general_suite", "unsafe", "not_resolved", -0.8),
            ("judge", "", "worse", -1),
        ]
    ]
    assert [entry.name for entry in evidence.list_best(entries)] == ["sure", "wide"]
    assert [entry.name for entry in evidence.list_attention(entries)] == ["general", "lost", "unclear"]


EVERY_RULE = [
    make_evaluation(*RISEN, suite=suite_result.build(part, {}), votes=make_votes(1, 40, winner="base"))
    | {"few_shot": {"resolution": "not_resolved", "base": 0.9}}
    for part in (LOST, NEEDLESS, FORGOTTEN)
]
EVERY_RULE += [make_evaluation(*UNCLEAR), make_evaluation(*SAME), make_evaluation([0] * 9, [1] + [0] * 8)]
EVERY_RULE += [make_evaluation(*FALLEN, task="sums", votes=make_votes(1, 1) | {"counted_raters": ["a"]})]


def list_advice():
    """Return advice of every rule by its name."""
    found = {}
    for evaluation in EVERY_RULE:
        sides = {
            side: facts | {"cut": 60, "unclosed_thoughts": 60, "empty": 60}
            for side, facts in evaluation["sides"].items()
        }
        found |= {given["rule"]: given for given in advice.choose(evaluation | {"sides": sides})}
    losses = {side: [TextLoss(10.0 * (1 + (side == TUNED)) + n, 10) for n in range(20)] for side in (BASE, TUNED)}
    leaks = {"leaks": {"exact": 2, "near": 1, "phrase": 5}, "evaluation_rows": 60, "matches": []}
    others = {"suite": suite_result.build([], losses), "lm_eval": make_tasks("worse"), "training_set": leaks}
    for judge in (make_judge("improved", "unreliable"), make_judge("not_resolved", "length")):
        found |= {given["rule"]: given for given in make_evaluation(*RISEN, judge=judge, **others)["advice"]}
    return found


def test_every_rule_has_advice_in_english_and_chinese_with_the_same_numbers():
    found = list_advice()
    assert set(found) == set(chinese_evaluation._read_texts()["advice"])
    for given in found.values():
        text, trigger = chinese_evaluation.translate_advice(given)
        assert re.search("[一-鿿]", text)
        english = re.findall(r"\d[\d.,%]*", given["trigger"] + given["text"])
        chinese = re.findall(r"\d[\d.,%]*", trigger + text)
        assert sorted(number.strip(",.") for number in english) == sorted(number.strip(",.") for number in chinese)


def test_prompts_in_training_rows_are_named_with_their_ids_and_phrases_are_not():
    matches = [{"kind": "near", "evaluation_row": 7}, {"kind": "phrase", "evaluation_row": 8}]
    leaks = {"leaks": {"exact": 0, "near": 1, "phrase": 1}, "evaluation_rows": 60, "matches": matches}
    (given,) = [
        given for given in make_evaluation(*RISEN, training_set=leaks)["advice"] if given["rule"] == "leaked_prompts"
    ]
    assert (given["ids"], given["trigger"]) == ([7], "1 of 60 prompts are in training rows")
    harmless = leaks | {"leaks": {"phrase": 3}}
    advised = make_evaluation(*RISEN, training_set=harmless)["advice"]
    assert "leaked_prompts" not in {given["rule"] for given in advised}


def test_chapter_has_every_finding_in_both_languages():
    chapter = evaluation_chapter.describe(make_evaluation(*FALLEN, task="sums", suite=suite_result.build(LOST, {})))
    assert chapter["code"] == "worse"
    assert chapter["text_zh"].startswith("微调模型不如基座模型：66.7% → 0.0%，共 60 个提示；平均提升 -66.7%")
    assert "更差的有：任务，sums" in chapter["text_zh"]
    (name, rows), (last, every) = chapter["findings"]
    assert (name, last) == ("needs_attention", "evidence")
    assert [row["name_zh"] for row in every] == ["规则检查", "任务，sums", "通用测试集，拒绝不安全提示"]
    assert [row["name_zh"] for row in rows] == ["任务，sums", "通用测试集，拒绝不安全提示"]
    assert all(translated for _, _, translated in chapter["advice"])


def test_chapter_on_a_judge_has_its_health_in_both_languages():
    for code in ("", "unreliable", "length", "worse", "no_difference", "not_resolved"):
        chapter = opinions_chapter.describe_judge(make_judge("improved", code))
        assert "胜率 70.0%（95% 区间 60.0% 至 80.0%，平局计一半），40 胜 4 平 16 负" in chapter["text_zh"]
    assert chapter["text_zh"].endswith("；约需 900 个提示。")
    warned = opinions_chapter.describe_judge(make_judge("improved") | {"warnings": ["of one family"]})
    assert warned["text_zh"].startswith("警告：评判模型与被评判的模型属于同一系列")
    health = dict(chapter["health"])
    assert (health["judge_audit"], health["judge_consistency"]) == ("39 / 40", "40% (30% ... 50%)")
    assert opinions_chapter.describe_judge(make_judge("improved", passed=False))["text_zh"].startswith(
        "评判模型未经审核"
    )
    assert chapter["scores"] == [("score_honesty", "2.50", "4.00", "+1.50 (+1.00 ... +2.00)", "60", "0.01", "improved")]


def test_part_of_another_command_without_rule_checks_makes_no_verdict():
    assert conclusion.add_part({}, judge={"a": 1}) == {"judge": {"a": 1}}
    added = conclusion.add_part(make_evaluation(*UNCLEAR), votes=make_votes(40, 10, winner="tuned"))
    assert added["verdict"]["code"] == "improved"


def test_dimensions_of_scores_have_chinese_names_and_are_those_of_the_rubric():
    assert tuple(rubric.read_rubric()) == vote_files.DIMENSIONS
    assert tuple(chinese_evaluation._read_texts()["dimensions"]) == vote_files.DIMENSIONS
    text = chinese_evaluation.translate_verdict(make_evaluation(*UNCLEAR, judge=make_judge("improved")))
    assert "评判模型，诚实 +1.5 (+1 至 +2)" in text
