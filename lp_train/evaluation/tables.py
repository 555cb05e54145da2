"""The figures of a report or an evaluation as tables and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from lp_train.evaluation.page import Table, literal
from lp_train.evaluation.plots import NAMES

STEPS_PER_LINE = 18  # of the drawn plan: 72 columns
MODELS = {**NAMES, "control": "control (not paired)"}
FIDELITY = ("model", "depth", "NLL", "perplexity", "KL", "top-1\nagreement", "NLL\nwon back", "KL\nwon back")


def tables(document: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of figures that a report or an evaluation has something for."""
    found = {"fidelity": fidelity_table(document)}
    if (domains := (document.get("fidelity_by_domain") or {}).get("domains")) and len(domains) > 1:
        found["domains"] = domain_table(domains)
    return found


def fidelity(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The held-out figures by model, of an evaluation, a report or both together."""
    return {**document, **document.get("fidelity", {})}


def fidelity_table(document: Mapping[str, Any]) -> Table:
    """The original and what pairs made of it."""
    models = [model for model in MODELS if model in fidelity(document)]
    return Table(FIDELITY, [fidelity_row(MODELS[model], document, model) for model in models])


def fidelity_row(title: str, document: Mapping[str, Any], model: str) -> tuple[str, ...]:
    f, won = fidelity(document)[model], document.get("recovery") if model == "recovered" else None
    depth = document["effective_depth"] if model in ("paired", "recovered") else document["plan"]["num_layers"]
    figures = (f"{f['nll']:.4f}", f"{f['ppl']:.2f}", f"{f['kl']:.4f}", f"{f['top1_agreement']:.1%}")
    back = ["" if won is None else "unclear" if won[k] is None else f"{won[k]:.0%}" for k in ("nll", "kl")]
    return (title, str(depth), *figures, *back)


def checkpoint_table(by_step: Mapping[str, Mapping[str, Any]]) -> Table:
    """Evaluations of one run's checkpoints: held-out figures, and tasks and groups as they are, in per cent or nats."""
    scores = {}
    for step, document in by_step.items():
        found = {**document["tasks"], **document["groups"]}
        scores[step] = {short(name): task["comparisons"]["recovered"]["other"] for name, task in found.items()}
    names = list(dict.fromkeys(name for of_step in scores.values() for name in of_step))
    rows = []
    for step, document in by_step.items():
        figures = fidelity(document)["recovered"]
        row = [step, f"{figures['nll']:.4f}", f"{figures['kl']:.4f}", f"{100 * figures['top1_agreement']:.1f} %"]
        rows.append([*row, *(f"{scores[step][name]:.4f}" if name in scores[step] else "" for name in names)])
    return Table(("step", "NLL", "KL", "top-1 agreement", *names), rows)


def short(task: str) -> str:
    """A task's name as in lm-eval: those that read local files end in ``_local``."""
    return task.removesuffix("_local")


def domain_table(domains: Sequence[Mapping[str, Any]]) -> Table:
    models = [model for model in MODELS if model in domains[0]["models"] and model != "sequential"]
    columns = ["text", "tokens", "NLL of the original", *(f"KL, {MODELS[model]}" for model in models)]
    rows = []
    for row in domains:
        kl = [f"{row['models'][model]['kl']:.3f}" for model in models]
        rows.append((literal(row["domain"]), f"{row['tokens']:,}", f"{row['models']['sequential']['nll']:.3f}", *kl))
    return Table(columns, rows)


def sentence(report: Mapping[str, Any]) -> str:
    """The result in words."""
    layers, depth = report["plan"]["num_layers"], report["effective_depth"]
    text = f"{_change(report['plan'])} makes the longest path {depth} layers instead of {layers} "
    text += f"and costs {report['gap']['nll']:.3f} nats per token; {_effort(report)} "
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


def _change(plan: Mapping[str, Any]) -> str:
    kind, removed = plan.get("kind", "pair"), ", ".join(map(str, plan.get("removed", ())))
    done = {"drop": f"Dropping layers {removed}", "merge": f"Merging layers {removed} into those before them"}
    done |= {"none": "Training with all layers in order (a control)"}
    return done.get(kind, f"Running {len(plan['pairs'])} pairs of layers side by side")


def _effort(report: Mapping[str, Any]) -> str:
    if healed := report.get("heal"):
        return f"a closed-form fit on {healed['tokens']:,} tokens in {healed['seconds']:.0f} s"
    start = " from a healed start" if "healed_start" in report else ""
    return f"training on {report['train']['trained_tokens']:,} tokens{start} in {report['train']['seconds']:.0f} s"


def answers(sample: dict[str, str]) -> str:
    """One prompt, answered by each model."""
    lines = [f"Prompt: {sample['prompt']}"]
    lines += [f"- **{MODELS[key]}**: {sample[key].strip()}" for key in MODELS if key in sample]
    return "\n".join(lines)


def draw(plan: Mapping[str, Any]) -> str:
    """The layers of a report's ``plan`` from left to right, a pair's one above the other; × where one is gone."""
    pairs = plan.get("kind", "pair") == "pair"
    partner, removed = dict(plan["pairs"]) if pairs else {}, plan.get("removed", ())
    cells = []
    for i in range(plan["num_layers"]):
        if i in partner:
            cells.append((f"╭{i:>2}╮", "┤  ├", f"╰{partner[i]:>2}╯"))
        elif i not in partner.values():
            cells.append(("    ", "─ × " if i in removed else f"─{i:>2}─", "    "))
    lines = [cells[at : at + STEPS_PER_LINE] for at in range(0, len(cells), STEPS_PER_LINE)]
    rows = ("".join(row).rstrip() for line in lines for row in zip(*line, strict=True))
    return "\n".join(row for row in rows if row)
