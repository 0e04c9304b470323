"""A spec is read as strictly as a recipe: each wrong key, value and file is a fault with its line and what to write."""

import jsonschema
import pytest
import yaml

from trl_sft.building import spec as building_spec
from trl_sft.building import templates
from trl_sft.cli.schema import spec_schema
from trl_sft.errors import RecipeError

SHIPPED = sorted((templates.FOLDER.parent / "specs").glob("*.yaml"))
SPEC = """\
plan: {rows: 10}
seeds: {topics: [rivers, bread]}
generator: {endpoint: http://127.0.0.1:1/v1, model: m}
"""


def load(text, here, *overrides):
    (here / "spec.yaml").write_text(text, encoding="utf-8")
    return building_spec.load_spec("spec.yaml", overrides)


def read_faults(text, here):
    with pytest.raises(RecipeError) as error:
        load(text, here)
    return [(fault.where.partition(" ")[0], fault.code, fault.fix) for fault in error.value.faults]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs_have_no_fault_and_fit_the_schema(path):
    spec = building_spec.load_spec(path)
    assert {value.name for value in spec.axes["family"]} == {"basic", "multi_turn", "task", "chain_of_thought"}
    assert set(spec.axes) == {"family", "task", "domain", "difficulty", "style"}
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), spec_schema.build())


def test_all_faults_of_a_spec_come_at_once_in_the_order_of_their_lines(here):
    text = """\
plan: {rows: 0, langauge: en}
seeds:
  topics: {sceince: [a], cooking: []}
  rows: gone.jsonl
axes:
  domain: [science, cooking]
  topic: [x]
  style: {short: -1}
templates: {families: {basik: 1}}
generator: {endpoint: 127.0.0.1, temperature: hot}
budget: {calls: 0, money: .inf}
balance: {by: [tone], min_score: 9}
outptu: {}
"""
    faults = read_faults(text, here)
    assert [(place, code) for place, code, _ in faults] == [
        ("spec.yaml:1", "recipe.unknown_key"),
        ("spec.yaml:1", "recipe.out_of_range"),
        ("spec.yaml:3", "build.unknown_domain"),
        ("spec.yaml:3", "build.unknown_domain"),
        ("spec.yaml:4", "recipe.missing_file"),
        ("spec.yaml:7", "build.bad_axis"),
        ("spec.yaml:8", "recipe.out_of_range"),
        ("spec.yaml:9", "build.unknown_family"),
        ("spec.yaml:10", "recipe.wrong_type"),
        ("spec.yaml:10", "recipe.needs_key"),
        ("spec.yaml:10", "recipe.wrong_type"),
        ("spec.yaml:11", "recipe.out_of_range"),
        ("spec.yaml:11", "recipe.out_of_range"),
        ("spec.yaml:11", "recipe.needs_key"),
        ("spec.yaml:12", "recipe.out_of_range"),
        ("spec.yaml:12", "build.bad_axis"),
        ("spec.yaml:12", "recipe.needs_key"),
        ("spec.yaml:13", "recipe.unknown_section"),
    ]
    fixes = "\n".join(fix for _, _, fix in faults)
    for expected in ("`language`", "`science`", "`basic`", "http://127.0.0.1:8000/v1", "`output`", "number above 0"):
        assert expected in fixes


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "recipe.empty"),
        ("- a\n", "recipe.not_a_mapping"),
        (SPEC.replace("topics: [rivers, bread]", ""), "build.no_seeds"),
        (SPEC + "budget: {money: 3}\n", "recipe.needs_key"),
        (SPEC + "judge: {endpoint: http://127.0.0.1:1/v1, model: m}\n", "build.judge_is_generator"),
        (SPEC + "judge: {model: other}\n", "recipe.needs_key"),
        (SPEC + "augmentation: {methods: [parafrase]}\n", "recipe.wrong_type"),
        (SPEC + "axes: {a: [x, x]}\n", "build.bad_axis"),
        (SPEC + "balance: {by: family}\n", "recipe.wrong_type"),
        (SPEC + "axes: {task: question}\n", "build.bad_axis"),
        (SPEC.replace("model: m", "model: m, options: {messages: []}"), "recipe.refused_key"),
    ],
)
def test_spec_that_cannot_be_built_is_refused(text, code, here):
    assert [found for _, found, _ in read_faults(text, here)] == [code]


