"""The model card beside the weights, with the figures in the hub's metadata format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lp_train.evaluation.page import table as as_markdown
from lp_train.evaluation.report import sentence, table, task_table

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
    tasks = f"\n{as_markdown(task_table([evaluation]))}\n" if evaluation and evaluation["tasks"] else ""
    return f"""---
{head.to_yaml()}
---

# {report["name"]}: weights of a layer-parallel model

**Trained for the paired graph.** These weights belong to `{base}` with layers
{", ".join("+".join(map(str, pair)) for pair in report["plan"]["pairs"])} run side by side
(`{report["plan"]["algebra"]}`, arXiv 2502.02790). A plain `{loader}.from_pretrained` gives the
sequential model with them, which is not what they were trained for.

```python
import lp_train
model, tokenizer = lp_train.load("path/to/this/folder")
```

{sentence(report)}

{table(report)}
{tasks}"""


def _results(report: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The recovered model's held-out figures, and its tasks where they were run."""
    names = {"ppl": ("perplexity", "perplexity"), "kl": ("kl_divergence", "KL to the original, nats per token")}
    found = [
        ("held-out text", "held-out", name, title, report["recovered"][key]) for key, (name, title) in names.items()
    ]
    for task, of_task in evaluation.get("tasks", {}).items():
        if (results := of_task["results"].get("recovered")) is not None:
            metric = of_task["metric"]
            title = f"{metric}, {of_task['num_fewshot']}-shot"
            found.append((task, task, metric, title, results[metric]))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_name=dataset,
            dataset_type=kind,
            metric_type=metric,
            metric_name=title,
            metric_value=value,
        )
        for dataset, kind, metric, title, value in found
    ]
