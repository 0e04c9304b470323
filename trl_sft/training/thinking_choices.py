"""Settings that change how answers begin under a template for thoughts, each tried on the first rows of a run.

Inputs: a checked recipe, and the stage that reads rows. Outputs: for each setting what training would do with these
rows: refuse them, or train answers that begin in one way or in several. Nothing is a rule about models: the settings
come from the template's own variables and from TRL's table of training templates, and each is measured. Not here: what
a thought is (`tokenization.thinking`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from trl.chat_template_utils import get_training_chat_template

from trl_sft.data import bad_rows
from trl_sft.data.formats import CHAT
from trl_sft.data.rows import RunRows
from trl_sft.errors import UserError, first_line
from trl_sft.recipe import build as recipe_build
from trl_sft.recipe import paths, rules
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import Key
from trl_sft.tokenization import build, cache, ledger, prompt_tokens, thinking
from trl_sft.tokenization.tokenizer import ChatTokenizer

_ROWS = 200  # of each source, from its beginning, that a setting is tried on
_CODE = "template."  # begins the codes of faults that another setting may change

_KWARGS: Key = ("tokenizer", "chat_template_kwargs")
_LOSS_ON: Key = ("data", "loss_on")

# run, rows of each source -> settings, tokenizer and rows, as `stages.read_rows` returns them
ReadRows = Callable[[Run, int], tuple[Any, ChatTokenizer, RunRows]]


class ThinkingChoice(NamedTuple):
    """Settings that are tried together: keys of the recipe and their values."""

    settings: tuple[tuple[Key, Any], ...]

    @property
    def title(self) -> str:
        """The settings as a recipe has them."""
        return " with ".join(f"{'.'.join(map(str, key))}: {_write(value)}" for key, value in self.settings)

    @property
    def overrides(self) -> list[str]:
        """The settings as the command line has them."""
        return [f"{'.'.join(map(str, key))}={_write(value)}" for key, value in self.settings]


class Trial(NamedTuple):
    """What training does with the first rows under a setting.

    Attributes:
        choice: the setting; None = the recipe as it is.
        problem: why the rows are refused; "" = they are trained.
        answers: how many answers with loss begin in each of `thinking.BEGINNINGS`.
        generation_prompt: what inference begins with; "" = unknown.
        num_mismatches: rows of which inference makes another prompt.

    """

    choice: ThinkingChoice | None
    problem: str = ""
    answers: dict[str, int] = {}  # noqa: RUF012
    generation_prompt: str = ""
    num_mismatches: int = 0

    @property
    def num_beginnings(self) -> int:
        """The number of ways in which answers begin."""
        return thinking.count_beginnings(self.answers)

    def describe(self) -> str:
        """Return the result in words."""
        if self.problem:
            return f"refused: {self.problem}"
        counts = ", ".join(f"{number:,} {thinking.WORDS[kind]}" for kind, number in self.answers.items() if number)
        prompts = "the prompt of inference is the beginning of what is trained"
        if self.num_mismatches:
            prompts = f"in {self.num_mismatches:,} rows inference makes another prompt"
        return f"answers begin: {counts}; inference begins with {self.generation_prompt!r}; {prompts}"


def list_choices(run: Run, chat: ChatTokenizer, rows: RunRows) -> list[ThinkingChoice]:
    """Return the settings that could change how answers begin and that the recipe does not have.

    Args:
        run: the checked recipe.
        chat: its tokenizer.
        rows: its rows.

    """
    tokenizer, kwargs = chat.tokenizer, run.chat_template_kwargs
    if rows.row_type != CHAT or thinking.find_thought_marks(tokenizer, kwargs) is None:
        return []
    settings: list[tuple[Key, Any]] = []
    if name := find_training_template(chat):
        settings.append((("tokenizer", "chat_template"), name))
    for variable, values in thinking.find_switches(tokenizer, kwargs).items():
        settings += [(_KWARGS, {**kwargs, variable: value}) for value in values]
    if rows.loss_on == "assistant":
        settings.append((_LOSS_ON, "last_turn"))
    return [ThinkingChoice((setting,)) for setting in settings]


def find_training_template(chat: ChatTokenizer) -> str:
    """Return the name of TRL's training template for this tokenizer's own template; "" = TRL has none."""
    source = None
    with contextlib.suppress(Exception):  # TRL raises ValueError for a template that it does not know
        source = get_training_chat_template(chat.tokenizer)
    if source is None:
        return ""
    files = paths.list_templates().items()
    return next((name for name, file in files if file.read_text(encoding="utf-8") == source), "")


def try_choices(run: Run, read_rows: ReadRows) -> list[Trial]:
    """Return what training does with the first rows: under the recipe as it is, and under each setting.

    Args:
        run: the checked recipe.
        read_rows: reads the first rows of a run.

    """
    settings, chat, rows = read_rows(run, _ROWS)
    if not (choices := list_choices(run, chat, rows)):
        return []
    trials = [_measure(run, None, settings.args, chat=chat, rows=rows)]
    if trials[0].answers.get(thinking.EMPTY) and rows.loss_on != "all":
        choices.append(ThinkingChoice(((_LOSS_ON, [rows.loss_on, rules.WITHOUT_EMPTY_THOUGHTS]),)))
    trials += [_try_choice(run, choice, read_rows) for choice in choices]
    # a switch that is refused alone may do with another template or with the last answer
    refused = [trial.choice for trial in trials[1:] if trial.problem and trial.choice]
    switches = [choice for choice in refused if choice.settings[0][0] == _KWARGS]
    others = [choice for choice in choices if choice.settings[0][0] != _KWARGS]
    pairs = [ThinkingChoice(switch.settings + other.settings) for switch in switches for other in others]
    return trials + [trial for pair in pairs if not (trial := _try_choice(run, pair, read_rows)).problem]


def load_choice(run: Run, choice: ThinkingChoice) -> Run:
    """Return the recipe with a setting. Raises RecipeError."""
    return recipe_build.load_run(run.recipe.path, [*run.recipe.arguments[1:], *choice.overrides])


def advise(run: Run, read_rows: ReadRows) -> Iterator[tuple[str, str]]:
    """Yield lines for the screen: each setting under which answers begin in fewer ways than now."""
    trials = try_choices(run, read_rows)
    for trial in trials[1:]:
        if trial.choice and not trial.problem and 0 < trial.num_beginnings < trials[0].num_beginnings:
            yield "advice", f"with `{trial.choice.title}` {trial.describe()}"


def _try_choice(run: Run, choice: ThinkingChoice, read_rows: ReadRows) -> Trial:
    """Return what training does with the first rows under a setting."""
    try:
        changed = load_choice(run, choice)
        settings, chat, rows = read_rows(changed, _ROWS)
        return _measure(changed, choice, settings.args, chat=chat, rows=rows)
    except UserError as error:
        return Trial(choice, error.faults[0].problem)
    except Exception as error:  # a template raises what it likes for a value that it does not expect
        return Trial(choice, first_line(error))


def _measure(run: Run, choice: ThinkingChoice | None, args: Any, *, chat: ChatTokenizer, rows: RunRows) -> Trial:
    """Return what training does with rows that are read."""
    encoder = build.make_encoder(run, chat, rows, args=args)
    tokens = cache.encode_in_memory(rows.train, encoder, title="Trying settings", check_all=True)
    kinds = bad_rows.join([rows.train.bad_rows, tokens.bad_rows or {}])
    problem = next((kind.bad_row.problem for kind in kinds.values() if kind.bad_row.code.startswith(_CODE)), "")
    counts = ledger.count(rows.train, tokens, None, batch_size=1, max_length=None)
    mismatches = counts["prompt_mismatch"]
    if not problem and not prompt_tokens.accepts(run, rows=len(tokens.rows), mismatches=mismatches):
        problem = f"{mismatches:,} of {len(tokens.rows):,} rows have other prompt tokens at inference than in training"
    if not problem and not len(tokens.rows):
        problem = "no row is trained"
    prompt = encoder.thoughts.generation_prompt if encoder.thoughts else ""
    return Trial(choice, problem, counts["answers"], prompt, mismatches)


def _write(value: Any) -> str:
    """Return a value in YAML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_write(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_write, value)) + "]"
    return value if isinstance(value, str) and value.replace("_", "").isalnum() else json.dumps(value)
