"""The library stays small (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted(ROOT.glob("lp_train/**/*.py"))
LIMIT = 6_000  # lines of code in lp_train: what is a command or an analysis belongs into scripts/
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstrings(text: str) -> set[int]:
    """The lines of all docstrings."""
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    documented = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    return {line for node in documented for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def code_lines(text: str) -> int:
    """Lines that hold code: without blank ones, comments and docstrings."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in LAYOUT]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docstrings(text))


def test_code_lines() -> None:
    text = '"""Head.\n\nMore."""\n\nx = 1  # why\n\n\ndef f() -> str:\n    # comment\n    return """a\nb"""\n'
    assert code_lines(text) == 4  # x, def, and the two of the text that is returned


def test_the_library_stays_small() -> None:
    assert sum(code_lines(path.read_text()) for path in LIBRARY) < LIMIT
