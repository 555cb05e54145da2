"""What a user can get wrong with each command of ``lp-train``: one line with value, rule and remedy, exit code 2.

Mistakes in a configuration are in ``mistakes.py``; here are those of the commands around it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
from eval_files import leave_only_arc
from mistake_files import HALVES, Place
from test_bad_inputs import no_weights, place, shared

from lp_train import cli
from lp_train.errors import UserError

__all__ = ["no_weights", "place", "shared"]

CONFIG, RUN = "{shared}/config.yaml", "{shared}/run"
TASK, BAD_FILES = f"evaluate {CONFIG} {RUN} evaluate.tasks", "evaluate.task_data={shared}/files"
SMALL = "bench infer --shape smollm2-135m --layers 4 --vocab 64 --batches 1 --contexts 8"
MISTAKES = {
    "finetun": r"'finetun': no such command; did you mean finetune\?",
    f"finetune {CONFIG} --resume --overwrite": r"--resume and --overwrite: the one goes on with what .*; give one",
    # doctor
    "doctor --plan": r"--plan: needs a configuration; give a YAML file, e\.g\. configs/demo\.yaml",
    "doctor {own}/none.yaml": r"none\.yaml: No such file or directory; give the path of a YAML file, e\.g\.",
    # select
    f"select {CONFIG}": r"nothing to do: give --sweep, --greedy N, --scores",
    f"select {CONFIG} --greedy 0": r"'auto:0': must be above 0; give auto:8",
    f"select {CONFIG} --greedy 9": r"'auto:9': 6 layers make 3 pairs at most; give auto:3 or less",
    f"select {CONFIG} --greedy many": r"'auto:many': not understood; give auto:8",
    f"select {CONFIG} --sweep plan.algebr=lp": r"plan\.algebr: unknown key; did you mean plan\.algebra\?",
    # heal
    f"heal {CONFIG} --rank 0": r"lora\.r 0: a rank is at least 1, for example 16",
    f"heal {CONFIG} --rank half": r"lora\.r 'half': expected an integer, for example 8",
    f"heal {CONFIG} --tokens 8": r"--tokens 8: less than one row of train\.max_length 64; give at least 64",
    f"heal {CONFIG} tune=full": r"tune 'full': the fit is written into adapters; use tune: lora",
    f"heal {CONFIG} plan.kind=drop": r"plan\.kind 'drop': only pairs can be healed; use plan\.kind: pair",
    f"heal {CONFIG} --out {{shared}}/model": r"/model': not empty; .*delete it with --overwrite, or name another",
    # evaluate
    f"evaluate {CONFIG} {{own}}/none": r"/none': there is no such folder; give a run folder",
    f"evaluate {CONFIG} {{shared}}/model": r"/model: holds no adapter or model of a run; name a run folder",
    f"evaluate {CONFIG} {RUN} model.name_or_path={{shared}}/other": r"made for base '\S+' .*, not for this.*; use that",
    f"evaluate {CONFIG} {RUN} evaluate.tasks=[piqa_lokal]": r"'piqa_lokal': no such task, group or file; did you mean",
    f"evaluate {CONFIG} {RUN} evaluate.tasks=[piqa_local]": r"task_data null: the folder with piqa\.jsonl; set it, or",
    f"evaluate {CONFIG} {RUN} evaluate.tasks=[piqa_local] evaluate.task_data={{own}}/none": r"/none': no such folder;",
    f"evaluate {CONFIG} {RUN} evaluate.task_limit=0": r"evaluate\.task_limit 0: must be at least 1",
    f"evaluate {CONFIG} {RUN} --pool": r"--pool: the mean of several runs needs a folder; add --output FOLDER",
    f"{TASK}=[piqa_local] evaluate.task_data={{shared}}/model": r"/model': no piqa\.jsonl in it; add the file or leave",
    f"{TASK}=[arc_easy_local] {BAD_FILES}": r"arc_easy\.jsonl, item 1: gold 2 is out of range; there are 2 choices",
    f"{TASK}=[lambada_local] {BAD_FILES}": r"lambada\.jsonl: the file is empty; ",
    f"{TASK}=[hellaswag_local] {BAD_FILES}": r"hellaswag_local: an item has [\d,]+ tokens .*, the model takes 512;",
    # export
    "export {own}/none {own}/out": r"/none': there is no such folder; give a run folder",
    "export {shared}/model {own}/out": r"/model: holds no adapter or model of a run; name a run folder",
    f"export {RUN} {{shared}}/model": r"/model: exists already; name a folder that does not, or delete it",
    f"export {RUN} {{own}}/out --merge": r"--merge: only the form sequential leaves out what was trained.*; leave it",
    # bench
    "bench train --shape smollm2-135m --layers 4 --pairs 1:4": r"'1:4': a window needs an even number of layers.*1:3",
    "bench train --shape smollm2-135m --layers 4 --pairs 8:10": r"pair 8-9 is out of range; the model has layers 0",
    "bench train --shape smollm2-135m --variants ours,z": r"--variants 'z': unknown; use some of ours,a,b,c",
    "bench infer --shape smollm2-135m --modes graph": r"a CUDA graph needs a GPU, and this is a CPU; use eager or",
    "bench infer --model {own}/none --modes eager": r"--model \S+/none: there is no such folder; give a run folder",
    f"{SMALL} --modes eager --parts decode --pairs 8:10": r"pair 8-9 is out of range; the model has layers 0 to 3",
    "bench table {own}/none.jsonl": r"none\.jsonl: No such file or directory; give the file that train --out wrote",
    f"bench table {CONFIG}": r"config\.yaml, line 1: not a JSON object with .*; give the file that train --out wrote",
    "bench predict {own}/none.jsonl": r"none\.jsonl: not the file that infer --out wrote \(.*No such file",
    "bench draft {shared}/model": r"/model: not the folder of a finished run; name one",
    f"bench scaling {CONFIG}": r"per_device_train_batch_size: missing; give the rows of one forward, for example 4",
    # report
    "report {own}/none": r"/none: neither report\.json nor evaluation\.json in it; name the folder of a finished run",
    f"report {RUN} {RUN}": r"several runs: their comparison needs a folder; add --out FOLDER",
    f"report {RUN} {RUN} --out {{shared}}/text.jsonl": r"--out \S+/text\.jsonl: a file; name a folder",
}
REFUSED_BY_ITS_PARSER = {  # argparse's own: usage, and one line that names the value
    f"select {CONFIG} --gredy 2": r"lp-train select: error: unrecognized arguments: --gredy 2",
    f"export {RUN} {{own}}/out --form fussed": r"--form: invalid choice: 'fussed' \(choose from '?fused",
    "bench train --shape llama-9b": r"--shape: invalid choice: 'llama-9b' \(choose from '?llama-70b",
    "bench infer --shape smollm2-135m --modes fast": r"--modes: 'fast' is unknown; use some of eager",
    "bench infer --shape smollm2-135m --also=--modes=fast": r"--also: error: .*'fast' is unknown; use some of eager",
    "bench infer --shape smollm2-135m --also='--modes": r"--also: .*No closing quotation",
    "bench loss --rows 0": r"--rows: 0: must be at least 1",
}


@pytest.fixture(autouse=True, scope="module")
def few_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_only_arc(patch, tmp_path_factory.mktemp("lm-eval"))
        yield


@pytest.fixture(autouse=True, scope="module")
def bad_files(shared: Path) -> None:
    """Of tasks: a gold out of range, no item, and one that is longer than the model's context."""
    item = {"query": "A list", "choices": ["one", "two"], "gold": 2}
    (shared / "files").mkdir()
    tiny_run.write_lines(shared / "files" / "arc_easy.jsonl", [item])
    tiny_run.write_lines(shared / "files" / "lambada.jsonl", [])
    tiny_run.write_lines(shared / "files" / "hellaswag.jsonl", [{**item, "query": "A list " * 300, "gold": 0}])


