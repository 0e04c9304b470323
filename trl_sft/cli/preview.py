"""RunRows as the model sees them: trained tokens apart from the others, special tokens visible, cut ends marked.

In: a `Run`; of each source only its first rows are read, whatever its size, and no weights. Out: a `Preview`,
shown in a terminal, as a page of HTML, or in a notebook. What stands in rows is escaped in HTML.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from trl_sft.data.rows import RunRows
from trl_sft.recipe.checked import Run
from trl_sft.tokenization import build, cache, ledger, special_tokens
from trl_sft.tokenization.encode import IGNORED
from trl_sft.training import stages

_HEAD = 200  # rows of each source that are read, unless more are shown
_TRAINED, _SPECIAL, _CUT, _PLAIN = "\033[32m", "\033[7m", "\033[31m", "\033[0m"
_STYLE = """\
<style>
.trl_sft pre {white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8884; padding: .6em}
.trl_sft .trained {background: #2a91; background: color-mix(in srgb, #2a9d3a 30%, transparent)}
.trl_sft .special {border: 1px solid #8888; border-radius: 3px; padding: 0 .15em; font-size: 90%}
.trl_sft .cut {color: #c22}
.trl_sft .pack {display: flex; height: 1.2em; max-width: 60em; border: 1px solid #8888; margin: .2em 0}
.trl_sft .pack span {border-right: 1px solid #8888; background: #2a66c944; font-size: 75%; overflow: hidden}
</style>
"""


class Piece(NamedTuple):
    """A stretch of a row that is trained or not, special or not."""

    text: str
    trained: bool
    special: bool


class Shown(NamedTuple):
    """One row."""

    name: str
    pieces: list[Piece]
    tokens: int
    trained: int
    cut: int  # tokens that are cut off


class Preview(NamedTuple):
    """The first rows of a run as the model sees them."""

    said: list[tuple[str, str]]  # format and wording of each source, the ledger of the rows that were read
    rows: list[Shown]
    left_out: list[str]
    packs: list[list[int]]  # the first batch: lengths of the documents of each pack, or of each row
    room: int  # tokens of a pack; of a batch without packing its longest row

    def lines(self, colour: bool) -> Iterator[str]:
        """Yield the lines of a terminal; without `colour` what is trained stands between ⟦ and ⟧."""
        for row in self.rows:
            yield f"── {row.name}: {row.tokens:,} tokens, {row.trained:,} of them trained"
            yield "".join(_coloured(piece) if colour else _bracketed(piece) for piece in row.pieces) + _cut(row, colour)
            yield ""
        yield from (f"left out: {line}" for line in self.left_out)
        yield from (f"{name:<9} {value}" for name, value in self.said)
        what = "pack" if any(len(lengths) > 1 for lengths in self.packs) else "row"
        for number, lengths in enumerate(self.packs, 1):
            empty = self.room - sum(lengths)
            documents = " + ".join(f"{n:,}" for n in lengths)
            yield f"{what:<9} {number} of the first batch: {documents} tokens, {empty:,} empty"
        mark = "green" if colour else "between ⟦ and ⟧"
        yield f"Trained tokens are {mark}. Counted are the rows that were read; `prepare` counts all."

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        out = [_STYLE, "<div class='trl_sft'>"]
        for row in self.rows:
            out.append(f"<p>{html.escape(row.name)}: {row.tokens:,} tokens, {row.trained:,} of them trained</p><pre>")
            out += [_marked_up(piece) for piece in row.pieces]
            out.append(f"<span class='cut'>{_cut(row, False)}</span></pre>" if row.cut else "</pre>")
        out += [f"<p>left out: {html.escape(line)}</p>" for line in self.left_out]
        out.append("<table>")
        out += [f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in self.said]
        out.append("</table><p>The first batch, documents by their tokens:</p>")
        for lengths in self.packs:
            spans = "".join(f"<span style='width: {n / self.room:.2%}'>{n}</span>" for n in lengths)
            out.append(f"<div class='pack'>{spans}</div>")
        return "\n".join([*out, "</div>"])

    def page(self, title: str) -> str:
        """Return a page of HTML that stands by itself."""
        head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
        return (
            f"{head}<body style='font: 15px sans-serif; margin: 2em'><h1>{html.escape(title)}</h1>{self._repr_html_()}"
        )


def make(run: Run, num_rows: int = 3) -> Preview:
    """Return the first `num_rows` rows of each source as the model sees them. Raises UserError."""
    settings, chat, rows = stages.read_rows(run, head=max(_HEAD, num_rows))
    args = settings.args
    encoder = build.encoder(run, chat, rows, args)
    work = cache.Work(rows.train.rows, rows.train.order, rows.train.row_name, "Tokenizing", thorough=True)
    made = cache.in_memory(work, encoder)
    packs = cache.packed(made, args.max_length, args.packing_strategy, None) if args.packing else None
    counted = ledger.count(rows.train, made, packs, args.per_device_train_batch_size, args.max_length)
    said = [("rows", line) for line in rows.notes]
    if len(made.rows):
        said += ledger.lines(run, rows, {"train": counted, "eval": {}}, args, whole=False)
    shown = list(_shown(rows, made, chat.tokenizer, num_rows))
    left = [
        f"{rows.train.row_name(row['number'])}: {row['reason']}: {row['begins']!r}" for row in made.rejected[:num_rows]
    ]
    batch, room = _batch(made.rows, packs, args)
    return Preview(said, shown, left, batch, room)


def _shown(rows: RunRows, made: cache.Tokens, tokenizer: PreTrainedTokenizerBase, number: int) -> Iterator[Shown]:
    """Yield the first rows of each source."""
    special = {*tokenizer.convert_tokens_to_ids(list(special_tokens.strings(tokenizer)))}
    numbers = np.asarray(made.rows.data["number"].to_numpy())
    parts = rows.train.source_indices[numbers].tolist()
    for part in range(len(rows.train.sources)):
        for index in [i for i, of in enumerate(parts) if of == part][:number]:
            row = made.rows[index]
            pieces = list(_pieces(tokenizer, row["input_ids"], row["labels"], special))
            name = rows.train.row_name(int(numbers[index]))
            yield Shown(name, pieces, row["total"], row["trained"], row["total"] - len(row["input_ids"]))


def _pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int], special: set[int]
) -> Iterator[Piece]:
    """Yield stretches of tokens that are alike; each special token is one of its own."""
    kinds = [(label != IGNORED, token in special) for token, label in zip(ids, labels, strict=True)]
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or kinds[i] != kinds[start] or kinds[start][1]:
            yield Piece(_text(tokenizer, list(ids[start:i])), *kinds[start])
            start = i


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return tokens as text, with the space that some tokenizers drop where a text begins."""
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    spaced = str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁") and not text.startswith(" ")
    return " " + text if spaced else text


def _batch(rows: Dataset, packs: Dataset | None, args: SFTConfig) -> tuple[list[list[int]], int]:
    """Return the lengths of the documents in the first batch, and how many tokens each row of it has room for."""
    size = args.per_device_train_batch_size
    if packs is not None:
        first = packs[:size]
        return first.get("seq_lengths") or [[len(ids)] for ids in first["input_ids"]], args.max_length
    lengths = [len(ids) for ids in rows[:size]["input_ids"]]
    return [[length] for length in lengths], max(lengths, default=0)


def _coloured(piece: Piece) -> str:
    begin = (_TRAINED if piece.trained else "") + (_SPECIAL if piece.special else "")
    text = _safe(piece.text)
    # colours end with the line in some pagers
    return "\n".join(f"{begin}{line}{_PLAIN}" if begin and line else line for line in text.split("\n"))


def _bracketed(piece: Piece) -> str:
    return f"⟦{_safe(piece.text)}⟧" if piece.trained else _safe(piece.text)


def _marked_up(piece: Piece) -> str:
    kinds = " ".join(name for name, there in (("trained", piece.trained), ("special", piece.special)) if there)
    return f"<span class='{kinds}'>{html.escape(piece.text)}</span>" if kinds else html.escape(piece.text)


def _cut(row: Shown, colour: bool) -> str:
    if not row.cut:
        return ""
    told = f" ✂ {row.cut:,} more tokens are cut off"
    return f"{_CUT}{told}{_PLAIN}" if colour else told


def _safe(text: str) -> str:
    """Return a text without what would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
