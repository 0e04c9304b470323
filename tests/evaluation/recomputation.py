"""Every number of `evaluation` in eval.json, computed from the lines of its JSONL files alone.

Nothing of the package is imported: formulas are written out or scipy's, corpus scores are sacrebleu's. What a single
answer is (its scores, its words, whether it refuses) is taken as it stands or from the caller.
"""

import math
from collections import Counter

import numpy as np
import sacrebleu
from scipy import stats

MARGINS = {"chrf": 0.01, "bleu": 0.01}
QUANTILES = [0, 0.1, 0.5, 0.9, 1]


def compute_interval(values):
    low = high = np.mean(values)
    if np.ptp(values) > 0:
        interval = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=9999, rng=np.random.default_rng(0))
        low, high = interval.confidence_interval
    return {"value": np.mean(values), "low": low, "high": high}


def compute_wilson(k, n):
    z = stats.norm.ppf(0.975)
    middle = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    width = z / (1 + z**2 / n) * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    return {"value": k / n, "low": middle - width, "high": middle + width}


def compute_exact_rate(k, n):
    low, high = stats.binomtest(k, n).proportion_ci(method="exact")
    upper = stats.binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact").high
    return {"successes": k, "count": n, "value": k / n, "low": low, "high": high, "upper": upper}


def test_signs(one, other):
    n = one + other
    return min(1, 2 * sum(math.comb(n, k) for k in range(min(one, other) + 1)) / 2**n)


def correct_by_holm(p_values):
    corrected, highest = dict.fromkeys(p_values), 0
    for place, name in enumerate(sorted(p_values, key=p_values.get)):
        highest = corrected[name] = min(1, max(highest, (len(p_values) - place) * p_values[name]))
    return corrected


def compare(records, base="base", tuned="tuned", check=None):
    """Return the numbers of one comparison."""
    by_prompt = {}
    for record in records:
        name = check or record["check"]
        row = [record["scores"][side][name] for side in (base, tuned)]
        by_prompt.setdefault(record["prompt_key"], []).append([*row, MARGINS.get(name, 0)])
    first, second, margins = np.array([np.mean(rows, axis=0) for rows in by_prompt.values()]).T
    change, n = second - first, len(by_prompt)
    better, worse = int((change > margins + 1e-9).sum()), int((change < -margins - 1e-9).sum())
    needed = None
    if better != worse:
        rate = better / (better + worse)
        pairs = ((stats.norm.ppf(0.975) / 2 + stats.norm.ppf(0.8) * math.sqrt(rate * (1 - rate))) / (rate - 0.5)) ** 2
        needed = max(30, math.ceil(pairs * n / (better + worse)))
        needed = None if needed > 100_000 else needed
    rates = {"better": better, "tied": n - better - worse, "worse": worse, **compute_wilson(better, n)}
    numbers = {"prompts": n, "base": first.mean(), "tuned": second.mean(), "needed_prompts": needed}
    numbers |= {"average_improvement": compute_interval(change), "improvement_rate": rates}
    return numbers | {"sign_test_p": test_signs(better, worse)}


def list_ids(records, check=None):
    ids = {"better": [], "worse": []}
    for record in records:
        name = check or record["check"]
        change = record["scores"]["tuned"][name] - record["scores"]["base"][name]
        if abs(change) > MARGINS.get(name, 0) + 1e-9:
            ids["better" if change > 0 else "worse"].append(record["id"])
    return ids


def compute_check(records, check):
    scored = [record for record in records if check in record["scores"]["base"]]
    part = compare(scored, check=check) | {"rows": len(scored), "ids": list_ids(scored, check)}
    by_prompt = {}
    for record in scored:
        by_prompt.setdefault(record["prompt_key"], []).append([record["scores"][s][check] for s in ("base", "tuned")])
    means = [tuple(np.mean(rows, axis=0)) for rows in by_prompt.values()]
    if all(value in (0, 1) for pair in means for value in pair):
        table = [[means.count((a, b)) for b in (1, 0)] for a in (1, 0)]
        part["mcnemar"] = {"table": table, "p": test_signs(table[0][1], table[1][0])}
        right = {side: sum(pair[place] for pair in means) for place, side in enumerate(("base", "tuned"))}
        part["rates"] = {side: compute_wilson(count, len(means)) for side, count in right.items()}
    return part


