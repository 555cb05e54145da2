"""What a run found: report.json, report.md, the plot, and the adapter's model card."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import accelerate
import matplotlib
import torch

from lp_train.evaluation.fidelity import Fidelity, standard_error

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODELS = {"sequential": "original", "paired": "paired", "recovered": "recovered", "control": "control (not paired)"}
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def gap(sequential: Fidelity, paired: Fidelity) -> dict[str, float]:
    """What pairing costs, nats per token, each with its standard error over rows of the same text."""
    tokens = paired.tokens
    return {
        "nll": paired.nll - sequential.nll,
        "nll_se": standard_error(paired.nll_sums - sequential.nll_sums, tokens),
        "kl": paired.kl,
        "kl_se": standard_error(paired.kl_sums, tokens),
    }


def recovery(sequential: Fidelity, paired: Fidelity, recovered: Fidelity) -> dict[str, float | None]:
    """(paired - recovered) / (paired - sequential) for NLL and KL; None where that gap is below two standard errors."""
    found = gap(sequential, paired)
    won = {"nll": paired.nll - recovered.nll, "kl": paired.kl - recovered.kl}
    return {name: won[name] / found[name] if found[name] > 2 * found[f"{name}_se"] else None for name in won}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and the engine as it really runs."""
    state = accelerate.PartialState()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "device": name,
        "commit": _commit(),
        "distributed_type": str(state.distributed_type.value),
        "num_processes": state.num_processes,
        "backend": state.backend,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with ``+changes`` where files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if status.stdout.strip() else "")


# --- in words --------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| model | depth | NLL | perplexity | KL | top-1 agreement |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, name in MODELS.items():
        if (row := report.get(key)) is None:
            continue
        depth = report["effective_depth"] if key in ("paired", "recovered") else report["plan"]["num_layers"]
        lines.append(
            f"| {name} | {depth} | {row['nll']:.4f} | {row['ppl']:.2f} | {row['kl']:.4f} | "
            f"{row['top1_agreement']:.1%} |"
        )
    return "\n".join(lines)


def sentence(report: dict[str, Any]) -> str:
    """The result in words."""
    train, layers, depth = report["train"], report["plan"]["num_layers"], report["effective_depth"]
    text = (
        f"Running {len(report['plan']['pairs'])} pairs of layers side by side makes the longest path {depth} layers "
        f"instead of {layers} and costs {report['gap']['nll']:.3f} nats per token; "
        f"training on {train['trained_tokens']:,} tokens in {train['seconds']:.0f} s "
    )
    nll, kl = report["recovery"]["nll"], report["recovery"]["kl"]
    if nll is None or kl is None:
        return text + "cannot be judged: the cost is within twice its standard error on this text."
    text += f"won back {nll:.0%} of that, and {kl:.0%} of the KL divergence to the original."
    if report.get("control"):
        text += (
            f" The loss has a cross-entropy term, which also moves an unpaired model: trained the same way it reaches "
            f"NLL {report['control']['nll']:.4f}, so read the NLL recovery against that and trust the KL."
        )
    return text


def markdown(report: dict[str, Any]) -> str:
    """report.md: sentence, table, answers, how it was made."""
    parts = [f"# {report['name']}", sentence(report), table(report)]
    parts.append(
        f"Measured on {report['evaluation']['tokens']:,} held-out tokens "
        f"({report['evaluation']['rows']} rows). KL is KL(original ‖ model) in nats per token."
    )
    if report.get("unquantised"):
        parts.append(f"The original before quantisation has NLL {report['unquantised']['nll']:.4f} on the same text.")
    if report.get("sample"):
        parts.append(answers(report["sample"]))
    parts.append("![recovery](plots/recovery.png)")
    train, env = report["train"], report["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    parts.append(
        f"{train['tokens']:,} tokens ({train['trained_tokens']:,} trained, {train['dropped_tokens']:,} dropped), "
        f"{train['tokens_per_second']:,.0f} tokens/s, peak memory {train['peak_memory_gib']:.1f} GiB. "
        f"{env['device']}, {env['num_processes']} process(es), {env['distributed_type']}. {versions}. "
        f"Commit {env['commit']}."
    )
    return "\n\n".join(parts) + "\n"


def answers(sample: dict[str, str]) -> str:
    """One prompt, answered by each model."""
    lines = [f"Prompt: {sample['prompt']}"]
    lines += [f"- **{MODELS[key]}**: {sample[key].strip()}" for key in MODELS if key in sample]
    return "\n".join(lines)


def model_card(report: dict[str, Any], base: str) -> str:
    """README.md of the folder ``adapter/`` (``tune: lora``) or ``model/`` (``tune: full``)."""
    library, loader = {"lora": ("peft", "PeftModel"), "full": ("transformers", "AutoModelForCausalLM")}[report["tune"]]
    return f"""---
base_model: {base}
library_name: {library}
tags: [layer-parallel]
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
"""


def plot_recovery(path: Path, history: list[dict[str, Any]], report: dict[str, Any], tokens_per_step: int) -> None:
    """Held-out NLL and KL over training tokens, between the original and the untrained pairs."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(axes, ("nll", "kl"), ("NLL", "KL to the original"), strict=True):
        points = [(line["step"] * tokens_per_step, line[f"eval_{key}"]) for line in history if f"eval_{key}" in line]
        points = [(0, report["paired"][key]), *points]
        axis.plot(*zip(*points, strict=True), marker="o", color="tab:blue", label="paired, in training")
        axis.axhline(report["paired"][key], color="tab:red", linestyle="--", label="paired, untrained")
        axis.axhline(report["sequential"][key], color="tab:green", linestyle="--", label="original")
        won = report["recovery"][key]
        axis.set_title(f"{label}: {'gap too small to judge' if won is None else f'{won:.0%} won back'}")
        axis.set(xlabel="training tokens", ylabel="nats per token")
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{report['name']}: depth {report['plan']['num_layers']} → {report['effective_depth']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(folder: Path, report: dict[str, Any], history: list[dict[str, Any]], tokens_per_step: int) -> None:
    """report.json, report.md and plots/ in the run folder."""
    plot_recovery(folder / "plots" / "recovery.png", history, report, tokens_per_step)
    for name, text in (("report.json", json.dumps(_finite(report), indent=2) + "\n"), ("report.md", markdown(report))):
        (temporary := folder / f".{name}").write_text(text)
        temporary.rename(folder / name)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity (a standard error over one row): null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
