"""Secrets are recognised by key, shape and URL, however they are spelt; they are in no byte of any output."""

import contextlib
import json
import time
from pathlib import Path

import pytest
from conftest import RECIPE

from trl_sft import cli, json_output, redaction, run_folder
from trl_sft.recipe import yaml_reader

HUGGING_FACE = "hf_Q7ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef"
OPENAI = "sk-proj-abcDEF0123456789abcdefGHIJ"
WANDB = "0123456789abcdef0123456789abcdef01234567"
GITHUB = "ghp_0123456789abcdefABCDEF0123456789abcd"
AWS, AWS_SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
SHAPES = (HUGGING_FACE, OPENAI, WANDB, GITHUB, AWS, JWT)

# name of a spelling -> lines of YAML, and the texts that must not be seen
SPELLINGS = {
    "plain": ("token: opensesame", ["opensesame"]),
    "double_quotes": ('token: "open \\"sesame\\""', ["sesame"]),
    "single_quotes": ("token: 'it''s open sesame'", ["open sesame", "it's"]),
    "escapes": ('token: "open\\x53esam\\u0065"', ["openSesame", "open\\x53"]),
    "escapes_in_the_key": ('"t\\x6fken": opensesame', ["opensesame"]),
    "folded": ("token: >-\n  opensesame\n  closebarley", ["opensesame", "closebarley"]),
    "block": ("token: |\n  opensesame\n  closebarley", ["opensesame", "closebarley"]),
    "quoted_over_lines": ("token: 'opensesame\n  closebarley'", ["opensesame", "closebarley"]),
    "continued": ('token: "opense\\\n  same"', ["opense"]),
    "plain_over_lines": ("token: opensesame\n  closebarley", ["opensesame", "closebarley"]),
    "shape_folded": (f"name: >-\n  {OPENAI[:20]}\n  {OPENAI[20:]}", [OPENAI[:20], OPENAI[20:]]),
    "shape_with_escapes": ('name: "hf_\\x51' + HUGGING_FACE[4:] + '"', [HUGGING_FACE[4:]]),
    "number": ("password: 90210777", ["90210777"]),
    "leading_zeros": ("password: 0090210777", ["90210777"]),
    "short": ("pwd: x7q", ["x7q"]),
    "list": ("api_keys: [opensesame, closebarley]", ["opensesame", "closebarley"]),
    "mapping": ("credentials: {a: opensesame, b: [closebarley]}", ["opensesame", "closebarley"]),
    "flow": ("x: {hub_token: opensesame, y: 1}", ["opensesame"]),
    "json": ('{"x": {"hub_token": "opensesame"}}', ["opensesame"]),
    "alias": ("x: &a opensesame\ntoken: *a", ["opensesame"]),
    "anchor": ("token: &a opensesame\nx: *a", ["opensesame"]),
    "comment": ("# hub_token: openSesame1\na: 1", ["openSesame1"]),
    "comment_behind": ("a: 1  # api_key=openSesame1", ["openSesame1"]),
    "comment_over_lines": (f"# {OPENAI[:22]}\n#   {OPENAI[22:]}\na: 1", [OPENAI[:22], OPENAI[22:]]),
    "misspelt": ("hub_tokn: opensesame", ["opensesame"]),
    "dashes": ("api-key: opensesame", ["opensesame"]),
    "capitals": ("HubToken: opensesame", ["opensesame"]),
    "lookalike": ("hub_tоken: opensesame", ["opensesame"]),
    "environment": ("hub_token: '${TOKEN}opensesame'", ["opensesame"]),
    "invalid_yaml": ("hub_token: openSesame1\n  a: [", ["openSesame1"]),
    "user_of_a_url": ("x: https://openSesame1@host/a", ["openSesame1"]),
    "password_of_a_url": ("x: s3://key:open@Sesame1@bucket/a", ["Sesame1"]),
    "argument_of_a_url": ("x: https://host/a?b=1&api_key=openSesame1&c=2", ["openSesame1"]),
    "signature_of_a_url": ("x: https://host/a?X-Amz-Signature=abcdef0123", ["abcdef0123"]),
    "carriage_returns": ("a: 1\r\ntoken: opensesame\r\nb: 2\r\n", ["opensesame"]),
    **{f"shape_{secret[:4]}": (f"name: {secret}  # {secret}", [secret]) for secret in SHAPES},
    **{f"key_{secret[:4]}": (f"? {secret}\n: 1", [secret]) for secret in SHAPES},
}

# spellings of which the list has a part of the secret alone, as its text writes it
PARTS = ("double_quotes", "single_quotes", "escapes", "shape_with_escapes", "environment", "password_of_a_url")