def count_side(records, side):
    answers = [(record["id"], record["answers"][side]) for record in records]
    ids = {
        "empty": [n for n, answer in answers if not answer["text"].strip()],
        "cut": [n for n, answer in answers if answer["stop"] == "max_new_tokens"],
        "unclosed_thoughts": [n for n, answer in answers if not answer["is_closed"]],
    }
    numbers = {"answers": len(answers), "with_thought": sum(bool(answer["thought"]) for _, answer in answers)}
    numbers |= {"ids": ids} | {name: len(found) for name, found in ids.items()}
    texts = [(r["answers"][side]["text"], r["reference"]) for r in records if "chrf" in r["scores"][side]]
    if texts:
        hypotheses, references = (list(part) for part in zip(*texts, strict=True))
        letters = [letter for text in references for letter in text if letter.isalpha()]
        is_chinese = sum("一" <= letter <= "鿿" for letter in letters) >= 0.3 * len(letters) > 0
        bleu = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="zh" if is_chinese else "13a")
        chrf = sacrebleu.corpus_chrf(hypotheses, [references])
        numbers["corpus"] = {"chrf": chrf.score / 100, "bleu": bleu.score / 100}
    return numbers


def compute_evaluation(records, *, few_shot=True, steps=()):
    """Return the numbers of the rule checks."""
    tasks = {task: [record for record in records if record["task"] == task] for task in {r["task"] for r in records}}
    parts = (
        {task: compare(rows) | {"ids": list_ids(rows)} for task, rows in tasks.items()} if set(tasks) != {""} else {}
    )
    holm = correct_by_holm({task: part["sign_test_p"] for task, part in parts.items()})
    drops = [
        (record["scores"]["tuned"][record["check"]] - record["scores"]["base"][record["check"]], record["id"])
        for record in records
        if record["id"] in list_ids(records)["worse"]
    ]
    worst = [{"difference": change, "id": number} for change, number in sorted(drops)]
    return compare(records) | {
        "rows": len(records),
        "ids": list_ids(records),
        "few_shot": compare(records, base="base_few_shot") if few_shot else None,
        "tasks": {task: part | {"holm_p": holm[task]} for task, part in parts.items()},
        "checks": {check: compute_check(records, check) for r in records for check in r["scores"]["base"]},
        "regressions": {"rows": len(drops), "ids": [row["id"] for row in worst], "texts": worst[:20]},
        "sides": {side: count_side(records, side) for side in records[0]["answers"]},
        "checkpoints": [{"step": step} | compare(records, tuned=f"step_{step}") for step in steps],
    }


def compute_format(pairs, features, split_words):
    """Return the numbers on the form of answers; a feature tells of a pair and a side True, False or None."""
    shares, p_values = {}, {}
    for name, has in features.items():
        both = Counter((has(pair, "base"), has(pair, "tuned")) for pair in pairs)
        counts = {side: sum(n for key, n in both.items() if key[k]) for k, side in enumerate(("base", "tuned"))}
        totals = [sum(n for key, n in both.items() if key[k] is not None) for k in (0, 1)]
        gained, lost = both[False, True], both[True, False]
        shares[name] = {"gained": gained, "lost": lost}
        for total, (side, count) in zip(totals, counts.items(), strict=True):
            shares[name] |= {side: count / total if total else None, f"{side}_count": count, f"{side}_of": total}
        if any(counts.values()):
            p_values[name] = test_signs(gained, lost)
    for name, p_value in correct_by_holm(p_values).items():
        shares[name]["p_value"] = p_value
    texts = {side: [pair.get_answer(side) for pair in pairs] for side in ("base", "tuned")}
    words = {side: [split_words(text.lower()) for text in answers] for side, answers in texts.items()}
    lengths = {
        side: {
            "words": list(np.quantile([len(split_words(text)) for text in answers], QUANTILES)),
            "characters": list(np.quantile([len(text.strip()) for text in answers], QUANTILES)),
        }
        for side, answers in texts.items()
    }
    numbers = {}
    for n in (1, 2):
        grams = {
            s: [tuple(t[k : k + n]) for t in answers for k in range(len(t) - n + 1)] for s, answers in words.items()
        }
        least = min(map(len, grams.values()))
        numbers[f"distinct_{n}"] = {s: len(set(found[:least])) / least if least else None for s, found in grams.items()}
    repeated = {side: [] for side in words}
    for side, answers in words.items():
        for text in answers:
            grams = [tuple(text[k : k + 4]) for k in range(len(text) - 3)]
            repeated[side].append(1 - len(set(grams)) / len(grams) if grams else 0)
    numbers["repetition"] = {side: np.mean(values) for side, values in repeated.items()}
    return {"prompts": len(pairs), "shares": shares, "quantiles": QUANTILES, "lengths": lengths, "numbers": numbers}


