"""Rows as the model sees them, as HTML: tokens with loss in colour, special tokens framed, line breaks marked.

Inputs: segments of rows. Outputs: HTML in which what stands in rows is escaped, with its style sheet and legend. Not
here: the pages around it (`page`, `cli.preview`).
"""

from __future__ import annotations

import html
import re

from trl_sft import console
from trl_sft.tokenization.row_segments import Segment, SegmentedRow

STYLE = """\
.trl_sft pre {white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8884; padding: .6em}
.trl_sft .trained {background: #2a91; background: color-mix(in srgb, #2a9d3a 30%, transparent)}
.trl_sft .special {border: 1px solid #8888; border-radius: 3px; padding: 0 .15em; font-size: 90%}
.trl_sft .cut {color: #c22}
.trl_sft .break::before {content: "↵"; color: #2a66c9; opacity: .6}
.trl_sft .space {box-shadow: inset 0 -.2em #2a66c955}
.trl_sft .pack {display: flex; height: 1.2em; max-width: 60em; border: 1px solid #8888; margin: .2em 0}
.trl_sft .pack span {border-right: 1px solid #8888; background: #2a66c944; font-size: 75%; overflow: hidden}
"""
LEGEND = (
    "<p><span class='trained'>trained: carries loss</span> &nbsp; not trained: context &nbsp; "
    "<span class='special'>special token</span> &nbsp; <span class='break'></span> line break in the text (a line "
    "that only wraps has no mark) &nbsp; <span class='space'> &nbsp;</span> space or tab at the end of a line, or more "
    "than one &nbsp; <span class='cut'>✂</span> truncated end</p>"
)
_LEGEND_IN_CHINESE = (
    "<p><span class='trained'>参与训练：计入损失</span> &nbsp; 不参与训练：上下文 &nbsp; "
    "<span class='special'>特殊词元</span> &nbsp; <span class='break'></span> 文本中的换行（仅因行宽折行处没有标记）"
    " &nbsp; <span class='space'> &nbsp;</span> 行尾的空格或制表符，或连续多个空格 &nbsp; "
    "<span class='cut'>✂</span> 末尾被截断</p>"
)
# for a page that shows one of two languages
LEGEND_IN_BOTH = f"<div lang='en'>{LEGEND}</div><div lang='zh'>{_LEGEND_IN_CHINESE}</div>"
# spaces that are easily overlooked: several, tabs, and those at either end of a line
_SPACES = re.compile(r"(?<=\n)[ \t]+|[ \t]+(?=\n)|^[ \t]+|[ \t]+$|\t+|[ \t]{2,}")


def format_row(row: SegmentedRow) -> str:
    """Return one row as HTML: its title, and its segments in a block."""
    segments = "".join(_mark_up(segment) for segment in row.segments)
    end = f"<span class='cut'>{row.truncation}</span>" if row.truncation else ""
    return f"<p>{html.escape(row.title)}</p><pre>{segments}{end}</pre>"


def _mark_spaces(text: str) -> str:
    """Return escaped text with a mark at each line break and at spaces that are easily overlooked."""
    marked = _SPACES.sub(lambda match: f"<span class='space'>{match.group()}</span>", text)
    return marked.replace("\n", "<span class='break'></span>\n")


def _mark_up(segment: Segment) -> str:
    """Return a segment as HTML."""
    classes = " ".join(["trained"] * segment.has_loss + ["special"] * segment.is_special)
    text = _mark_spaces(html.escape(console.escape_control_characters(segment.text)))
    return f"<span class='{classes}'>{text}</span>" if classes else text
