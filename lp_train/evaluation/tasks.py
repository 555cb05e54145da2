"""Tasks of lm-eval on variants of one model: requests built once, results item by item.

The tasks of ``configs/tasks`` read local files; every other name is one of lm-eval's own, from the hub.
"""

import difflib
import functools
import itertools
import logging
import random
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as templates
from torch import nn
from transformers import PreTrainedTokenizerBase

from lp_train.config import EvaluateConfig
from lp_train.errors import UserError
from lp_train.evaluation.fidelity import Variant, evaluating
from lp_train.evaluation.harness import HarnessModel

# lm-eval compiles a prompt's template for every item, which takes longer than a small model's answer does
templates.from_string = functools.lru_cache(maxsize=4096)(templates.from_string)

LOCAL_TASKS = Path(__file__).parents[2] / "configs" / "tasks"
FEWSHOT_SEED = 1234  # lm-eval's own
PRIMARY = ("acc_norm", "acc", "exact_match", "word_perplexity")  # of a task that does not name one: the first it has


@dataclass(frozen=True)
class Items:
    """What one model answered in one task, in the order of the items. ``metrics``: lm-eval's values of each item, under
    its names (``acc``, ``exact_match,strict-match``). ``responses``: of each item, one for each of its requests."""

    metrics: dict[str, list[Any]]
    responses: list[list[Any]]


@dataclass
class Built:
    """One task with its requests. ``instances[i]`` are those of item ``doc_ids[i]``."""

    task: Task
    doc_ids: list[int] = field(default_factory=list)
    docs: list[Any] = field(default_factory=list)
    instances: list[list[Instance]] = field(default_factory=list)

    @property
    def primary(self) -> str:
        """The metric that a table shows: the one that the YAML names (``metadata.primary``), or the usual one."""
        named = (self.task.config.metadata or {}).get("primary")
        filters = [f"{name},{f.name}" for f in self.task._filters for name in self.task.aggregation()]
        has = [*self.task.aggregation(), *filters]
        return named or next((m for p in PRIMARY for m in has if m == p), has[0])

    def figures(self, items: Items) -> dict[str, float]:
        """lm-eval's own figures: means, perplexities."""
        return {m: float(self.task.aggregation()[m.partition(",")[0]](v)) for m, v in items.metrics.items()}

    def collect(self) -> Items:
        """What the instances were answered, in lm-eval's metrics."""
        self.task.apply_filters()
        metrics: dict[str, list[Any]] = defaultdict(list)
        for doc, instances in zip(self.docs, self.instances, strict=True):
            for key in instances[0].filtered_resps:
                found = self.task.process_results(doc, [instance.filtered_resps[key] for instance in instances])
                for metric, value in found.items():
                    metrics[metric if key == "none" else f"{metric},{key}"].append(value)
        responses = [[answer for instance in of_item for answer in instance.resps] for of_item in self.instances]
        return Items(dict(metrics), responses)


@dataclass(frozen=True)
class Suite:
    """The tasks of a run, and lm-eval's groups of them by name."""

    tasks: dict[str, Built]
    groups: dict[str, Group]

    def run(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        variants: Mapping[str, Variant],
        dtype: torch.dtype,
        state: PartialState,
        batch_size: int | None = None,
    ) -> tuple[dict[str, dict[str, Items]], dict[str, float]]:
        """``{variant: {task: Items}}``, and the tokens and seconds that the log-likelihoods of all variants took.

        The items are shared out over the processes and each process gets all results. Train mode and random state come
        back as they were.

        Raises:
            UserError: an item is longer than the model's context.
        """
        requests: dict[str, list[Instance]] = defaultdict(list)
        for built in self.tasks.values():
            for instance in itertools.chain(*built.instances):
                requests[instance.request_type] += [instance] * (instance.repeats or 1)
        answers, seconds = {}, 0.0
        with evaluating(model):
            lm = HarnessModel(model, tokenizer, variants, dtype, state, batch_size)
            for kind, of_kind in requests.items():
                started = time.perf_counter()
                answers[kind] = getattr(lm, kind)(of_kind)
                seconds += 0 if kind == "generate_until" else time.perf_counter() - started
        found = {}
        for name in variants:
            for instance in itertools.chain(*requests.values()):
                instance.resps = []
            for kind, of_kind in requests.items():
                for instance, answer in zip(of_kind, answers[kind][name], strict=True):
                    instance.resps.append(answer)
            found[name] = {task: built.collect() for task, built in self.tasks.items()}
        return found, {"tokens": lm.tokens, "seconds": seconds}

    @property
    def generates(self) -> bool:
        """Whether a task lets the model write its answers."""
        requests = [i for task in self.tasks.values() for of_item in task.instances for i in of_item]
        return any(request.request_type == "generate_until" for request in requests)

    def primaries(self, items: Mapping[str, Items]) -> dict[str, float]:
        """``{"tasks/<task>/<metric>": value}``: each task's usual figure."""
        return {f"tasks/{t}/{b.primary}": b.figures(items[t])[b.primary] for t, b in self.tasks.items()}