@pytest.mark.parametrize("name", SPELLINGS)
def test_secret_of_a_recipe_is_not_in_its_copy_and_the_rest_is(name):
    text, secrets = SPELLINGS[name]
    text = f"before: 17\n{text}\nafter: 18\n" if name != "json" else text
    faults = []
    redaction.register_text(text)
    yaml_reader._parse(text, (), yaml_reader._Record(str, {}, faults))
    masked = yaml_reader.mask_secrets(text)
    for secret in secrets:
        assert secret not in masked
        if name not in PARTS:
            assert secret not in redaction.redact(f"the value is {secret}.")
            assert secret not in yaml_reader.describe_value(f"{secret} {'x' * 100}")
    assert redaction.REDACTED in masked
    if name not in ("json", "invalid_yaml"):
        values = yaml_reader.parse_values(masked)
        assert (values["before"], values["after"]) == (17, 18)


NO_SECRETS = """\
model: {revision: 0123456789abcdef0123456789abcdef01234567, token: true}
tokenizer:
  eos_token: <|im_end|>
  pad_token: "<pad>"
  extra_special_tokens: {image_token: <image>}
  chat_template_kwargs: {max_tokens_shown: 4096}
data: {train: hf_datasets/rows.jsonl, special_tokens_in_text: text}  # token: see the vault
train: {include_num_input_tokens_seen: all, run_name: sk-learn-baseline, hub_model_id: me/hf_model}
evaluate: {generation: {max_new_tokens: 64}}
# the keys of `model:` and tokens of https://huggingface.co/docs?page=2 : 3
"""


def test_text_without_secrets_stays_as_it_is():
    redaction.register_text(NO_SECRETS)
    yaml_reader._parse(NO_SECRETS, (), yaml_reader._Record(str, {}, []))
    assert yaml_reader.mask_secrets(NO_SECRETS) == NO_SECRETS


@pytest.mark.parametrize(
    "key",
    "token hub_token hub_tokn hubToken HUB-TOKEN hub_tokens hbu_token api_key apikey api-kye wandb_api_key password "
    "pasword passwd db_password client_secret secret aws_secret_access_key access_key credentials authorization "
    "hf_token auth_token pwd".split(),
)
def test_key_of_a_secret_is_recognised(key):
    assert redaction.is_secret_name(key)


@pytest.mark.parametrize(
    "key",
    "tokenizer eos_token pad_token bos_token_id max_new_tokens path format key chosen taken_from report_to packing "
    "special_tokens_in_text average_tokens_across_devices secretary_problem image_token pass_at_k author "
    "paraphrase".split(),
)
def test_key_of_no_secret_is_not_hidden(key):
    assert not redaction.is_secret_name(key, "a word of text")


def test_json_stays_json_where_a_number_equals_a_secret():
    redaction.register("90210777")
    text = redaction.redact_json('{"rows": 90210777, "text": "say 90210777"}')
    assert json.loads(text) == {"rows": 90210777, "text": "say (left out)"}


def test_long_secret_that_a_message_cuts_is_hidden_too():
    redaction.register("correct-horse-battery-staple-and-more")
    assert "correct" not in redaction.redact("the value is correct-horse-batt... (text)")


@pytest.mark.parametrize(
    "secret", ["quote\"d'and\\slash", "<b>&amp;bold</b>", "two words 12", "per%cent+/=", "ключ123"]
)
def test_secret_is_hidden_in_every_quotation(secret):
    import html
    import shlex
    import urllib.parse

    redaction.register(secret)
    for text in (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret), html.escape(secret)):
        assert secret[:5] not in redaction.redact(text)
    for text in (shlex.quote(secret), urllib.parse.quote(secret), f"'{secret}'", yaml_reader.format_value([secret])):
        assert redaction.redact(text).strip("'\"[]") == redaction.REDACTED


