"""Recover the accuracy of layer-parallel language models: pair layers, distil from the original order, evaluate.

Importing this package is cheap: torch and transformers are imported only when ``lp_train.load`` is first used.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import ``load`` from ``lp_train.models`` on first use (PEP 562)."""
    if name == "load":
        from lp_train.models import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