def arguments(command: str, place: Place) -> list[str]:
    return [part.format(shared=place.shared, own=place.own) for part in command.split()]


@pytest.mark.parametrize("command", MISTAKES)
def test_one_line_and_exit_code_2(command: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    before = files(place.own)
    capfd.readouterr()
    assert cli.main(arguments(command, place)) == 2
    printed = capfd.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in printed, printed
    assert re.search(MISTAKES[command], lines[0]), lines[0]
    assert files(place.own) == before  # nothing half-written


NO_ADAPTER = r"start_from '\S+/half': no adapter in it; give a run of tune: lora"
READS_A_RESULT = {  # commands, with what they say where it is not what HALVES says
    "export {own}/half {own}/out": {},
    "export {own}/half {own}/out --form adapter": {},
    f"evaluate {CONFIG} {{own}}/half": {},
    f"finetune {CONFIG} lora.start_from={{own}}/half train.output_dir={{shared}}/new": {
        "no adapter_config.json": NO_ADAPTER,
        "half a config.json": NO_ADAPTER,
        "half a model's weights": NO_ADAPTER,
    },
}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("command", READS_A_RESULT)
@pytest.mark.usefixtures("no_weights")
def test_half_a_result_is_one_line(command: str, name: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    make, says = HALVES[name]
    make(place)
    before = files(place.own)
    assert cli.main(arguments(command, place)) == 2
    printed = capfd.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in printed, printed
    assert re.search(READS_A_RESULT[command].get(name, says), lines[0]), lines[0]
    assert files(place.own) == before


@pytest.mark.parametrize("command", REFUSED_BY_ITS_PARSER)
def test_what_the_parser_refuses(command: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments(command, place))
    assert end.value.code == 2
    assert re.search(REFUSED_BY_ITS_PARSER[command], capfd.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    "command",
    [
        f"finetune {CONFIG} lora.r=0",
        "doctor {own}/none.yaml",
        f"select {CONFIG}",
        f"heal {CONFIG} --rank 0",
        f"evaluate {CONFIG} {{own}}/none",
        "export {own}/none {own}/out",
        "bench table {own}/none.jsonl",
        "report {own}/none",
    ],
)
def test_debug_shows_where_it_was_seen(command: str, place: Place) -> None:
    name, *rest = arguments(command, place)
    with pytest.raises(UserError):
        cli.main([name, "--debug", *rest])


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))
