"""A report is Markdown beside its plots; the same as one HTML file that needs no other and no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt


class Table(NamedTuple):
    """Cells in Markdown, foreign text in them by :func:`literal`. From the column ``numbers`` on they stand right. The
    second line of a cell is set smaller, but for those of text between the first column and the numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 1

    def __str__(self) -> str:
        align = ["---" if i < self.numbers else "---:" for i in range(len(self.columns))]
        rows = [[self._cell(i, text) for i, text in enumerate(row)] for row in (self.columns, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], align, *rows[1:]))

    def _cell(self, column: int, text: str) -> str:
        first, *more = text.split("\n")
        answers = 0 < column < self.numbers
        return "<br>".join([first, *(line if answers else f"<small>{line}</small>" for line in more)])


def literal(text: str) -> str:
    """Text that means nothing to Markdown or HTML, also inside a table."""
    return re.sub(r"([\\`*_~|#\[\]!-])", r"\\\1", escape(text.strip(), quote=False))


def plain(found: Table) -> str:
    """For a terminal: without tags."""
    return re.sub(r"</?small>", "", str(found).replace("<br>", " "))


def html(title: str, markdown: str, folder: Path) -> str:
    """``markdown`` with its tables and the plots of ``folder``, as SVG in the colours of the page."""

    def figure(match: re.Match[str]) -> str:
        svg = (folder / match[1]).with_suffix(".svg").read_text()
        return f'<figure role="img" aria-label="{match[2]}">{svg}</figure>'

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    body = re.sub(r'<p><img src="(.*?)" alt="(.*?)" /></p>', figure, body)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title>{STYLE}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


STYLE = """<style>
:root { color-scheme: light dark; --line: #c3c8d1; --soft: #f2f4f8; --page: #ffffff; --ink: #1c2230; --dim: #5b6475;
  --original: #6b7484; --untuned: #e69f00; --recovered: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --line: #454c59; --soft: #20242c; --page: #15181e; --ink: #e4e7ec;
  --dim: #a0a8b5; --original: #98a1b0; --untuned: #ffb52e; --recovered: #56b4e9 } }
body { max-width: 58rem; margin: 0 auto; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; line-height: 1.35;
  overflow-wrap: normal; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { background: var(--soft); vertical-align: bottom } td[style*=right] { white-space: nowrap }
td:first-child { white-space: nowrap } small { font-size: .82rem; font-weight: 400; color: var(--dim) }
pre { padding: .8rem; background: var(--soft); overflow-x: auto; font-size: .85rem; overflow-wrap: normal }
figure { margin: 1rem 0 } svg { display: block; width: 100%; max-width: 40rem; height: auto }
@media print { body { max-width: none } figure, tr { break-inside: avoid } }
</style>"""
