"""Every number of an evaluation follows from its JSONL files: code that imports nothing of ours computes it to 1e-9."""

import copy
import json
import random

import pytest
import recomputation
import sacrebleu
from conftest import jsonl

from trl_sft.evaluation import (
    answer_format,
    answer_pairs,
    conclusion,
    format_changes,
    refusals,
    scripts,
    suite_result,
    verdict,
)
from trl_sft.evaluation.checks import text_match
from trl_sft.evaluation.suite_result import SuiteAnswer

WORDS = "the cat sat on a red mat and looked at 12 birds # - ** ``` 好的 天气".split()
SIDES = ("base", "tuned", "base_few_shot", "step_2")
# what is no number of the answers: the form, the options of the sides, losses of texts; and copies, compared below
IGNORED = ["/version", "/decoding", "/model", "/examples", "/template_kwargs", "/text_loss", "/held_out_loss"]
IGNORED += ["/perplexity_under_base", "/evidence", "/best_improved", "/needs_attention", "/advice", "/worsened"]


def write_answer(rng, reference):
    text = reference if rng.random() < 0.4 else " ".join(rng.choices(WORDS, k=rng.randint(0, 12)))
    return rng.choice([text, f"I'm sorry, but I can't help. {text}", f'{{"a": "{text}"', text])


def make_lines(path, seed):
    """Write an evaluation.jsonl of two tasks, three checks, prompts that occur twice, and four sides."""
    rng, lines = random.Random(seed), []
    for number in range(70):
        reference = " ".join(rng.choices(WORDS, k=6)) or "a"
        task = ("sums", "letters")[number % 3 == 0]
        checks = ["exact", "own.py:half"] if task == "sums" else ["chrf", "bleu"]
        answers, scores = {}, {}
        for side in SIDES:
            text = write_answer(rng, reference)
            stop = rng.choice(["stop_token", "max_new_tokens"])
            answers[side] = {"text": text, "thought": rng.choice(["", "hm"]), "is_closed": rng.random() < 0.9}
            answers[side] |= {"stop": stop, "ended": stop == "stop_token", "tokens": len(text)}
            own = {"exact": float(text == reference), "own.py:half": rng.choice([0, 0.5, 1])}
            own |= {"chrf": sacrebleu.sentence_chrf(text, [reference]).score / 100, "bleu": rng.random() / 50}
            scores[side] = {check: own[check] for check in checks}
        line = {"id": number, "row": None, "task": task, "prompt": f"Write {number}", "reference": reference}
        key = str(number if task == "sums" else number % 60)  # of the other task some prompts occur twice
        lines.append(line | {"prompt_key": key, "check": checks[0], "answers": answers, "scores": scores})
    jsonl(path, lines)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_suite_lines(path):
    rng, lines = random.Random(3), []
    texts = ["Here it is.", "I'm sorry, but I can't help with that.", ""]
    for number in range(104):
        task = "general" if number < 40 else "unsafe" if number < 72 else "harmless"
        base, tuned = (rng.choice(texts) for _ in range(2))
        prompt = "天气" if number % 2 else "weather"
        lines.append(SuiteAnswer(task, prompt, base, tuned, rng.random() < 0.8, rng.random() < 0.4, number)._asdict())
    jsonl(path, lines)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return lines of the files, the evaluation as JSON has it, and the recomputed numbers."""
    folder = tmp_path_factory.mktemp("recomputation")
    records, suite_lines = make_lines(folder / "evaluation.jsonl", 1), make_suite_lines(folder / "suite.jsonl")
    model = {"kind": "model", "name": "m", "step": None}
    facts = {side: {"model": model, "template": "t", "thinking": "none"} for side in SIDES}
    pairs = answer_pairs.read_records(records)
    result = verdict.build(records, facts, steps=[2])
    result["format"] = format_changes.describe(answer_format.measure(pairs))
    result["suite"] = suite_result.build([SuiteAnswer(**line) for line in suite_lines], {})
    result = json.loads(json.dumps(conclusion.conclude(result)))
    expected = recomputation.compute_evaluation(records, steps=[2])
    expected["format"] = recomputation.compute_format(pairs, answer_format._FEATURES, text_match.split_words)
    expected["suite"] = recomputation.compute_suite(suite_lines, refusals.is_refusal, scripts.find_script)
    return records, result, expected


def list_numbers(value):
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for part in inner for number in list_numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_number_of_an_evaluation_follows_from_its_files(written):
    _, result, expected = written
    assert recomputation.list_differences(result, expected, ignored=IGNORED) == []
    assert len(list_numbers(result)) > 900
    for section in ("mcnemar", "rates"):
        assert section in result["checks"]["exact"]
        assert section not in result["checks"]["own.py:half"]  # half right is neither
    assert set(result["sides"]["tuned"]["corpus"]) == {"chrf", "bleu"}


def test_findings_and_advice_have_no_number_of_their_own(written):
    _, result, expected = written
    known = {round(abs(number), 9) for number in list_numbers(expected)} | {len(expected["regressions"]["ids"])}
    for name in ("evidence", "best_improved", "needs_attention", "advice"):
        assert {round(abs(number), 9) for number in list_numbers(result[name])} <= known, name
    assert result["advice"]
    assert result["evidence"]


def test_every_claim_names_the_rows_that_it_rests_on(written):
    records, result, _ = written
    ids = {record["id"] for record in records}
    claims = [result, *result["tasks"].values(), *result["checks"].values()]
    for claim in claims:
        named = [*claim["ids"]["better"], *claim["ids"]["worse"]]
        assert set(named) <= ids
        assert bool(named) == bool(claim["improvement_rate"]["better"] + claim["improvement_rate"]["worse"])
    about_rows = {"cut_answers", "unclosed_thoughts", "empty_answers", "regressions", "task_worse"}
    for advice in result["advice"]:
        assert bool(advice["ids"]) == (advice["rule"] in about_rows), advice["rule"]
        assert set(advice["ids"]) <= ids


@pytest.mark.parametrize(
    "path",
    [
        ("average_improvement", "low"),
        ("improvement_rate", "high"),
        ("needed_prompts",),
        ("few_shot", "sign_test_p"),
        ("checks", "exact", "mcnemar", "p"),
        ("checks", "exact", "rates", "base", "low"),
        ("tasks", "sums", "holm_p"),
        ("sides", "tuned", "corpus", "bleu"),
        ("format", "shares", "refusal", "p_value"),
        ("suite", "unsafe", "newly", "upper"),
        ("checkpoints", 0, "base"),
    ],
)
def test_recomputation_finds_a_number_that_is_wrong_by_a_millionth(written, path):
    _, result, expected = written
    changed = copy.deepcopy(result)
    part = changed
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] += 1e-6
    (difference,) = recomputation.list_differences(changed, expected, ignored=IGNORED)
    assert difference.startswith("/" + "/".join(map(str, path)))
