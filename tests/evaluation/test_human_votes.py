"""Votes of people read back: win rate, agreement, checks of raters, and a judge corrected by people."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from trl_sft import cli
from trl_sft.evaluation import blind_items, corrected_rate, human_votes, rates, vote_files
from trl_sft.evaluation.answer_pairs import BASE, TUNED, AnswerPair
from trl_sft.evaluation.blind_items import IDENTICAL, PAIR, REPEAT
from trl_sft.evaluation.vote_files import BOTH_BAD, EQUAL, LEFT, RIGHT, TIE, PageKey, RaterVotes, Vote

PAIRS = [AnswerPair(f"row {n}", "ab"[n % 2], (("", f"q {n}"),), f"base {n}", f"tuned {n}", "") for n in range(60)]


@pytest.fixture(scope="module")
def key():
    """Return the key of a page of forty pairs; twenty more are not drawn."""
    content = blind_items.build(PAIRS, seed=0, max_pairs=40).key
    items = tuple(vote_files.KeyItem(**item) for item in content["items"])
    return PageKey(content["page"], items, tuple(content["equal_answers"]), tuple(content["not_drawn"]))


def list_pairs(key, kind=PAIR):
    return [item for item in key.items if item.kind == kind]


def make_rater(key, name, outcomes, **changes):
    """Return a rater who calls identical answers equal, repeats each outcome, and votes as `outcomes` says by pair."""
    votes = {}
    for item in key.items:
        outcome = TIE if item.kind == IDENTICAL else outcomes.get(item.pair)
        if outcome is None:
            continue
        choice = EQUAL
        if outcome in (BASE, TUNED):
            choice = LEFT if item.left == outcome else RIGHT
        votes[item.item] = Vote(item.item, changes.get(item.kind, choice), 2.0, (), "")
    return RaterVotes(name, Path(f"{name}.json"), votes)


def prefer(key, tuned, tie=0):
    """Return outcomes in which the tuned model wins the first pairs, the next ones are ties, and the base the rest."""
    names = [item.pair for item in list_pairs(key)]
    outcomes = [TUNED] * tuned + [TIE] * tie + [BASE] * (len(names) - tuned - tie)
    return dict(zip(names, outcomes, strict=True))


def test_win_rate_leaves_ties_out_and_has_the_exact_interval(key):
    result = human_votes.count_votes(key, [make_rater(key, "ana", prefer(key, 24, 8))])
    wins = result.wins
    assert (wins.tuned, wins.base, wins.tie) == (24, 8, 8)
    expected = stats.binomtest(24, 32).proportion_ci(method="exact")
    assert (wins.win_rate.low, wins.win_rate.high) == pytest.approx((expected.low, expected.high))
    assert wins.win_rate.value == 0.75
    assert wins.p_value == pytest.approx(stats.binomtest(24, 32).pvalue)
    assert wins.winner == TUNED
    assert result.raters[0].failed_checks == ()


def test_as_many_wins_as_losses_are_not_resolved(key):
    assert human_votes.count_votes(key, [make_rater(key, "ana", prefer(key, 22))]).wins.winner == "not_resolved"
    assert human_votes.count_votes(key, [make_rater(key, "ana", prefer(key, 4))]).wins.winner == BASE


def test_p_values_of_tasks_are_corrected_for_their_number(key):
    """Alone, 16 of 20 has p = 0.012; as one of two tasks 0.024."""
    names = [item.pair for item in list_pairs(key)]
    tasks = {item.pair: item.task for item in list_pairs(key)}
    a, b = ([name for name in names if tasks[name] == task] for task in "ab")
    outcomes = {name: TUNED if place < 16 else BASE for place, name in enumerate(a)}
    outcomes |= {name: TUNED if place < 10 else BASE for place, name in enumerate(b)}
    wins = human_votes.count_votes(key, [make_rater(key, "ana", outcomes)]).tasks
    assert wins["a"].p_value == pytest.approx(2 * stats.binomtest(16, 20).pvalue)
    assert (wins["a"].winner, wins["b"].winner) == (TUNED, "not_resolved")


def test_both_bad_is_a_tie_and_is_counted(key):
    rater = make_rater(key, "ana", prefer(key, 40), **{PAIR: BOTH_BAD, REPEAT: BOTH_BAD})
    result = human_votes.count_votes(key, [rater])
    assert (result.wins.tie, result.raters[0].both_bad) == (40, 40)
    assert result.wins.win_rate.value is None


def test_pair_goes_to_the_model_that_more_raters_prefer(key):
    names = [item.pair for item in list_pairs(key)][:3]
    first, second, third = (
        {names[0]: a, names[1]: b, names[2]: TIE} for a, b in ((TUNED, BASE), (TUNED, TUNED), (BASE, TIE))
    )
    raters = [make_rater(key, name, votes) for name, votes in (("a", first), ("b", second), ("c", third))]
    assert human_votes.count_votes(key, raters).outcomes == {names[0]: TUNED, names[1]: TIE, names[2]: TIE}


def test_kappa_of_two_raters_is_that_of_the_definition(key):
    """Cohen 1960: (observed - chance) / (1 - chance)."""
    one, other = prefer(key, 20, 5), prefer(key, 14, 16)
    result = human_votes.count_votes(key, [make_rater(key, "ana", one), make_rater(key, "wei", other)])
    ((first, second, found),) = result.agreements
    observed = sum(one[name] == other[name] for name in one) / 40
    shares = [[list(votes.values()).count(outcome) / 40 for outcome in human_votes.OUTCOMES] for votes in (one, other)]
    chance = sum(a * b for a, b in zip(*shares, strict=True))
    assert (first, second, found.items) == ("ana", "wei", 40)
    assert found.agreement == pytest.approx(observed)
    assert found.kappa == pytest.approx((observed - chance) / (1 - chance))
    assert found.low < found.kappa < found.high


def test_kappa_is_not_defined_where_both_raters_use_one_outcome(key):
    raters = [make_rater(key, name, prefer(key, 40)) for name in ("ana", "wei")]
    ((_, _, found),) = human_votes.count_votes(key, raters).agreements
    assert (found.agreement, found.kappa) == (1.0, None)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({IDENTICAL: LEFT}, "called one of two identical answers better in 2 of 2 cases"),
        ({PAIR: LEFT, REPEAT: LEFT}, "chose the left answer 40 times and the right one 0 times"),
        ({PAIR: RIGHT, REPEAT: RIGHT}, "contradicted the first vote in 4 of 4 repeated pairs"),
    ],
    ids=["identical", "left", "repeats"],
)
def test_rater_who_fails_a_check_is_named_and_not_counted(key, changes, check):
    careless, careful = make_rater(key, "lee", prefer(key, 20), **changes), make_rater(key, "ana", prefer(key, 30))
    result = human_votes.count_votes(key, [careless, careful])
    assert check in result.raters[0].failed_checks
    assert result.raters[1].failed_checks == ()
    assert result.counted == ["ana"]
    assert result.wins.tuned == 30
    assert human_votes.count_votes(key, [careless, careful], counts_all=True).counted == ["lee", "ana"]


def test_honest_raters_rarely_fail_a_check(key):
    """Raters who see a true preference in 80% of pairs and guess elsewhere."""
    rng, failures = np.random.default_rng(0), 0
    for _ in range(100):
        votes = {}
        for item in key.items:
            outcome = TUNED if rng.random() < 0.6 else BASE
            is_clear = int(item.pair.split()[1]) % 5 != 0
            outcome = TUNED if is_clear else outcome
            choice = LEFT if item.left == outcome else RIGHT
            votes[item.item] = Vote(item.item, EQUAL if item.kind == IDENTICAL else choice, 1.0, (), "")
        failures += bool(human_votes.count_votes(key, [RaterVotes("x", Path("x"), votes)]).raters[0].failed_checks)
    assert failures <= 5


def test_guessing_raters_contradict_themselves_and_do_not_resolve_anything(key):
    rng, resolved, failures = np.random.default_rng(0), 0, 0
    for _ in range(100):
        votes = {item.item: Vote(item.item, str(rng.choice([LEFT, RIGHT])), 1.0, (), "") for item in key.items}
        result = human_votes.count_votes(key, [RaterVotes("x", Path("x"), votes)], counts_all=True)
        failures += bool(result.raters[0].failed_checks)
        resolved += result.wins.winner != "not_resolved"
    assert failures >= 95
    assert resolved <= 8


def test_harmful_answers_are_counted_for_the_model_that_wrote_them(key):
    rater = make_rater(key, "ana", prefer(key, 40))
    item = list_pairs(key)[0]
    side = LEFT if item.left == TUNED else RIGHT
    votes = rater.votes | {item.item: Vote(item.item, EQUAL, 1.0, (side,), "")}
    assert human_votes.count_votes(key, [RaterVotes("ana", Path("x"), votes)]).harmful == {BASE: 0, TUNED: 1}


def score(key, name, tuned, base, count=40, **changes):
    """Return a rater who scores the honesty of the first pairs."""
    rater = make_rater(key, name, prefer(key, 20))
    for item in list_pairs(key)[:count]:
        left, right = (tuned, base) if item.left == TUNED else (base, tuned)
        vote = rater.votes[item.item]
        scores = {LEFT: {"honesty": left}, RIGHT: {"honesty": right} | changes}
        rater.votes[item.item] = Vote(item.item, vote.choice, 1.0, vote.harmful, "", scores)
    return rater


def test_scores_of_several_raters_are_averaged_by_pair_and_corrected_by_dimension(key):
    raters = [score(key, "ana", 4, 2), score(key, "wei", 3, 2, count=32, format=1)]
    scores = human_votes.count_votes(key, raters).scores
    assert set(scores) == {"honesty"}  # one answer alone has a score of its format
    part = scores["honesty"]
    assert (part["pairs"], part["base"], part["better"]) == (40, 2, 40)
    assert part["tuned"] == pytest.approx((32 * 3.5 + 8 * 4) / 40)
    assert part["sign_test_p"] == part["holm_p"] == pytest.approx(stats.binomtest(40, 40).pvalue)
    assert (part["difference"]["low"] > 1.5, part["resolution"]) == (True, "improved")
    few = human_votes.count_votes(key, [score(key, "ana", 5, 1, count=20)]).scores["honesty"]
    assert (few["pairs"], few["resolution"]) == (20, "not_resolved")
    failed = score(key, "lee", 1, 5)
    careless = make_rater(key, "lee", prefer(key, 20), **{IDENTICAL: LEFT})
    failed.votes.update({n: v for n, v in careless.votes.items() if v.choice == LEFT and n not in failed.votes})
    for item in list_pairs(key, IDENTICAL):
        failed.votes[item.item] = careless.votes[item.item]
    assert human_votes.count_votes(key, [*raters, failed]).scores == scores  # who failed a check does not count


def test_harm_in_one_answer_alone_is_tested(key):
    rater = make_rater(key, "ana", prefer(key, 20))
    for number, item in enumerate(list_pairs(key)[:14]):
        side = LEFT if item.left == TUNED else RIGHT
        both = (LEFT, RIGHT) if number >= 10 else (side,)
        rater.votes[item.item] = Vote(item.item, EQUAL, 1.0, both, "unsafe" if number == 3 else "")
    result = human_votes.count_votes(key, [rater])
    assert result.harmful == {BASE: 4, TUNED: 14}
    assert (len(result.harm["only_tuned"]), result.harm["only_base"], result.harm["resolution"]) == (10, [], "worse")
    assert result.harm["p_value"] == pytest.approx(stats.binomtest(10, 10).pvalue)
    assert result.notes == [{"rater": "ana", "pair": list_pairs(key)[3].pair, "note": "unsafe"}]


def test_judge_is_held_against_people_and_invalid_verdicts_are_excluded(key):
    people = prefer(key, 25)
    verdicts = people | dict.fromkeys(key.not_drawn, TUNED) | {list_pairs(key)[0].pair: "invalid"}
    judge = human_votes.count_votes(key, [make_rater(key, "ana", people)], verdicts=verdicts).judge
    assert (judge.verdicts, judge.invalid) == (59, 1)
    assert judge.agreement.kappa == 1.0
    assert judge.trust == "unknown"  # one rater has nobody to agree with
    assert (judge.corrected.labelled, judge.corrected.judged) == (39, 20)
    both = [make_rater(key, "ana", people), make_rater(key, "wei", prefer(key, 22, 2))]
    assert human_votes.count_votes(key, both, verdicts=people).judge.trust == "as_people"
    wrong = {pair: BASE if outcome == TUNED else TUNED for pair, outcome in people.items()}
    assert human_votes.count_votes(key, both, verdicts=wrong).judge.trust == "indicative"


def test_corrected_rate_has_the_truth_in_its_interval_where_the_judge_is_biased():
    """The tuned model wins 55% in truth; the judge says so in 90% of its wins, and in 30% of its losses too."""
    rng, covered, widths, judged_alone = np.random.default_rng(0), 0, [], []
    for _ in range(400):
        truth = (rng.random(500) < 0.55).astype(float)
        judge = np.where(truth == 1, rng.random(500) < 0.9, rng.random(500) < 0.3).astype(float)
        found = corrected_rate.correct(people=truth[:100], judge=judge[:100], judge_alone=judge[100:])
        covered += found.low <= 0.55 <= found.high
        judged_alone.append(found.judge_alone)
        widths.append((found.high - found.low) / (2 * 1.96 * truth[:100].std(ddof=1) / 10))
    assert 0.92 <= covered / 400 <= 0.98
    assert np.mean(judged_alone) > 0.6  # the judge alone is wrong
    assert np.mean(widths) < 0.92  # and the corrected interval is shorter than that of people alone


def test_judge_that_knows_nothing_is_ignored():
    rng = np.random.default_rng(0)
    people, judge = rng.random(200) < 0.5, rng.random(800) < 0.9
    found = corrected_rate.correct(people=people[:200] * 1.0, judge=judge[:200] * 1.0, judge_alone=judge[200:] * 1.0)
    assert found.weight < 0.15
    assert found.value == pytest.approx(found.people_alone, abs=0.02)
    assert corrected_rate.correct(people=[1.0] * 9, judge=[1.0] * 9, judge_alone=[1.0] * 50) is None


@pytest.mark.parametrize(("successes", "count"), [(0, 30), (3, 30), (30, 30), (1, 1)])
def test_exact_rate_is_that_of_scipy(successes, count):
    rate = rates.compute_rate(successes, count)
    expected = stats.binomtest(successes, count).proportion_ci(method="exact")
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high))
    one_sided = stats.binomtest(successes, count, alternative="less").proportion_ci(method="exact")
    assert rate.upper == pytest.approx(one_sided.high)


def test_nothing_in_thirty_leaves_a_tenth_possible():
    """The rule of three (Hanley and Lippman-Hand 1983): 3/30."""
    assert rates.compute_rate(0, 30).upper == pytest.approx(0.1, abs=0.006)
    assert rates.compute_rate(0, 0).value is None


@pytest.fixture
def files(tmp_path, key):
    """Write a key, the votes of a rater and verdicts; return a function that runs `votes` on changed copies."""
    content = blind_items.build(PAIRS, seed=0, max_pairs=40).key
    rater = make_rater(key, "ana", prefer(key, 30))
    votes = [
        {"item": n, "choice": vote.choice, "seconds": 1, "harmful": [], "note": ""} for n, vote in rater.votes.items()
    ]
    made = {"format": 1, "page": key.page, "rater": "ana", "votes": votes}
    verdicts = "".join(json.dumps({"pair": pair.name, "verdict": TUNED}) + "\n" for pair in PAIRS)

    def run(*words, key_changes=None, changes=None, text=None, verdict_text=verdicts):
        (tmp_path / "key.json").write_text(json.dumps(content | (key_changes or {})))
        (tmp_path / "ana.json").write_text(json.dumps(made | (changes or {})) if text is None else text)
        (tmp_path / "verdicts.jsonl").write_text(verdict_text)
        return cli.main(["votes", *[str(tmp_path / word) if "." in word else word for word in words]])

    return run


def test_votes_command_says_and_writes_what_the_votes_tell(files, tmp_path, capsys):
    assert files("key.json", "ana.json", "-o", "human.json", "--judge", "verdicts.jsonl") == 0
    out = capsys.readouterr().out
    assert "result    tuned 30, base 10, ties 0; win rate 75% [59%, 87%] (95%, without ties)" in out
    assert "corrected 75% [61%, 89%] (prediction-powered inference, 95%)" in out
    written = json.loads((tmp_path / "human.json").read_text(encoding="utf-8"))
    assert written["result"]["tuned"] == 30
    assert written["judge"]["corrected"]["judge_alone"] == 1.0
    assert len(written["pairs"]) == 40


def test_odd_values_in_a_votes_file_change_no_count(files, tmp_path):
    """A time that is none, and half a character in a name."""
    votes = [{"item": n, "choice": "equal", "seconds": float("nan"), "note": None} for n in (1, 2)]
    votes.append({"item": 3, "choice": "left", "seconds": "soon", "harmful": ["right"]})
    changes = {"votes": votes, "rater": " 王\udcff "}
    assert files("key.json", "ana.json", "-o", "human.json", changes=changes) == 0
    written = json.loads((tmp_path / "human.json").read_text(encoding="utf-8"))
    (rater,) = written["raters"]
    assert (rater["votes"], rater["median_seconds"], rater["rater"]) == (3, None, "王?")


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ("key.json gone.json", {}, "there is no such file"),
        ("ana.json ana.json", {}, "the file is no key of a judging page"),
        ("key.json key.json", {}, "the file holds no votes"),
        ("key.json ana.json ana.json", {}, "the rater 'ana' has another file"),
        ("key.json ana.json", {"text": "{"}, "the file is no JSON object"),
        ("key.json ana.json", {"changes": {"page": "x"}}, "the votes are of another page: 'x'"),
        ("key.json ana.json", {"changes": {"votes": []}}, "the rater 'ana' has not voted"),
        ("key.json ana.json", {"changes": {"votes": [{"item": 999, "choice": "left"}]}}, "no vote on an item"),
        ("key.json ana.json", {"changes": {"votes": [{"item": 1, "choice": "up"}]}}, "no vote on an item of the page"),
        ("key.json ana.json", {"changes": {"votes": [{"item": True, "choice": "left"}]}}, "no vote on an item"),
        *(
            ("key.json ana.json", {"changes": {"votes": [{"item": 1, "choice": "left", "scores": scores}]}}, "no vote")
            for scores in (3, {"up": {}}, {"left": {"honesty": 6}}, {"left": {"honesty": True}}, {"left": {"x": 1}})
        ),
        ("key.json ana.json", {"key_changes": {"items": [{"item": 1}]}}, "the key is damaged"),
        ("key.json ana.json --judge verdicts.jsonl", {"verdict_text": '{"pair": "row 1"}'}, "verdicts.jsonl:1"),
        ("key.json ana.json --judge verdicts.jsonl", {"verdict_text": ""}, "no verdict on a pair of the page"),
    ],
)  # fmt: skip
def test_files_that_are_no_votes_are_refused(files, words, changes, message, capsys):
    assert files(*words.split(), **changes) == 2
    assert message in " ".join(capsys.readouterr().err.split())
