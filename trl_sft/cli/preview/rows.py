"""The first rows of a run as the model sees them: tokens with loss marked, special tokens visible, truncated ends.

Inputs: a checked recipe (`Run`); of each source only the first rows are read, whatever its size, and no weights.
Outputs: a `Preview`, for a terminal, as an HTML page, or for a notebook. What stands in rows is escaped: HTML in pages,
control characters on a terminal. Not here: how rows become tokens (`tokenization`).
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any, NamedTuple

from datasets import Dataset
from rich.text import Text
from trl import SFTConfig

from trl_sft import console
from trl_sft.data import bad_rows
from trl_sft.data.pipeline import Split
from trl_sft.recipe.checked import Run
from trl_sft.reports import row_markup
from trl_sft.tokenization import build, cache, ledger, segmentation, thinking
from trl_sft.tokenization.encode import EncodedRows
from trl_sft.tokenization.row_segments import SegmentedRow
from trl_sft.training import stages

_MIN_ROWS_READ = 200  # of each source; more where more are shown
_STYLE = f"<style>\n{row_markup.STYLE}</style>\n"


class Preview(NamedTuple):
    """The first rows of a run as the model sees them."""

    summary: list[tuple[str, str]]  # format and wording of each source, counts of the rows that were read
    rows: list[SegmentedRow]
    rejected: list[str]  # rows that are not trained on, with the reason
    batch: list[list[int]]  # the first batch: token counts of the documents of each pack, or of each row
    batch_width: int  # positions of a pack; without packing the tokens of the longest row

    def describe(self) -> dict[str, Any]:
        """Return the preview as plain values, as JSON has them."""
        return {
            "notes": [f"{name}: {value}" for name, value in self.summary],
            "rows": [row._asdict() | {"segments": [part._asdict() for part in row.segments]} for row in self.rows],
            "rejected": self.rejected,
            "batch": self.batch,
            "batch_width": self.batch_width,
        }

    def row_lines(self, *, colour: bool) -> Iterator[str]:
        """Yield the lines of the rows alone."""
        for row in self.rows:
            yield f"── {row.title}"
            yield console.render_colours(_style_row(row)) if colour else _bracket_row(row)
            yield ""

    def format_rows(self) -> str:
        """Return the rows alone as HTML."""
        return "\n".join(map(row_markup.format_row, self.rows))

    def lines(self, *, colour: bool) -> Iterator[str]:
        """Yield the lines of a terminal; without `colour` tokens with loss stand between ⟦ and ⟧."""
        yield from self.row_lines(colour=colour)
        yield from (f"left out: {line}" for line in self.rejected)
        yield from (f"{name:<9} {value}" for name, value in self.summary)
        kind = "pack" if any(len(lengths) > 1 for lengths in self.batch) else "row"
        for number, lengths in enumerate(self.batch, 1):
            padding = self.batch_width - sum(lengths)
            documents = " + ".join(f"{n:,}" for n in lengths)
            yield f"{kind:<9} {number} of the first batch: {documents} tokens, {padding:,} of padding"
        mark = "green" if colour else "between ⟦ and ⟧"
        yield f"Tokens with loss are {mark}. The counts cover the rows that were read; run `prepare` to count all rows."

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        out = [_STYLE, "<div class='trl_sft'>", row_markup.LEGEND]
        out.append(self.format_rows())
        out += [f"<p>left out: {html.escape(line)}</p>" for line in self.rejected]
        out.append("<table>")
        out += [f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in self.summary]
        out.append("</table><p>The first batch, documents by their tokens:</p>")
        for lengths in self.batch:
            spans = "".join(f"<span style='width: {n / self.batch_width:.2%}'>{n}</span>" for n in lengths)
            out.append(f"<div class='pack'>{spans}</div>")
        return "\n".join([*out, "</div>"])

    def page(self, title: str) -> str:
        """Return a page of HTML that needs no other file."""
        return _format_page(title, self._repr_html_())


def format_page(title: str, body: str) -> str:
    """Return a page of HTML around rows as HTML, with the legend."""
    return _format_page(title, f"{_STYLE}<div class='trl_sft'>{row_markup.LEGEND}{body}</div>")


def _format_page(title: str, body: str) -> str:
    """Return a whole page of HTML."""
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
    return f"{head}<body style='font: 15px sans-serif; margin: 2em'><h1>{html.escape(title)}</h1>{body}"


def build_preview(run: Run, num_rows: int = 3) -> Preview:
    """Return the first rows of each source as the model sees them.

    Args:
        run: The checked recipe.
        num_rows: Rows of each source to show; at least 200 of each are read and counted.

    Raises:
        UserError: What would stop the run before its weights load.

    """
    lines: list[tuple[str, str]] = []
    settings, _, chat, rows = stages.read_rows(
        run, head=max(_MIN_ROWS_READ, num_rows), any_machine=True, show=lines.extend
    )
    args = settings.args
    encoder = build.make_encoder(run, chat, rows, args=args)
    tokens = cache.encode_in_memory(rows.train, encoder, title="Tokenizing", check_all=True)
    # with `drop` the share of bad rows among the first rows says little about all
    parts = {} if bad_rows.drops_bad_rows(run) else {"train": (rows.train, tokens)}
    ledger.check_bad_rows(run, rows, parts)
    packs = cache.pack(tokens, args.max_length, args.packing_strategy, seed=None) if args.packing else None
    batch_size = args.per_device_train_batch_size
    counts = ledger.count(rows.train, tokens, packs, batch_size=batch_size, max_length=args.max_length)
    summary = [line for line in lines if line[0] == "note"]  # what this machine lacks to train the run
    summary += [("rows", note) for note in rows.notes]
    if len(tokens.rows):
        summary += ledger.describe(run, rows, {"train": counts, "eval": {}}, args=args, whole=False)
        summary += thinking.describe(encoder.thoughts, counts["answers"])
    rejected = list(_describe_rejected(rows.train, tokens))[:num_rows]
    preview_rows = list(segmentation.select_first_rows(rows.train, tokens, chat.tokenizer, num_rows=num_rows))
    batch, batch_width = _measure_first_batch(tokens.rows, packs, args)
    return Preview(summary, preview_rows, rejected, batch, batch_width)


def _describe_rejected(split: Split, tokens: EncodedRows) -> Iterator[str]:
    """Yield the rows that are left out, each with its reason and, where there is a text, its first characters."""
    for reason, numbers in split.removed_rows.items():
        yield from (f"{split.row_name(number)}: {reason}" for number in numbers.tolist())
    for row in tokens.rejected:
        begins = f": {row['begins']!r}" if row["begins"] else ""
        yield f"{split.row_name(row['row'])}: {row['reason']}{begins}"


def _measure_first_batch(rows: Dataset, packs: Dataset | None, args: SFTConfig) -> tuple[list[list[int]], int]:
    """Return the token counts of the documents in each row of the first batch, and the positions of a row."""
    size = args.per_device_train_batch_size
    if packs is not None:
        first = packs[:size]
        return first.get("seq_lengths") or [[len(ids)] for ids in first["input_ids"]], args.max_length
    lengths = [len(ids) for ids in rows[:size]["input_ids"]]
    return [[length] for length in lengths], max(lengths, default=0)


def _style_row(row: SegmentedRow) -> Text:
    """Return a row with colours: green for loss, reversed for special tokens, red for truncation."""
    text = Text()
    for segment in row.segments:
        styles = ["green"] * segment.has_loss + ["reverse"] * segment.is_special
        text.append(console.escape_control_characters(segment.text), " ".join(styles))
    return text.append(row.truncation, "red")


def _bracket_row(row: SegmentedRow) -> str:
    """Return a row as plain text, tokens with loss between ⟦ and ⟧."""
    texts = [(console.escape_control_characters(segment.text), segment.has_loss) for segment in row.segments]
    return "".join(f"⟦{text}⟧" if has_loss else text for text, has_loss in texts) + row.truncation
