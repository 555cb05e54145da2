"""Types of command-line arguments that several benchmarks take."""

from __future__ import annotations

import argparse
import json


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def integers(text: str) -> list[int]:
    """Of a list such as ``1,8,32``."""
    return [int(part) for part in text.split(",")]


def window_or_pairs(text: str) -> str | list[list[int]]:
    """A window such as ``15:29`` as it is, a list of pairs read as JSON."""
    return json.loads(text) if text.startswith("[") else text
