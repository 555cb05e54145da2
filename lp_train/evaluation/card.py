"""The model card beside the weights, with the figures in the hub's metadata format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lp_train.evaluation.tables import sentence, tables

LOADERS = {"lora": ("peft", "PeftModel"), "full": ("transformers", "AutoModelForCausalLM")}


def model_card(report: Mapping[str, Any], base: str, evaluation: Mapping[str, Any] | None = None) -> str:
    """README.md of the folder ``adapter/`` (``tune: lora``) or ``model/`` (``tune: full``)."""
    library, loader = LOADERS[report["tune"]]
    head = ModelCardData(
        base_model=base,
        library_name=library,
        tags=["layer-parallel"],
        model_name=report["name"],
        eval_results=_results(report, evaluation or {}),
    )
    shown = tables({**report, **(evaluation or {})})
    figures = "\n\n".join(str(shown[name]) for name in ("fidelity", "tasks") if name in shown)
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

{figures}
"""


def _graph(plan: Mapping[str, Any]) -> str:
    if (kind := plan.get("kind", "pair")) != "pair":
        return f"layers {plan['removed'] or 'unchanged'} removed (`plan.kind: {kind}`, a control)"
    pairs = ", ".join("+".join(map(str, pair)) for pair in plan["pairs"])
    return f"layers\n{pairs} run side by side\n(`{plan['algebra']}`, arXiv 2502.02790)"


def _results(report: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The recovered model's held-out figures, and its tasks where they were run."""
    figures = report["recovered"]
    found = [("held-out text", "held-out", "perplexity", "perplexity", figures["ppl"])]
    found += [("held-out text", "held-out", "kl_divergence", "KL to the original, nats per token", figures["kl"])]
    for task, of_task in evaluation.get("tasks", {}).items():
        if (results := of_task["results"].get("recovered")) is not None:
            metric = of_task["metric"]
            found.append((task, task, metric, f"{metric}, {of_task['num_fewshot']}-shot", results[metric]))
    names = ("dataset_name", "dataset_type", "metric_type", "metric_name", "metric_value")
    return [EvalResult(task_type="text-generation", **dict(zip(names, row, strict=True))) for row in found]
