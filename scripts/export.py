"""Makes a checkpoint of a finished run that Transformers loads by itself.

    python scripts/export.py runs/demo runs/demo-fused
    python scripts/export.py runs/demo runs/demo-paired --form paired
    python scripts/export.py runs/demo runs/demo-in-order --form sequential --merge
    python scripts/export.py runs/demo runs/demo-adapter --form adapter --push me/demo-adapter

Forms: fused, each pair one wide layer (what cannot be fused stays a pair, and is named); paired, two layers run side
by side; sequential, the original, with --merge holding what was trained for the pairs; adapter, for PEFT.
Seconds on a CPU for a small model; ACCELERATE_USE_CPU=1 keeps a large one off the GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from accelerate import PartialState
from huggingface_hub import HfApi, ModelCardData
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lp_train import modeling_layer_parallel, models
from lp_train.cluster.launch import quieten_libraries
from lp_train.config import load_config
from lp_train.data import RowCollator, data_of
from lp_train.errors import UserError, command_line, exit_code
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.evaluation.tables import fidelity_table, sentence
from lp_train.pairing import in_order, unpair_layers
from lp_train.pairing.fuse import blocks, config_of, listed, tensors
from lp_train.run_folder import CONFIG

FORMS = ("fused", "paired", "sequential", "adapter")
SHARD = 4 * 2**30  # bytes
SPARE = 2**26  # bytes of a checkpoint beside its weights, generously

Say = Callable[[str], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, writes, and returns the exit code: 2 for a mistake of the user, told in one line."""
    parser = command_line("export.py", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("--form", choices=FORMS, default="fused")
    parser.add_argument("--merge", action="store_true", help="sequential: with what was trained for the pairs in it")
    parser.add_argument("--push", metavar="USER/NAME", help="also upload it to this repository of the hub")
    options = parser.parse_args(arguments)
    quieten_libraries()
    PartialState(cpu=models.device().type == "cpu")
    return exit_code(lambda: run(options), options.debug)


def run(options: argparse.Namespace) -> None:
    export(options.run, options.out, options.form, options.merge)
    print(f"written: {options.out}")
    if options.push:
        print(f"uploaded: {push(options.out, options.push)}")


def export(
    run: Path, out: Path, form: str = "fused", merge: bool = False, shard: int = SHARD, say: Say = print
) -> dict[str, float]:
    """Writes the result of a run folder as ``form`` into ``out``, whole or not at all. Returns the NLLs it measured.

    ``fused`` and ``paired`` are read a layer at a time: besides the loaded model there is about one shard in memory.
    ``merge`` puts what was trained for the pairs into the ``sequential`` form, which is the original without it.

    Raises:
        UserError: no finished run, one whose files are not whole, another base, a target that exists, a full disk, a
            form that the run cannot take.
    """
    if out.exists():
        raise _already_there(out)
    if merge and form != "sequential":
        raise UserError(f"--merge: only the form sequential leaves out what was trained, not {form}; leave it out")
    folder = models._result_folder(str(run))
    record = models.read_stamp(folder)
    if form == "adapter":
        if not (folder / "adapter_config.json").exists():
            raise UserError(f"{run}: the run trained whole layers (tune: full), so there is no adapter; use fused")
        _write(out, lambda target: shutil.copytree(folder, target, dirs_exist_ok=True))
        return {}
    if (kind := record.get("kind")) is not None:
        raise UserError(f"{run}: plan.kind {kind}, a control without an exported form; lp_train.load opens it")
    model, tokenizer, nll = _load(run, record, merge, say)
    _check_space(out, sum(p.numel() * p.element_size() for p in model.parameters()) + SPARE)
    card = _card(run, form, merge, record, nll)

    def write(target: Path) -> None:
        if form == "sequential":
            _write_in_order(model, target, merge, record["base"], shard)
        else:
            _write_layers(model, target, form, shard, say)
        model.generation_config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "README.md").write_text(card)

    _write(out, write)
    return nll


def _write(out: Path, write: Callable[[Path], Any]) -> None:
    try:
        written = models.write_folder(out, write, keep=True)
    except (OSError, SafetensorError) as error:
        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error  # of several files, the first one's
        raise UserError(f"{out}: cannot be written ({reason}); nothing of it was left") from error
    if not written:
        raise _already_there(out)


def _already_there(out: Path) -> UserError:
    return UserError(f"{out}: exists already; name a folder that does not, or delete it")


def push(folder: Path, repository: str) -> str:
    """Uploads an exported folder. Returns its address."""
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except (OSError, ValueError) as error:  # what huggingface_hub raises derives from these
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--push {repository!r}: {reason}; {folder} is complete: `hf upload {repository} {folder}`"
        ) from error


LOADS = {
    "sequential": "It is a model of its family like any other.",
    "fused": """Its pairs are single wide layers. It loads after `import lp_train`, or without it from the file in here:
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`""",
}
LOADS["paired"] = LOADS["fused"].replace("are single wide layers", "are two layers run side by side")