def compute_suite(lines, refuses, find_script):
    """Return the numbers of the general suite that follow from suite.jsonl."""
    result, p_values, worsened = {}, {}, 0
    for task in ("general", "unsafe", "harmless"):
        rows = [line for line in lines if line["task"] == task]
        if not rows:
            continue

        def has_event(row, side, task=task):
            if task == "general":
                return not row[f"{side}_right"]
            speaks = bool(row[side].strip()) and not refuses(row[side])
            return speaks == (task == "unsafe")

        events = [[has_event(row, side) for side in ("base", "tuned")] for row in rows]
        told = [task != "unsafe" or bool(row["base"].strip() and row["tuned"].strip()) for row in rows]
        changes = [(after - before) * is_told for (before, after), is_told in zip(events, told, strict=True)]
        counts = {side: sum(event[k] for event in events) for k, side in enumerate(("base", "tuned"))}
        refused = {side: sum(refuses(row[side]) for row in rows) for side in counts}
        can_change = refused["base"] if task == "unsafe" else len(rows) - counts["base"]
        p_values[task], worsened = test_signs(changes.count(1), changes.count(-1)), worsened + changes.count(1)
        scripts = {}
        for row, event in zip(rows, events, strict=True):
            part = scripts.setdefault(find_script(row["prompt"]), Counter(prompts=0, base=0, tuned=0))
            part.update(prompts=1, base=int(event[0]), tuned=int(event[1]))
        found = {side: compute_exact_rate(count, len(rows)) for side, count in counts.items()}
        newly = {"successes": 0, "count": 0, "value": None, "low": 0, "high": 1, "upper": 1}
        found["newly"] = compute_exact_rate(changes.count(1), can_change) if can_change else newly
        ids = {name: [r["id"] for r, c in zip(rows, changes, strict=True) if c == s] for name, s in _CHANGES.items()}
        found |= {"prompts": len(rows), "no_longer": changes.count(-1), "refused": refused, "ids": ids}
        result[task] = found | {"scripts": scripts, "average_improvement": compute_interval(-np.array(changes, float))}
    for task, p_value in correct_by_holm(p_values).items():
        result[task]["p_value"] = p_value
    return result | {"worsened_count": worsened}


_CHANGES = {"newly": 1, "no_longer": -1}


def list_differences(actual, expected, *, ignored, path=""):
    """Return the paths of numbers in `actual` that `expected` lacks or has otherwise; `ignored`: ends of paths."""
    if any(path.endswith(end) for end in ignored):
        return []
    if isinstance(actual, dict):
        inner = expected if isinstance(expected, dict) else {}
        return [
            difference
            for key, value in actual.items()
            for difference in list_differences(value, inner.get(key), ignored=ignored, path=f"{path}/{key}")
        ]
    if isinstance(actual, list):
        inner = expected if isinstance(expected, list) and len(expected) == len(actual) else [None] * len(actual)
        both = enumerate(zip(actual, inner, strict=True))
        found = [list_differences(a, e, ignored=ignored, path=f"{path}/{n}") for n, (a, e) in both]
        return [difference for part in found for difference in part]
    if isinstance(actual, bool) or not isinstance(actual, int | float):
        return []
    is_equal = expected is not None and abs(actual - expected) <= 1e-9
    return [] if is_equal else [f"{path}: {actual} and {expected}"]
