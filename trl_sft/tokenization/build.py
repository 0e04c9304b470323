"""The rows of a run as SFTTrainer gets them: tokens, cut or packed, with their ledger.

In: `RunRows`, the tokenizer, the live SFTConfig. Out: `Made`. Here stands what of SFTConfig the data path takes
over: max_length, truncation_mode, packing, packing_strategy, eval_packing, shuffle_dataset. SFTTrainer is
told to touch nothing (`skip_prepare_dataset`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from trl import SFTConfig

from trl_sft.data.rows import RunRows
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe.checked import Run
from trl_sft.tokenization import cache, ledger
from trl_sft.tokenization import encode as tokenization_encode
from trl_sft.tokenization import stream as tokenization_stream
from trl_sft.tokenization.tokenizer import ChatTokenizer

# what SFTTrainer logs of an evaluation that says how good a model is (trl.trainer.sft_trainer, `log`)
_LOGGED = ("loss", "mean_token_accuracy", "entropy")
# strategies that cut nothing: what is too long goes on in the next pack
_CONTINUED = ("bfd_split", "wrapped")


class TokenizedRows(NamedTuple):
    """What SFTTrainer gets, and what became of the rows."""

    train: Dataset | IterableDataset  # input_ids, labels: (tokens,) each; packed: seq_lengths too
    eval: Dataset | dict[str, Dataset] | None
    ledger: dict[str, Any]
    rejects: list[dict[str, Any]]
    encoder: tokenization_encode.Encoder
    said: tuple[tuple[str, str], ...]  # the ledger's lines
    seen: tokenization_stream.Seen | None = None  # what came by so far, of rows that are streamed


def make(run: Run, chat: ChatTokenizer, rows: RunRows, args: SFTConfig, thorough: bool = False) -> TokenizedRows:
    """Make the tokens of all rows, or read them from the cache. Raises DataError, TemplateError, RecipeError.

    `thorough`: every row's mask is checked by a second way, though the tokens may be in the cache.
    """
    encode = encoder(run, chat, rows, args)
    made: dict[str, Dataset] = {}
    counted: dict[str, Any] = {}
    said: list[tuple[str, str]] = []
    left: list[dict[str, Any]] = []
    for part, split in (("train", rows.train), *rows.eval.items()):
        packing = args.packing if part == "train" or args.eval_packing is None else args.eval_packing
        of_side = encode._replace(plan=plan(run, chat, rows, args, packing))
        work = cache.Work(split.rows, split.order, split.row_name, f"Tokenizing {part}", thorough)
        if rows.streaming and part == "train":
            done = cache.in_memory(work, of_side)
        else:
            done = cache.made(work, of_side, run.recipe.path)
            said.append(("cache", f"{part}: {done.said}"))
        ledger.check(run, split, done, part)
        seed = args.seed if args.shuffle_dataset else None
        packs = cache.packed(done, args.max_length, args.packing_strategy, seed) if packing else None
        batch = args.per_device_train_batch_size if part == "train" else args.per_device_eval_batch_size
        counted[part] = ledger.count(split, done, packs, batch, args.max_length)
        left += ledger.rejects(split, done, part)
        plain = done.rows.select_columns(["input_ids", "labels"])
        made[part] = packs if packs is not None else plain if seed is None else plain.shuffle(seed=seed)
    _check_best(run, args, list(rows.eval))
    train = made.pop("train")
    whole = {"train": counted.pop("train"), "eval": counted}
    held = made.get("eval") if set(made) == {"eval"} else made or None
    if rows.streaming:
        told = ("stream", "read while training goes on; counted here are the first rows of each source")
        stream, seen = tokenization_stream.made(run, rows, encode, args)
        shown = (told, *ledger.lines(run, rows, whole, args, whole=False), *said)
        return TokenizedRows(
            stream, held, {"train": tokenization_stream.ledger(seen), "eval": counted}, left, encode, shown, seen
        )
    lines = (*ledger.lines(run, rows, whole, args), *said)
    return TokenizedRows(train, held, whole, left, encode, lines)


def encoder(run: Run, chat: ChatTokenizer, rows: RunRows, args: SFTConfig) -> tokenization_encode.Encoder:
    """Return what encodes the rows to train. Raises RecipeError for settings that contradict each other."""
    _check(run, args)
    specials = (
        chat.target.special_tokens
        if rows.has_escaped_tokens or (rows.streaming and chat.target.escape_special_tokens)
        else ()
    )
    return tokenization_encode.encoder(
        plan(run, chat, rows, args, args.packing), chat.tokenizer, run.chat_template_kwargs, specials
    )


def _check_best(run: Run, args: SFTConfig, names: list[str]) -> None:
    """Refuse a best model by a loss that several held-out sources do not have. Raises RecipeError."""
    metric = str(args.metric_for_best_model or "loss").removeprefix("eval_")
    where = run.recipe.where(("train", "metric_for_best_model"))
    if args.load_best_model_at_end and not metric.endswith(_LOGGED):
        raise RecipeError(
            Fault(where, f"{metric}, which no evaluation logs", " or ".join(f"eval_{n}" for n in _LOGGED))
        )
    if args.load_best_model_at_end and len(names) > 1 and not metric.startswith(tuple(f"{name}_" for name in names)):
        found = f"{metric}, but each held-out source is evaluated under its own name"
        raise RecipeError(Fault(where, found, " or ".join(f"eval_{name}_loss" for name in names)))


def plan(run: Run, chat: ChatTokenizer, rows: RunRows, args: SFTConfig, packing: bool) -> tokenization_encode.Plan:
    """Return what becomes of a row."""
    allowed = run.options.get("allow", [])
    return tokenization_encode.Plan(
        form=rows.row_type,
        loss_on=rows.loss_on,
        eos=str(chat.tokenizer.eos_token),
        max_length=None if packing and args.packing_strategy in _CONTINUED else args.max_length,
        overlong=run.data.get("overlong", "truncate"),
        keep_end=args.truncation_mode == "keep_end",
        mismatch="prompt_mismatch" in allowed,
        other_markers="template_markers" in allowed,
    )


def _check(run: Run, args: SFTConfig) -> None:
    """Refuse packing that lets one document see another, and what would have no effect. Raises RecipeError."""
    where = run.recipe.where(("train", "packing_strategy"))
    if args.packing and args.packing_strategy == "wrapped" and "leaking_packing" not in run.options.get("allow", []):
        found = "wrapped packs rows without a border: each token sees the rows before its own"
        write = "bfd or bfd_split, which keep rows apart; or run.allow: [leaking_packing]"
        raise RecipeError(Fault(where, found, write))
    split = args.packing and args.packing_strategy in _CONTINUED and args.eval_packing is not False
    for key, given in (
        (("data", "overlong"), run.data.get("overlong")),
        (("train", "truncation_mode"), run.train.get("truncation_mode")),
    ):
        if given and (args.max_length is None or split):
            why = "max_length: null" if args.max_length is None else f"packing_strategy: {args.packing_strategy}"
            found = f"{key[1]}: {given}, but nothing is cut with {why}"
            raise RecipeError(Fault(run.recipe.where(key), found, "leave it out"))
    if args.packing and run.train.get("truncation_mode") == "keep_end":
        found = "truncation_mode: keep_end, but TRL packs the beginning of a row"
        raise RecipeError(Fault(run.recipe.where(("train", "truncation_mode")), found, "keep_start, or packing: false"))