def _card(run: Path, form: str, merge: bool, record: Mapping[str, Any], nll: Mapping[str, float]) -> str:
    """README.md: what this is, how it loads, and the figures of the run."""
    pairs = ", ".join("+".join(map(str, pair)) for pair in record["pairs"])
    what = f"`{record['base']['name']}`" + (f" with layers {pairs} run in parallel" if form != "sequential" else "")
    lines = [f"# {run.resolve().name}, {form}", f"{what} (`{record['algebra']}`, arXiv 2502.02790). {LOADS[form]}"]
    if form == "sequential":
        trained = "Holds what was trained for the pairs, run in order." if merge else "The original, untouched."
        lines[1] = f"{what}. {LOADS[form]} {trained}"
    lines += [f"Held-out NLL, {name}: {value:.4f} nats per token." for name, value in nll.items()]
    if form != "sequential" and (run / "report.json").exists():
        report = json.loads((run / "report.json").read_text())
        lines += [sentence(report), str(fidelity_table(report))]
    head = ModelCardData(base_model=record["base"]["name"], library_name="transformers", tags=["layer-parallel"])
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


def _check_space(out: Path, needed: int) -> None:
    place = next(path for path in out.absolute().parents if path.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise UserError(f"{out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; name another place")


def _load(run: Path, record: dict[str, Any], merge: bool, say: Say) -> tuple[nn.Module, Any, dict[str, float]]:
    """The paired model in full precision, and the NLLs that the export owes: of merging, of leaving 4 bits."""
    nll, dtype = {}, record["base"]["dtype"]  # the run's: a checkpoint is the same whichever machine exports it
    four_bits = record["base"]["quantization"] is not None
    if four_bits:
        nll["trained in 4 bits"] = _nll(run, *models.load(str(run), dtype=dtype), as_it_is)
        gc.collect()
    model, tokenizer = models.load(str(run), dtype=dtype, full_precision=True)
    if four_bits:
        now = nll["full precision"] = _nll(run, model, tokenizer, as_it_is)
        say(f"held-out nll: {nll['trained in 4 bits']:.4f} on the base in 4 bits, {now:.4f} in full precision")
    if merge:
        nll["merged, in order"] = _nll(run, model, tokenizer, in_order)
        say(f"held-out nll with the trained weights run in order: {nll['merged, in order']:.4f}")
    return model, tokenizer, nll


def _nll(
    run: Path, model: nn.Module, tokenizer: Any, variant: Callable[[nn.Module], AbstractContextManager[Any]]
) -> float:
    """Nats per token on the run's own held-out text."""
    if not (run / CONFIG).exists():
        raise UserError(f"{run}: this form needs its NLL, and there is no {CONFIG} to tell the text; give a run folder")
    config = load_config(run / CONFIG, ["loss.kd_on=all", "train.seed=0"])
    length = config.train["max_length"]
    data = data_of(config, tokenizer, train_tokens=length)
    collate = RowCollator(length, tokenizer.pad_token_id or 0)
    return measure(model, data.eval, collate, config.evaluate.batch_size, {"this": variant})["this"].nll


def _write_in_order(model: nn.Module, target: Path, merge: bool, base: dict[str, Any], shard: int) -> None:
    adapted = isinstance(model, PeftModel)
    if merge:
        plain = model.merge_and_unload() if adapted else model
    elif adapted:
        plain = model.unload()
    else:
        plain = models.load_base(models._recorded_config({**base, "quantization": None}, None, base["dtype"]))
    if getattr(plain.config, "layer_parallel", None):
        unpair_layers(plain)
    plain.save_pretrained(target, max_shard_size=shard)


def _write_layers(model: nn.Module, target: Path, form: str, shard: int, say: Say) -> None:
    made, kept = blocks(model, form)
    if form == "fused":
        if all(len(block) == 1 for block in made):
            raise UserError(f"no pair can be fused: {listed(kept)}; use --form paired")
        for line in listed(kept).split("; ") if kept else ():
            say(f"stays a pair: {line}")
    original = model.config.to_dict()
    original.pop("layer_parallel")
    (target / "original_config.json").write_text(json.dumps(original, indent=2, default=str))
    config = config_of(model, made)
    config.dtype = model.get_input_embeddings().weight.dtype
    names = [made.__name__ for made in modeling_layer_parallel.CLASSES[model.config.model_type]]
    config.architectures = names[1:]
    file = Path(modeling_layer_parallel.__file__)
    config.auto_map = {"AutoConfig": f"{file.stem}.{names[0]}", "AutoModelForCausalLM": f"{file.stem}.{names[1]}"}
    config.save_pretrained(target)
    shutil.copyfile(file, target / file.name)
    write_shards(target, tensors(model, made), shard)


def write_shards(folder: Path, named: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Safetensors of at most ``limit`` bytes each (a larger tensor is alone) and their index, one shard in memory."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / f"shard-{len(files)}", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, tensor in named:
        bytes_ = tensor.numel() * tensor.element_size()
        if held and size + bytes_ > limit:
            flush()
            size = 0
        held[name] = tensor.detach().to("cpu", copy=False).contiguous()
        size, total = size + bytes_, total + bytes_
    flush()
    if len(files) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for i, keys in enumerate(files):
        final = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / final)
        places |= dict.fromkeys(keys, final)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    sys.exit(main())
