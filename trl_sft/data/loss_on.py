"""Decides which part of the rows carries loss: `data.loss_on`, or its default for the rows of the run.

Inputs: a `Run` and its formatted sources. Outputs: completion, assistant, last_turn or all. Deliberately not here:
the loss mask of a row (`tokenization.loss_mask`).
"""

from __future__ import annotations

from collections.abc import Sequence

from trl_sft.data.formats import PAIRS, TEXT
from trl_sft.data.split import FormattedSource
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe.checked import Run


def choose_loss_on(run: Run, row_type: str, sources: Sequence[FormattedSource], *, streaming: bool) -> str:
    """Return which tokens carry loss: as the recipe says, else the response.

    Rows of format prompt_completion say themselves what the completion is, so earlier answers are part of the
    prompt. In a chat of several turns every answer is a response; so it is in a stream, whose later rows may have
    several turns.

    Args:
        run: the checked recipe.
        row_type: CHAT, PAIRS or TEXT.
        sources: the sources to train.
        streaming: whether they are read while training goes on.

    Returns:
        completion, assistant, last_turn or all.

    Raises:
        RecipeError: `data.loss_on` does not fit the rows, or the rows leave it open.

    """
    choice = run.data.get("loss_on")
    where = run.recipe.where(("data", "loss_on"))
    if row_type == TEXT:
        if choice not in (None, "all"):
            problem = f"loss_on: {choice}, but rows of text have no response"
            raise RecipeError(Fault(where, problem, "Set `loss_on: all`, or remove it."))
        return "all"
    if row_type == PAIRS and choice in ("assistant", "last_turn"):
        fix = (
            "Set `loss_on` to completion or all. Or set `wording: chat`, with `tokenizer.chat_template` where the "
            "model has none."
        )
        raise RecipeError(Fault(where, f"loss_on: {choice}, but the rows become plain text", fix))
    multi_turn = streaming or any(source.multi_turn for source in sources)
    if row_type == PAIRS or not multi_turn or choice == "all":
        return str(choice or "completion")
    has_completion = {source.source_format.format == "prompt_completion" for source in sources}
    if choice is None and len(has_completion) > 1:
        problem = "some sources say what their completion is, others are chats of several turns"
        raise RecipeError(Fault(where, problem, "Set `loss_on` to assistant, last_turn or all."))
    if choice == "completion":
        return "completion" if has_completion == {True} else "last_turn"
    return str(choice or ("completion" if has_completion == {True} else "assistant"))
