"""What an evaluation says of its tasks: figures of each model, and comparisons on the same items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.group import Group

from lp_train.evaluation.tasks import Built, Items, Suite
from run_evaluation.statistics import Comparison, compare, mean_of

PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
OfModels = Mapping[str, Mapping[str, Items]]  # by model, by task


def task_sections(suite: Suite, runs: Sequence[OfModels]) -> dict[str, Any]:
    """``tasks`` and ``groups``: figures of each model, and comparisons with the original on the same items."""
    tasks: dict[str, Any] = {}
    compared: dict[str, dict[str, Comparison]] = {}  # model, task
    for task, built in suite.tasks.items():
        of_task = {model: [run[model][task] for run in runs] for model in sorted(runs[0])}
        figures = {model: [built.figures(items) for items in seeds] for model, seeds in of_task.items()}
        for model, comparison in _comparisons(of_task, built.primary, chance(built)).items():
            compared.setdefault(model, {})[task] = comparison
        tasks[task] = {
            "items": len(built.docs),
            "num_fewshot": built.task.config.num_fewshot,
            "fewshot_source": fewshot_source(built),
            "metric": built.primary,
            "chance": chance(built),
            "unit": "nats" if is_perplexity(built.primary) else "share",
            "results": {
                m: {k: float(np.mean([f[k] for f in seeds])) for k in seeds[0]} for m, seeds in figures.items()
            },
            "comparisons": {model: of_model[task].as_dict() for model, of_model in compared.items()},
        }
    groups = {}
    for group, members in suite.groups.items():
        shares = group_shares(members, suite.tasks)
        if not any(is_perplexity(suite.tasks[task].primary) for task in shares):
            chances = {task: chance(suite.tasks[task]) for task in shares}
            means = {model: mean_of(of_model, shares, chances) for model, of_model in compared.items()}
            groups[group] = {"shares": shares, "comparisons": {model: mean.as_dict() for model, mean in means.items()}}
    return {"tasks": tasks, "groups": groups}


def _comparisons(of_task: Mapping[str, Sequence[Items]], metric: str, guessing: float) -> dict[str, Comparison]:
    """Each model's items, of one or more seeds, against the original's."""
    values = {model: np.stack([sums(items, metric)[0] for items in seeds]) for model, seeds in of_task.items()}
    weights, floor = sums(of_task["sequential"][0], metric)[1], None if is_perplexity(metric) else guessing
    values = {model: seeds if model == "recovered" else seeds[:1] for model, seeds in values.items()}
    original = values.pop("sequential")[0]
    return {model: compare(original, seeds, weights, floor) for model, seeds in values.items()}


def is_perplexity(metric: str) -> bool:
    return metric in PERPLEXITIES


def sums(items: Items, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(value, weight) of each item: accuracies with weight 1, perplexities as nats and the words they are for."""
    values = np.array(items.metrics[metric], dtype=np.float64)
    weights = values[:, 1] if values.ndim == 2 else np.ones(len(values))
    return (-values[:, 0] if values.ndim == 2 else -values if is_perplexity(metric) else values), weights


def chance(built: Built) -> float:
    """What guessing scores: one in the number of choices; 0 where the answer is free."""
    if built.task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    return float(np.mean([1 / len(of_item) for of_item in built.instances]))


def fewshot_source(built: Built) -> str | None:
    """Where its examples come from, in words; None without examples."""
    config = built.task.config
    if not config.num_fewshot or (own := getattr(built.task.sampler, "source", None)):
        return own if config.num_fewshot else None
    split = config.fewshot_split or config.training_split or config.validation_split or config.test_split
    evaluated = config.test_split or config.validation_split
    return "the evaluated file, without the item itself" if split == evaluated else f"split {split}"


def item_lines(suite: Suite, results: OfModels) -> Iterator[dict[str, Any]]:
    for task, built in suite.tasks.items():
        for i, doc_id in enumerate(built.doc_ids):
            line: dict[str, Any] = {"task": task, "doc_id": doc_id}
            for model, of_model in results.items():
                metrics = {name: values[i] for name, values in of_model[task].metrics.items()}
                line[model] = {"responses": of_model[task].responses[i], **metrics}
            yield line


def group_shares(group: Group, tasks: Mapping[str, Built]) -> dict[str, float]:
    """Of each task in the group's mean: by size where the group says so (lm-eval's ``mmlu``), else members alike."""
    by_size = any(metric.weight_by_size for metric in group.aggregate_metric_list or [])
    members = [group_shares(m, tasks) if isinstance(m, Group) else {m.task_name: 1.0} for m in group]
    sizes = [sum(len(tasks[name].docs) for name in member) if by_size else 1 for member in members]
    shares = [size / sum(sizes) for size in sizes]
    return {
        name: share * weight for share, member in zip(shares, members, strict=True) for name, weight in member.items()
    }
