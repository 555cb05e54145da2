"""Recover the accuracy of layer-parallel language models: pair layers, distil from the original order, evaluate.

Importing this package is cheap: torch and transformers are imported only when ``lp_train.load`` is first used. It
also makes Transformers' Auto classes know the model types of exported checkpoints, whichever is imported first.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

AUTO = "transformers.models.auto.configuration_auto"


def __getattr__(name: str) -> Any:
    """Import ``load`` from ``lp_train.models`` on first use (PEP 562)."""
    if name == "load":
        from lp_train.models import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Makes AutoConfig and AutoModelForCausalLM know the model types of ``modeling_layer_parallel``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lp_train.modeling_layer_parallel import CLASSES

    for config, model in CLASSES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def _register_when_asked(auto: ModuleType) -> None:
    """Has the table of model types register ours when one of them is first looked up."""
    base: Any = type(auto.CONFIG_MAPPING)

    def contains(self: Any, model_type: object) -> bool:
        if str(model_type).startswith("layer_parallel_") and not base.__contains__(self, model_type):
            register()
        return base.__contains__(self, model_type)

    def reduce(self: Any) -> Any:  # unpickled as what it was
        return (base._from_pickle, base.__reduce__(self)[1])

    auto.CONFIG_MAPPING.__class__ = type(base.__name__, (base,), {"__contains__": contains, "__reduce__": reduce})


class _AfterImport(MetaPathFinder):
    """Transformers has no entry points: this runs :func:`_register_when_asked` right after its table is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == AUTO else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _register_when_asked(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if AUTO in sys.modules:
    _register_when_asked(sys.modules[AUTO])
else:
    sys.meta_path.insert(0, _AfterImport())
