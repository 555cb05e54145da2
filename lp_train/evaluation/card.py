"""The model card beside the weights, with the figures in the hub's metadata format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lp_train.evaluation.page import Table
from lp_train.evaluation.report import write
from lp_train.evaluation.tables import fidelity_table, sentence

LOADERS = {"lora": ("peft", "PeftModel"), "full": ("transformers", "AutoModelForCausalLM")}


def write_card(
    folder: Path, report: Mapping[str, Any], base: str, tables: Sequence[Table] = (), results: Sequence[EvalResult] = ()
) -> None:
    """README.md of the run's folder ``adapter/`` (``tune: lora``) or ``model/`` (``tune: full``). From an evaluation
    come ``tables`` in place of the report's own and further ``results``."""
    weights = folder / ("adapter" if report["tune"] == "lora" else "model")
    write(weights / "README.md", model_card(report, base, tables or [fidelity_table(report)], results))


def model_card(report: Mapping[str, Any], base: str, tables: Sequence[Table], results: Sequence[EvalResult]) -> str:
    library, loader = LOADERS[report["tune"]]
    about: dict[str, Any] = {"base_model": base, "library_name": library, "tags": ["layer-parallel"]}
    measured = [*_held_out(report["recovered"]), *results]
    head = ModelCardData(**about, model_name=report["name"], eval_results=measured)
    shown = "\n\n".join(map(str, tables))
    return f"""---
{head.to_yaml()}
---

# {report["name"]}: weights of a layer-parallel model

**Trained for the paired graph.** These weights belong to `{base}` with {_graph(report["plan"])}.
A plain `{loader}.from_pretrained` gives the sequential model with them, which is not what they were trained for.

```python
import lp_train
model, tokenizer = lp_train.load("path/to/this/folder")
```

{sentence(report)}

{shown}
"""


def _graph(plan: Mapping[str, Any]) -> str:
    if (kind := plan.get("kind", "pair")) != "pair":
        return f"layers {plan['removed'] or 'unchanged'} removed (`plan.kind: {kind}`, a control)"
    pairs = ", ".join("+".join(map(str, pair)) for pair in plan["pairs"])
    return f"layers\n{pairs} run side by side\n(`{plan['algebra']}`, arXiv 2502.02790)"


def _held_out(figures: Mapping[str, float]) -> list[EvalResult]:
    return [
        result("held-out text", "held-out", "perplexity", "perplexity", figures["ppl"]),
        result("held-out text", "held-out", "kl_divergence", "KL to the original, nats per token", figures["kl"]),
    ]


def result(dataset: str, kind: str, metric: str, metric_name: str, value: float) -> EvalResult:
    """A figure of the recovered model in the hub's form."""
    return EvalResult("text-generation", kind, dataset, metric, value, metric_name=metric_name)
