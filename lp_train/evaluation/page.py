"""A report is Markdown beside its plots; the same as one HTML file that needs no other and no network."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

STYLE = Path(__file__).with_suffix(".css").read_text()


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
    """``markdown`` with its tables and the plots of ``folder`` in it."""

    def embedded(match: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    body = re.sub(r'src="(plots/.*?)"', embedded, body)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>\n{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'
