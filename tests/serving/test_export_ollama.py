"""Ollama's templates render what chat templates render, or the model is refused with the first difference."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from trl_sft.data.formats import CHAT, PAIRS
from trl_sft.errors import TemplateError
from trl_sft.recipe import paths
from trl_sft.serving.export import go_template, ollama_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
# a system prompt of its own where there is none, as Qwen2.5
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are here.<|im_end|>\n{% endif %}" + CHATML
)
# the system prompt in the first turn of the user, as Llama 2; BOS before each turn of the user
IN_USER = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "<s>[INST] {{ (s if loop.first and s else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
# thoughts of the generation prompt alone, as Qwen3 without thinking
THINKS = CHATML[:-1] + "\n<think>\n\n</think>\n\n"
TRIMS = CHATML.replace("m['content']", "m['content'] | trim")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
BRACES = (
    "{{ '{' }}{% for m in messages %}{{ m['role'] }}{{ '{{\u3000' }}{{ m['content'] }}\"\"\" {% endfor %}{{ '}}{{ x' }}"
)
# text that depends on the content, which no template of ours does
SHOUTS = CHATML.replace("m['content'] }}", "m['content'] }}{% if m['content'] | length > 20 %}!{% endif %}")
COUNTS = "{% for m in messages %}{{ loop.index }}. {{ m['content'] }}\n{% endfor %}"


def build(template, bos="", samples=()):
    """Return the template of Ollama for a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")
    tokenizer.chat_template = template
    renderer = SimpleNamespace(row_type=CHAT, encoder=SimpleNamespace(tokenizer=tokenizer))
    return ollama_template.build(renderer, {}, list(samples), bos=bos, where="the run"), tokenizer


@pytest.mark.parametrize(
    ("template", "bos", "chats", "note"),
    [
        (CHATML, "", 60, ""),
        (DEFAULT_SYSTEM, "", 60, ""),
        (IN_USER, "<s>", 60, ""),
        (THINKS, "", 60, ""),
        (BRACES, "", 60, ""),
        (TRIMS, "", 60, "white space around a message stays"),
        (NO_SYSTEM, "", 20, "system prompts are left out"),
    ],
    ids=["ChatML", "default system", "system in user", "thinks", "braces", "trims", "no system"],
)
def test_template_of_ollama_renders_what_the_chat_template_does(template, bos, chats, note):
    ours, tokenizer = build(template, bos)
    assert ours.chats == chats
    assert note in " ".join(ours.notes)
    assert all(go_template.is_printable(letter) for letter in ours.text)
    assert '"""' not in ours.text
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "{{ . }}"},
        {"role": "user", "content": "Bye"},
    ]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert bos + go_template.render(ours.text, chat) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (SHOUTS, "at character .*, it writes .* and not '.*!"),
        (COUNTS, "cannot render"),
        ("{{ messages | length }}", "does not write the turn of the user once"),
    ],
)
def test_chat_template_that_ollama_cannot_render_is_refused_with_the_first_difference(template, words):
    with pytest.raises(TemplateError, match=words):
        build(template)


def test_prompts_of_the_run_are_compared_too():
    shouts = CHATML.replace("m['content'] }}", "m['content'] }}{{ '!' if 'Paris' in m['content'] else '' }}")
    assert build(shouts)[0].chats == 60
    with pytest.raises(TemplateError, match="of a chat of user, at character"):
        build(shouts, samples=[[{"role": "user", "content": "Where is Paris?"}]])


def test_wording_becomes_a_template_of_one_turn():
    tokenizer = AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")

    def render(text):
        return SimpleNamespace(ids=tokenizer(f"### Instruction:\n{text}\n\n### Response:\n")["input_ids"])

    renderer = SimpleNamespace(row_type=PAIRS, encoder=SimpleNamespace(tokenizer=tokenizer), render=render)
    ours = ollama_template.build(renderer, {}, [], bos="", where="the run")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert go_template.render(ours.text, chat) == "### Instruction:\nc\n\n### Response:\n"
    assert "stands alone" in ours.notes[0]


def test_messages_of_one_role_in_a_row_are_one_message_as_in_ollama():
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert go_template.render("{{ range $i, $m := .Messages }}[{{ $m.Content }}]{{ end }}", chat) == "[a\n\nb]"


@pytest.mark.parametrize(
    "template",
    ["{{ .Prompt }}", "{{- .System }}", "{{ if .System }}x", "x{{ end }}", "{{ printf .System }}", "{{ .Sys"],
)
def test_what_our_templates_do_not_use_is_no_part_of_the_interpreter(template):
    with pytest.raises(ValueError, match=r"the action|without its"):
        go_template.render(template, [{"role": "user", "content": "a"}])
