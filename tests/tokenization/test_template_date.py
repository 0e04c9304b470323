"""A template that writes the date: found by trial, and pinned for transformers, TRL and this package alike."""

import datetime

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from trl_sft.recipe import paths
from trl_sft.tokenization import template_date

DAY = datetime.date(2024, 2, 29)
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
LLAMA = (
    "{% if not date_string is defined %}"
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ 'Today Date: ' + date_string + '\n' }}"
)
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def tokenizer():
    """Return the tokenizer of the toy model."""
    return AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")


@pytest.fixture(autouse=True)
def unpinned():
    """Restore the clock of templates after each test."""
    with template_date.restored():
        yield


def render(tokenizer, prefix, **kwargs):
    tokenizer.chat_template = prefix + CHATML
    return tokenizer.apply_chat_template(CHAT, tokenize=False, **kwargs)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-02-29"),
        ("{{ strftime_now('%A, %d %B %Y') }}", "Thursday, 29 February 2024"),
        ("{{ strftime_now('%H:%M') }}", "00:00"),
        ("{% set day = strftime_now('%d %b %Y') %}{{ day }}", "29 Feb 2024"),
        (LLAMA, "Today Date: 29 Feb 2024"),
    ],
)
def test_pinned_day_is_what_transformers_renders(prefix, expected, tokenizer):
    template_date.pin(DAY)
    assert render(tokenizer, prefix).startswith(expected)


def test_clock_is_back_after_the_block_and_after_unpinning(tokenizer):
    today = f"{datetime.date.today():%Y-%m-%d}"
    with template_date.restored():
        template_date.pin(DAY)
    assert render(tokenizer, "{{ strftime_now('%Y-%m-%d') }}").startswith(today)
    template_date.pin(DAY)
    template_date.pin(None)
    assert chat_template_utils.datetime is datetime.datetime


@pytest.mark.parametrize(
    ("prefix", "kwargs", "expected"),
    [
        ("{{ strftime_now('%Y') }}", {}, True),
        ("{{ strftime_now('%M') }}", {}, True),
        (LLAMA, {}, True),
        (LLAMA, {"date_string": "1 Jan 2025"}, False),
        ("", {}, False),
        ("{# strftime_now is not called #}", {}, False),
        ("{% if false %}{{ strftime_now('%Y') }}{% endif %}", {}, False),
        ("{% if tools %}{{ strftime_now('%Y') }}{% endif %}", {}, True),
        ("{% if add_generation_prompt %}{{ strftime_now('%Y') }}{% endif %}", {}, True),
    ],
)
def test_template_that_writes_a_date_is_found_by_what_it_renders(prefix, kwargs, expected, tokenizer):
    tokenizer.chat_template = prefix + CHATML
    before = chat_template_utils.datetime
    assert template_date.writes_date(tokenizer, kwargs) is expected
    assert chat_template_utils.datetime is before


def test_line_names_the_keyword_that_chooses_the_date_where_the_template_reads_one(tokenizer):
    tokenizer.chat_template = LLAMA + CHATML
    line = template_date.describe(tokenizer, DAY, is_earlier=False)
    assert "2024-02-29" in line
    assert "tokenizer.chat_template_kwargs: {date_string: '29 Feb 2024'}" in line
    tokenizer.chat_template = CHATML
    assert "date_string" not in template_date.describe(tokenizer, DAY, is_earlier=True)
