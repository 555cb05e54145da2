"""A document of headings, paragraphs, tables, commands and plots, written as Markdown and as one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Cells in words. From the column ``numbers`` on they are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 1


@dataclass(frozen=True)
class Plot:
    """``file`` beside the document, as a reader with a dark screen wants it ``dark`` (PNG), and in words ``alt``."""

    file: str
    dark: bytes
    alt: str


@dataclass(frozen=True)
class Commands:
    lines: str


Block = str | Table | Plot | Commands
Section = tuple[str, Sequence[Block]]  # heading and what stands under it


def markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for heading, blocks in sections:
        parts += [f"## {heading}"] * bool(heading) + [_markdown(block) for block in blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Plot):
        return f"![{block.alt}]({block.file})"
    if isinstance(block, Commands):
        return f"```bash\n{block.lines}\n```"
    return table(block) if isinstance(block, Table) else block


def table(found: Table) -> str:
    """A Markdown table; line breaks and bars inside cells stay inside them."""
    align = ["---" if i < found.numbers else "---:" for i in range(len(found.columns))]
    rows = [[c.replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>") for c in row] for row in found.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (found.columns, align, *rows))


def html(title: str, sections: Sequence[Section], folder: Path) -> str:
    """One file that needs no other and no network; the plots are taken from ``folder``."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for heading, blocks in sections:
        inner = [_html(block, folder) for block in blocks]
        parts += [f"<h2>{escape(heading)}</h2>"] * bool(heading) + inner
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}{STYLE}</head>\n<body>{"".join(parts)}</body></html>\n'


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, Plot):
        dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(block.dark)}">'
        light = f'<img alt="{escape(block.alt)}" src="{_inline((folder / block.file).read_bytes())}">'
        return f"<picture>{dark}{light}</picture>\n"
    if isinstance(block, Commands):
        return f"<pre>{escape(block.lines)}</pre>\n"
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>\n"
    head = "".join(f"<th{_class(i, block)}>{escape(c)}</th>" for i, c in enumerate(block.columns))
    rows = ["".join(f"<td{_class(i, block)}>{escape(c)}</td>" for i, c in enumerate(row)) for row in block.rows]
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def _class(column: int, found: Table) -> str:
    return ' class="n"' if column >= found.numbers else ""


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


STYLE = """<style>
:root { color-scheme: light dark; --line: #d5d9e0; --soft: #f4f6f9; --page: #fff; --ink: #1c2230 }
@media (prefers-color-scheme: dark) { :root { --line: #3a404b; --soft: #20242c; --page: #15181e; --ink: #e4e7ec } }
body { max-width: 54rem; margin: 0 auto; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { background: var(--soft) } td { white-space: pre-line }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
pre { padding: .8rem; background: var(--soft); overflow-x: auto; font-size: .85rem }
img { display: block; width: 100%; max-width: 40rem; height: auto; margin: 1rem 0 }
</style>"""