# --- tasks from names ------------------------------------------------------------------------------------------------


def load_suite(config: EvaluateConfig) -> Suite:
    """``evaluate.tasks`` with all requests, the same on every process. With ``task_limit``, a fixed random sample.

    Raises:
        UserError: unknown name, a task named twice, files that are missing or wrong, too few items for the examples.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it warns of is checked here, or said in the report
    manager, random_state = _manager(config), random.getstate()
    _check_names(config.tasks, manager)
    try:
        loaded = manager.load(list(config.tasks))
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        first_line = f"{error}\n".strip().partition("\n")[0]
        remedy = "name each task once, and for tasks of the hub check the network (HF_HUB_OFFLINE)"
        names = ", ".join(config.tasks)
        raise UserError(f"evaluate.tasks {names}: cannot be loaded ({first_line}); {remedy}") from error
    tasks = {name: _build(name, task, config) for name, task in loaded["tasks"].items()}
    random.setstate(random_state)  # lm-eval draws names for tasks, also where it does not need them
    return Suite(tasks, loaded.get("groups", {}))


def _manager(config: EvaluateConfig) -> TaskManager:
    """lm-eval's own tasks are some ten thousand files, which take seconds to list: only where one of them is named."""
    metadata: dict[str, Any] = {"task_data": config.task_data}
    local = TaskManager(include_path=str(LOCAL_TASKS), include_defaults=False, metadata=metadata)

    def is_local(name: str) -> bool:
        members = ((entry.cfg or {}).get("task") if (entry := local.task_index.get(name)) else None) or []
        if isinstance(members, str):
            return True
        return bool(members) and all(is_local(m if isinstance(m, str) else m["task"]) for m in members)

    if all(is_local(name) for name in config.tasks):
        return local
    return TaskManager(include_path=str(LOCAL_TASKS), metadata=metadata)


def _check_names(names: list[str], manager: TaskManager) -> None:
    for name in names:
        if name not in manager.task_index and not Path(name).expanduser().is_file():
            ours = [known for known in manager.all_tasks if known.startswith(name)] or manager.all_tasks
            near = difflib.get_close_matches(name, ours, n=3, cutoff=0.3)
            rule = f"no such task, group or file; did you mean {' or '.join(near) or 'seven'}?"
            raise UserError(f"evaluate.tasks {name!r}: {rule}")


def _build(name: str, task: Task, config: EvaluateConfig) -> Built:
    if config.num_fewshot is not None and task.config.num_fewshot != 0:  # 0 in a task's own file: it takes none
        task.set_config("num_fewshot", config.num_fewshot)
    shots = task.config.num_fewshot or 0
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
    docs = list(task.eval_docs)
    indices = list(range(len(docs)))
    if config.task_limit is not None and config.task_limit < len(docs):
        indices = sorted(random.Random(0).sample(indices, config.task_limit))
    if shots and not hasattr(task.sampler, "source") and (pool := len(task.sampler.df)) <= shots:
        raise UserError(f"evaluate.num_fewshot {shots}: task {name} has {pool} items to take examples from; lower it")
    built = Built(task)
    for i in indices:
        doc = docs[i]
        context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        made = task.construct_requests(doc=doc, ctx=context, metadata=(name, i, task.config.repeats))
        built.doc_ids.append(i)
        built.docs.append(doc)
        built.instances.append(made if isinstance(made, list) else [made])
    task._instances = list(itertools.chain(*built.instances))  # for its filters
    return built
