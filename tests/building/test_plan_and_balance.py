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


def test_floor_of_each_cell_is_met_before_quotas_are(spec):
    rows = make_rows(spec, scores=(3.0, 5.0, 4.0, 2.0))
    spec = dataclasses.replace(spec, sections={**spec.sections, "balance": {**spec.sections["balance"], "min_rows": 7}})
    result = balance.choose_rows(rows, spec, plan.count_quotas(spec))
    assert sum(result.after.counts.values()) == len({row.id for row in result.rows}) == 30
    assert {cell: count >= 7 for cell, count in result.after.counts.items()} == dict.fromkeys(result.after.counts, True)
    assert result.shortfalls == [
        balance.CellShortfall({"task": "summary", "difficulty": name}, 10, count)
        for name, count in (("easy", 7), ("hard", 9))
    ]


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
        ("Give Anna 3 apples.", "Hand Maria 3 apples.", ["`Anna` is lost", "`Maria` is new"]),
        ("It costs 1,000 dollars in Paris.", "In Paris the price is 1000 dollars.", []),
        ("Read `main.py` at https://a.b/c now.", "Now read `main.py`.", ["`https://a.b/c` is lost"]),
        ("从北京到上海有 1200 公里，坐 G1 次列车。", "坐 G1 次列车从北京去上海，路程 1200 公里。", []),
        ("从北京到上海有 1200 公里，坐 G1 次列车。", "坐 G2 次列车从北京去上海，路程 1200 公里。", ["`G1` is lost"]),
        ("convert the mp3 to wav", "please convert the mp4 to wav", ["`mp3` is lost"]),
        ("《红楼梦》有 120 回。", "一百二十回的《红楼梦》。", []),
    ],
)
def test_paraphrase_keeps_numbers_names_and_quoted_texts(before, after, changes):
    assert kept_facts.find_changes(before, after) == changes


KEPT = [
    ("Tom has 1,000 apples.", "How many apples? Tom has 1000 of them."),
    ("It rose by 50%.", "The rise was 50 percent."),
    ("It rose by 50 per cent.", "It went up 50%."),
    ("小明有三个苹果。", "小明有3个苹果。"),
    ("一共有12个。", "总共有十二个。"),
    ("增加了百分之五十。", "增加了50%。"),
    ("He paid $5.50.", "The price was 5.50 dollars."),
    ("In 1999 it began.", "It began in 1999."),
    ("Twenty-one people came.", "21 people came."),
    ("A dozen eggs cost 3 euros.", "12 eggs cost three euros."),
    ("Why is it not possible to fly?", "Why is it impossible to fly?"),
    ("Do not touch it.", "Avoid touching it."),
    ("What is 3.50 + 2?", "Compute 3.5 + 2."),
    ("On 2024-11-26 we met.", "We met on November 26, 2024."),
    ("Explain why it never rains there.", "Explain why there is no rain there."),
    ("Who was Ludwig van Beethoven?", "Tell me about Ludwig van Beethoven."),
    ("解释为什么不能吃。", "说明为何不可以吃。"),
    ("Tom has five dogs.", "Five dogs belong to Tom."),
    ("How do I not forget names?", "How can I remember names without forgetting?"),
    ("两个苹果", "2个苹果"),
    ("三千人", "3000人"),
    ("一百二十元", "120元"),
    ("three hundred people", "300 people"),
    ("Two thirds of 9", "2/3 of 9"),
    ("half of 10", "1/2 of 10"),
    ("O'Brien won.", "It was O’Brien who won."),
    ("He ran 5km.", "He ran 5 km."),
    ("He ran 5 km", "He ran a distance of 5km"),
    ("Is it 10°C?", "Is it 10 °C?"),
    ("Write about Paris in spring.", "Describe Paris in the spring."),
    ("请写一句话。", "请写一个句子。"),
    ("What are the first three steps?", "Name the first 3 steps."),
    ("Why do one's eyes hurt?", "Why do eyes hurt?"),
]  # fmt: skip
CHANGED = [
    ("Tom has 5 apples.", "Tom has 6 apples."),
    ("Tom has 5 apples.", "Anna has 5 apples."),
    ("Explain why cats do not like water.", "Explain why cats like water."),
    ("Explain why cats like water.", "Explain why cats do not like water."),
    ("Who was Ludwig van Beethoven?", "Who was Ludwig Mozart?"),
    ("它不能飞。", "它能飞。"),
    ("小明有三个苹果。", "小明有四个苹果。"),
    ("It costs 1,000 euros.", "It costs 10,000 euros."),
    ("Rose by 50%.", "Rose by 50."),
    ("The year 1999.", "The year 1998."),
    ("Visit Paris, then Rome.", "Visit Paris, then Berlin."),
    ("Write to a@b.org.", "Write to c@b.org."),
    ("Use `x = 1`.", "Use `x = 2`."),
    ("Three dogs ran.", "Four dogs ran."),
    ("He is never late.", "He is late."),
    ("twenty-one", "22"),
    ("Sarah and Tom sold cakes.", "Sarah and Ben sold cakes."),
    ("Write a poem about cats.", "Write a poem about cats in London."),
    ("-5 degrees", "5 degrees"),
    ("What is 7 - 5?", "What is 5 - 7?"),
    ("Anna's dog has 2 puppies.", "Maria's dog has 2 puppies."),
    ("百分之五十", "百分之六十"),
    ("on 2024-11-26", "on 2024-11-27"),
    ("at 08:15", "at 08:45"),
    ("version 1.2.3", "version 1.2.4"),
    ("Without sugar, how do I bake?", "With sugar, how do I bake?"),
]  # fmt: skip


def test_numbers_names_and_negations_are_compared_however_they_are_written():
    assert {pair: found for pair in KEPT if (found := kept_facts.find_changes(*pair))} == {}
    assert [pair for pair in CHANGED if not kept_facts.find_changes(*pair)] == []
    assert [text for text, _ in (*KEPT, *CHANGED) if kept_facts.find_changes(text, text)] == []


def test_numbers_of_a_list_that_becomes_a_table_are_not_lost():
    before = "1. Mix 200 g of flour.\n2. Bake it for twenty-five minutes."
    assert kept_facts.find_changes(before, "| step | |\n| mix | 200 g |\n| bake | 25 min |", names=False) == []
    assert kept_facts.find_changes(before, "- Mix.\n- Bake: 25 min", names=False) == ["the number 200 is lost"]