def test_text_made_to_be_slow_is_read_in_time():
    began = time.perf_counter()
    for unit in ("sk-", "eyJ-", "x", "hub_token:", "a: b\n", "# sk-\n", "https://a?token=", "::=="):
        redaction.register_text(unit * (100_000 // len(unit)))
        redaction.redact(unit * (100_000 // len(unit)))
    assert time.perf_counter() - began < 20, "the time grows with the square of the length"


def test_user_file_keeps_its_secrets_where_it_is_asked_for(tmp_path):
    redaction.register("opensesame")
    run_folder.write_text(tmp_path / "a.yaml", "token: opensesame\n", keeps_secrets=True)
    run_folder.write_text(tmp_path / "b.yaml", "token: opensesame\n")
    assert (tmp_path / "a.yaml").read_text() == "token: opensesame\n"
    assert (tmp_path / "b.yaml").read_text() == "token: (left out)\n"


PLANTED = f"""\
# hub_token: {JWT} and {WANDB}; secret_key = {AWS_SECRET}
# over lines: {OPENAI[:22]}
#   {OPENAI[22:]}
model:
  name_or_path: trl_sft:tiny
  token: "model\\x53ecret1"
tokenizer: {{token: &token 'tokenizer secret
    of two lines'}}
data: {{train: {{path: rows.jsonl, token: *token}}}}
train:
  output_dir: out
  max_steps: 2
  save_steps: 1
  save_strategy: steps
  logging_steps: 1
  per_device_train_batch_size: 2
  run_name: {HUGGING_FACE}
  hub_token: >-
    foldedone
    foldedtwo
"""
SECRETS = [JWT, WANDB, AWS_SECRET, OPENAI[:22], OPENAI[22:], "modelSecret1", "tokenizer secret", "of two lines"]
SECRETS += [HUGGING_FACE, "foldedone", "foldedtwo", "model\\x53"]
COMMANDS = (["check", "--json"], ["explain"], ["explain", "--json"], ["preview", "--html", "page.html"])
COMMANDS += (["fix", "--fast", "--json"],)


def find_secrets(folder, secrets):
    """Return the files below a folder that hold a secret, each with the secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("recipe.yaml", "rows.jsonl")]
    return [(path.name, secret) for path in files for secret in secrets if secret.encode() in path.read_bytes()]


def test_secrets_of_a_recipe_are_in_no_file_and_on_no_screen(here, go, tmp_path_factory):
    import datasets

    code, out, err = go(PLANTED)
    assert code == 0, err
    assert len(find_secrets(here / "out", ["training"])) > 3, "files are read"
    (here / "out" / "recipe.yaml").rename(here / "out" / "copy.yaml")
    screens = out + err
    for command in COMMANDS:
        _, out, err = go(None, "train.output_dir=new", command=command)
        screens += out + err
    assert [secret for secret in SECRETS if secret in screens] == []
    assert find_secrets(here, SECRETS) == []
    assert find_secrets(Path(datasets.config.HF_DATASETS_CACHE), SECRETS) == []
    copy = yaml_reader.parse_values((here / "out" / "copy.yaml").read_text())
    assert copy["model"] == {"name_or_path": "trl_sft:tiny", "token": "(left out)"}
    assert copy["data"]["train"] == {"path": "rows.jsonl", "token": "(left out)"}
    assert copy["train"]["max_steps"] == 2


@pytest.mark.parametrize(
    "line",
    [
        *("hub_tokn: {}", "hub_token: [{}]", "hub_token: {{a: {}}}", "api-key: {}", "seed: {}", "max_steps: [{}]"),
        *("report_to: {{{}: 1}}", "{}: 1", "lr_scheduler_type: {}", "hub_token: '${{A}}{}'", "hub_token: {}\n  : ["),
        *(
            "deepspeed: https://{}@host/a",
            "optim: 'x?token={}'",
            "hub_token: !x {}",
            "hub_token: *{}",
            "output_dir: {}",
        ),
    ],
)
def test_secret_of_a_broken_recipe_is_on_no_screen(line, here, go):
    text = RECIPE.replace("  output_dir: out\n", f"  {line.format(HUGGING_FACE)}\n")
    for command in (["check", "--fast"], ["fix", "--fast"], ["explain"], ["explain", "train.seed"], []):
        for words in ([], ["--json"]) if command else ([],):
            if command or not line.startswith("output_dir"):
                _, out, err = go(text, "train.max_steps=0", *words, command=command)
                assert HUGGING_FACE[:14] not in out + err, (command, out, err)
    assert find_secrets(here, [HUGGING_FACE]) in ([], [("recipe.fixed.yaml", HUGGING_FACE)])


@pytest.mark.parametrize(
    "words",
    [
        ["train.hub_token=opensesame1"],
        ["train.hub_tokn=opensesame1"],
        ["hub_token=opensesame1"],
        ['train.hub_token="open\\x73esame1"'],
        ["train={hub_token: opensesame1}"],
        ["--hub_token", "opensesame1"],
        ["--hub-token=opensesame1"],
        ["train.hub_token=[opensesame1"],
        ["train.hub_token.=opensesame1"],
        ["=hub_token: opensesame1"],
        ["data.train=https://opensesame1@host/rows.jsonl"],
    ],
)
def test_secret_of_the_command_line_is_on_no_screen(words, here, capsys):
    (here / "recipe.yaml").write_text(RECIPE)
    for command in (["check", "--fast"], ["explain"], ["fix", "--fast"]):
        for flags in ([], ["--json"]):
            with contextlib.suppress(SystemExit):  # argparse
                cli.main([*command, "recipe.yaml", *words, *flags])
            out, err = capsys.readouterr()
            assert "opensesame1" not in out + err, (command, out, err)


def test_run_resumes_although_its_record_holds_no_secret(here, go):
    words = ["train.save_strategy=steps", "train.save_steps=1", f"train.run_name={HUGGING_FACE}"]
    assert go(RECIPE, *words, "run.max_hours=1e-9")[0] == 75
    assert "(left out)" in (here / "out" / "checkpoint-1" / "trl_sft.json").read_text()
    code, out, err = go(RECIPE, *words)
    assert code == 0, err
    assert "checkpoint-1" in out
    assert find_secrets(here / "out", [HUGGING_FACE]) == []


def test_answer_as_json_holds_no_secret():
    redaction.register("opensesame")
    answer = json_output.Answer("check", {"a": {"opensesame": ["x opensesame y", Path("opensesame/b")]}})
    assert "opensesame" not in json_output.format_answer(answer)
