"""Quotas are met to the row, the choice takes the best of each cell, and relatives stay in one part of the set."""

import dataclasses
from collections import Counter

import pytest

from trl_sft.building import augmentation, balance, kept_facts, plan, splitting, templates
from trl_sft.building import spec as building_spec
from trl_sft.building.candidates import CandidateRow
from trl_sft.building.spec import AxisValue

SPEC = """\
plan: {rows: 30, surplus: 1.5}
seeds: {topics: [rivers, bread, chess]}
axes:
  task: {summary: 2, question: 1}
  difficulty: [easy, hard]
templates: {families: [basic]}
generator: {endpoint: http://127.0.0.1:1/v1, model: m}
augmentation: {methods: [paraphrase, easier, format]}
"""


@pytest.fixture
def spec(here):
    (here / "spec.yaml").write_text(SPEC, encoding="utf-8")
    return building_spec.load_spec("spec.yaml")


def make_rows(spec, scores=()):
    rows = []
    for slot in plan.plan_slots(spec):
        messages = ({"role": "user", "content": f"q {slot.number}"}, {"role": "assistant", "content": "a"})
        score = scores[slot.number % len(scores)] if scores else None
        rows.append(CandidateRow(f"{slot.number:06d}", messages, cell=slot.cell, score=score))
    return rows


@pytest.mark.parametrize("total", [1, 7, 100, 333])
def test_shares_of_each_axis_are_met_to_the_row_and_cells_nearly(total):
    axes = {
        "a": (AxisValue("x", 3, ""), AxisValue("y", 2, ""), AxisValue("z", 1, "")),
        "b": (AxisValue("p", 1, ""), AxisValue("q", 1, "")),
        "c": tuple(AxisValue(str(number), 1, "") for number in range(5)),
    }
    cells = plan.choose_cells(axes, total, seed=3)
    assert len(cells) == total
    for place, values in enumerate(axes.values()):
        counts = Counter(cell[place] for cell in cells)
        expected = plan.apportion(total, [value.share for value in values])
        assert [counts[value.name] for value in values] == expected
    pairs = Counter(cell[:2] for cell in cells)
    for first in axes["a"]:
        for second in axes["b"]:
            assert abs(pairs[first.name, second.name] - total * first.share / 12) < 2
    assert cells == plan.choose_cells(axes, total, seed=3)


def test_topics_come_round_before_one_comes_again(spec):
    counts = Counter(slot.topic for slot in plan.plan_slots(spec))
    assert set(counts.values()) == {15}


def test_best_rows_of_each_cell_are_taken_up_to_its_quota(spec):
    rows = make_rows(spec, scores=(3.0, 5.0, 4.0, 2.0))
    result = balance.choose_rows(rows, spec, plan.count_quotas(spec))
    assert (len(rows), len(result.rows), len(result.left_over)) == (45, 30, 15)
    assert result.after.counts == {
        ("summary", "easy"): 10,
        ("summary", "hard"): 10,
        ("question", "easy"): 5,
        ("question", "hard"): 5,
    }
    for cell in result.after.counts:
        taken = [row.score for row in result.rows if balance.find_cell(row, result.after.axes) == cell]
        left = [row.score for row, _ in result.left_over if balance.find_cell(row, result.after.axes) == cell]
        assert min(taken) >= max(left)
    assert result.shortfalls == []
    assert result.after.effective_cells == pytest.approx(3.78, abs=0.01)


def test_cell_with_too_few_rows_stays_short_and_is_named(spec):
    rows = [row for row in make_rows(spec) if row.cell != {"family": "basic", "task": "question", "difficulty": "hard"}]
    result = balance.choose_rows(rows, spec, plan.count_quotas(spec))
    assert [(shortfall.cell, shortfall.planned, shortfall.rows) for shortfall in result.shortfalls] == [
        ({"task": "question", "difficulty": "hard"}, 5, 0)
    ]
    assert len({row.id for row in result.rows}) == len(result.rows) == 25


def test_split_holds_out_its_share_of_each_task_and_keeps_relatives_together(spec):
    rows = make_rows(spec)
    rows = [dataclasses.replace(row, provenance={"seed_row": f"seed:{number // 3}"}) for number, row in enumerate(rows)]
    parts = splitting.split_rows(rows, eval_fraction=0.2, seed=1)
    held_out = [row for row in rows if parts[row.id] == splitting.EVAL]
    assert 5 <= len(held_out) <= 9
    sides = {}
    for row in rows:
        sides.setdefault(row.provenance["seed_row"], set()).add(parts[row.id])
    assert all(len(names) == 1 for names in sides.values())
    plain = splitting.split_rows(make_rows(spec), eval_fraction=0.2, seed=1)
    tasks = Counter(row.cell["task"] for row in make_rows(spec) if plain[row.id] == splitting.EVAL)
    assert tasks == {"summary": 6, "question": 3}


@pytest.mark.parametrize(("multiple", "most_children", "expected"), [(2, 1, 45), (3, 2, 90), (1.2, 3, 9), (9, 9, 135)])
def test_children_stay_within_both_caps_and_methods_come_equally_often(multiple, most_children, expected, spec):
    section = dict(spec.sections["augmentation"]) | {"multiple": multiple, "max_children": most_children}
    spec = dataclasses.replace(spec, sections=dict(spec.sections) | {"augmentation": section})
    children = augmentation.plan_children(make_rows(spec), spec, templates.read_augmentations("en")[0])
    assert len(children) == expected
    parents = Counter(child.parent.id for child in children)
    assert max(parents.values()) <= most_children
    assert len({(child.parent.id, child.template.name) for child in children}) == expected
    methods = Counter(child.template.name for child in children)
    assert max(methods.values()) - min(methods.values()) <= most_children


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ("Give Anna 3 apples.", "Hand three apples to Anna.", []),
        ("Give Anna 3 apples.", "Hand 4 apples to Anna.", ["the number 3 is lost", "the number 4 is new"]),
        ("Give Anna 3 apples.", "Hand Maria 3 apples.", ["`Anna` is lost"]),
        ("It costs 1,000 dollars in Paris.", "In Paris the price is 1000 dollars.", []),
        ("Read `main.py` at https://a.b/c now.", "Now read `main.py`.", ["`https://a.b/c` is lost"]),
        ("从北京到上海有 1200 公里，坐 G1 次列车。", "坐 G1 次列车从北京去上海，路程 1200 公里。", []),
        ("从北京到上海有 1200 公里，坐 G1 次列车。", "坐 G2 次列车从北京去上海，路程 1200 公里。", ["`G1` is lost"]),
        ("convert the mp3 to wav", "please convert the mp4 to wav", ["`mp3` is lost"]),
        ("《红楼梦》有 120 回。", "一百二十回的《红楼梦》。", ["the number 120 is lost"]),
    ],
)
def test_paraphrase_keeps_numbers_names_and_quoted_texts(before, after, changes):
    assert kept_facts.find_changes(before, after) == changes
