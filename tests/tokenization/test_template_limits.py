"""A chat template that would hang or fill the memory is refused within seconds."""

import re
import signal
import time

import pytest
from conftest import RECIPE, jsonl
from transformers import AutoTokenizer

from trl_sft.errors import TemplateError
from trl_sft.recipe import paths
from trl_sft.tokenization import template_limits

TURNS = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# what it does -> template, word of the message
HOSTILE = {
    "nested loops": (LOOPS + TURNS, "processor time"),
    "loop in a macro": ("{% macro f(n) %}" + LOOPS + "{% endmacro %}{{ f(1) }}" + TURNS, "processor time"),
    "loop for tools alone": ("{% if tools %}" + LOOPS + "{% endif %}" + TURNS, "processor time"),
    "loop for the generation prompt alone": (
        TURNS + "{% if add_generation_prompt %}" + LOOPS + "{% endif %}",
        "processor",
    ),
    "loop after a tool's answer": (
        "{% for m in messages if m.role == 'tool' %}" + LOOPS + "{% endfor %}" + TURNS,
        "processor",
    ),
    "power": ("{% set x = 10 ** (10 ** 8) %}" + TURNS, "processor time"),
    "wide format": ("{{ '%1000000000d' % 1 }}" + TURNS, "of memory|processor time"),
    "repeated text": ("{{ 'a' * 4000000000 }}" + TURNS, "of memory"),
    "list that doubles": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}" + TURNS,
        "of memory|processor time",
    ),
    "long text": ("{{ 'a' * 3000000 }}" + TURNS, "1,000,000 characters"),
}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")


@pytest.fixture
def limits(monkeypatch):
    """Lower the limit of time, so that the tests are quick."""
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 1)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused(tokenizer, limits, name):
    tokenizer.chat_template, word = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(TemplateError, match=word):
        template_limits.check_limits("here", tokenizer, {})
    assert time.monotonic() - began < 30  # and not an hour


def test_hostile_template_of_named_ones_is_refused(tokenizer, limits):
    tokenizer.chat_template = {"default": TURNS, "tool_use": LOOPS + TURNS}
    with pytest.raises(TemplateError, match="processor time"):
        template_limits.check_limits("here", tokenizer, {})


@pytest.mark.parametrize("template", [TURNS, "{{ raise_exception('no') }}", "{% for %}", "{{ undefined.x }}", ""])
def test_template_within_the_limits_is_left_to_the_next_check(tokenizer, template):
    tokenizer.chat_template = template
    template_limits.check_limits("here", tokenizer, {})


# what only certain rows start -> template, word of the message
OF_CERTAIN_ROWS = {
    "loops": ("{% if messages | length > 4 %}" + LOOPS + "{% endif %}" + TURNS, "of processor time to render one chat"),
    "loops in the prompt of one": (
        TURNS + "{% if add_generation_prompt and messages | length > 4 %}" + LOOPS + "{% endif %}",
        "of processor time to render one chat",
    ),
    "long text": (
        "{% if messages | length > 4 %}{{ 'ab ' * 500000 }}{% endif %}" + TURNS,
        r"writes 1,500,\d+ characters for a chat of",
    ),
}


@pytest.mark.parametrize("name", OF_CERTAIN_ROWS)
def test_template_that_hangs_on_certain_rows_is_refused(go, here, limits, name):
    (here / "t.jinja").write_text(OF_CERTAIN_ROWS[name][0])
    turns = [{"role": role, "content": f"Row {n}?"} for n in range(3) for role in ("user", "assistant")]
    jsonl(here / "rows.jsonl", [{"messages": turns[:2]}, {"messages": turns}])
    code, _, err = go(RECIPE + "tokenizer: {chat_template: ./t.jinja}\n", command=["preview"])
    assert code == 2
    assert re.search(OF_CERTAIN_ROWS[name][1], err), err
    assert "tokenizer.chat_template\n" in err
    assert "which begins with 'Row 0?'" in err
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL


@pytest.mark.parametrize("command", ["check", "preview", "prepare"])
@pytest.mark.parametrize("place", ["recipe", "model"])
def test_each_command_refuses_a_hostile_template(go, here, limits, command, place):
    import shutil

    text = RECIPE + "tokenizer: {chat_template: ./t.jinja}\n"
    (here / "t.jinja").write_text(HOSTILE["nested loops"][0])
    if place == "model":
        shutil.copytree(paths.EMBEDDED / "tiny", here / "model")
        shutil.copy(here / "t.jinja", here / "model/chat_template.jinja")
        text = RECIPE.replace("trl_sft:tiny", "./model")
    code, _, err = go(text, command=[command])
    assert code == 2
    assert "processor time" in err