def test_seed_rows_are_read_in_the_formats_of_recipes_with_the_known_answer(here):
    lines = [
        '{"question": "2+2?", "answer": "It is four.\\n#### 4"}',
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}',
        '{"instruction": "Add", "input": "1 and 2", "output": "3", "key": "3"}',
    ]
    (here / "seeds.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = load(SPEC.replace("topics: [rivers, bread]", "rows: seeds.jsonl"), here).seed_rows
    assert [(row.id, row.instruction, row.key) for row in rows] == [
        ("seed:1", "2+2?", "It is four.\n#### 4"),
        ("seed:2", "Hi", ""),
        ("seed:3", "Add\n\n1 and 2", "3"),
    ]


def test_faulty_seed_row_is_named_by_its_line(here):
    (here / "seeds.jsonl").write_text('{"question": "a", "answer": "b"}\n{"nothing": 1}\nno json\n', encoding="utf-8")
    faults = read_faults(SPEC.replace("topics: [rivers, bread]", "rows: seeds.jsonl"), here)
    assert [(place, code) for place, code, _ in faults] == [
        ("seeds.jsonl:2", "data.unknown_format_name"),
        ("seeds.jsonl:3", "data.invalid_json"),
    ]


TEMPLATE = """\
language: en
family: basic
templates:
  mine:
    needs: topic
    turns:
      - {role: user, write: "Ask about {topic} in a {mood} mood. {\\"a\\": 1} stays."}
      - {role: assistant, system: "Answer."}
"""


def test_own_templates_replace_those_of_their_family(here):
    (here / "mine.yaml").write_text(TEMPLATE, encoding="utf-8")
    text = SPEC + "axes: {mood: [good]}\ntemplates: {families: [basic, task], files: [mine.yaml]}\n"
    spec = load(text, here)
    assert {(template.family, template.name) for template in spec.templates} == {
        ("basic", "mine"),
        ("task", "task_from_topic"),
    }


@pytest.mark.parametrize(
    ("change", "code", "place"),
    [
        (("{mood}", "{mod}"), "build.unknown_placeholder", "mine.yaml:7"),
        (("{role: assistant, system: ", "{role: user, write: "), "build.template_turns", "mine.yaml:6"),
        (("role: user, write", "role: user, wirte"), "recipe.unknown_key", "mine.yaml:7"),
        (("family: basic", "family: basics"), "recipe.wrong_type", "mine.yaml:2"),
        (("language: en", "language: zh"), "recipe.contradiction", "mine.yaml:1"),
    ],
)
def test_fault_of_a_file_of_templates_has_its_line(change, code, place, here):
    (here / "mine.yaml").write_text(TEMPLATE.replace(*change), encoding="utf-8")
    faults = read_faults(SPEC + "axes: {mood: [good]}\ntemplates: {families: [basic], files: [mine.yaml]}\n", here)
    assert (place, code) in [(where, found) for where, found, _ in faults]


SECTIONS = (
    *("axes: {größe: [klein, groß]}", "axes: {family: [a]}", "axes: {a b: [x]}", "axes: {9a: [x]}", "axes: {x: []}"),
    *(
        "axes: {x: [a, a]}",
        "axes: {x: {a: -1}}",
        "axes: {x: {a: {share: 2, description: d}}}",
        "axes: {x: {a: {s: 1}}}",
    ),
    *("templates: {families: [basic]}", "templates: {families: [basik]}", "templates: {families: {task: 2}}"),
    *("templates: {families: {task: -2}}", "templates: {families: {tusk: 1}}", "budget: {calls: 0}", "budget: {}"),
    *("budget: {calls: 1.5}", "gates: {novelty: 1}", "gates: null", "judge: {model: 3}", "output: {format: csv}"),
    *("output: {eval_fraction: 0.9}", "output: {eval_fraction: 1}", "augmentation: {methods: [easy]}", "balance: []"),
    *("augmentation: {multiple: 1}", "augmentation: {multiple: 0.9}", "outputs: {}"),
)


@pytest.mark.parametrize("section", SECTIONS)
def test_schema_accepts_what_the_reader_accepts_and_nothing_else(section, here):
    text = f"{SPEC}{section}\n"
    try:
        load(text, here)
        is_accepted = True
    except RecipeError:
        is_accepted = False
    schema = spec_schema.build()
    assert jsonschema.Draft202012Validator(schema).is_valid(yaml.safe_load(text)) == is_accepted
