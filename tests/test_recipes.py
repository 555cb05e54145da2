"""The recipes: their tables are what the calculators and the stored measurements say."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_run
from test_documents import commands
from transformers import PreTrainedTokenizerFast

import bench
from benchmarks import expect, page, results
from benchmarks.case import Case
from lp_train.config import load_config
from lp_train.dry_run import dry_run
from lp_train.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
COMPUTED = [page.parent.name for page in sorted(RECIPES.glob("*/README.md")) if expect.MARKS[0] in page.read_text()]
ESTIMATES = {
    path.name: match[1]
    for path in sorted(ROOT.glob("configs/*.yaml"))
    if (match := re.search(r"\((\d+) GiB by the estimate of --dry-run\)", path.read_text()))
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_model_of_the_overview_has_a_page() -> None:
    listed = re.findall(r"^\| \[[^]]+\]\((\w+)/README\.md\)", (RECIPES / "README.md").read_text(), flags=re.MULTILINE)
    assert {"llama3b", "llama8b", "llama2_7b", "qwen3_4b"} <= set(COMPUTED) < set(listed)
    assert all((ROOT / "configs" / f"{name}.yaml").is_file() for name in COMPUTED)


@pytest.mark.parametrize("name", COMPUTED)
def test_the_table_of_a_page_is_what_its_command_writes(name: str) -> None:
    page = (RECIPES / name / "README.md").read_text()
    assert f"lp-train bench expect configs/{name}.yaml --page recipes/{name}/README.md" in page
    made = expect.table(expect.rows(load_config(f"configs/{name}.yaml", [])))
    assert made in page, f"write the page again by the command in it; the table now is\n{made}"


@pytest.mark.parametrize(
    "path", [path for path in sorted(RECIPES.rglob("*.md")) if page.TABLE.search(path.read_text())]
)
def test_measured_tables_are_what_their_files_say(path: Path) -> None:
    assert path.read_text().count("<!-- table:") == len(page.TABLE.findall(path.read_text()))
    assert page.written(path) == path.read_text(), f"run PYTHONPATH=.:scripts python -m benchmarks.page {path}"


def test_a_table_is_made_anew_from_its_files(tmp_path: Path) -> None:
    measured = (RECIPES / "benchmarks/results/sweep_h200/sweep.jsonl").read_text().splitlines()[0]
    (tmp_path / "a.jsonl").write_text(json.dumps({**json.loads(measured), "us_per_token": {"ours": 10.0, "c": 15.0}}))
    (tmp_path / "page.md").write_text(
        "# Page\n<!-- table: sweep *.jsonl -->\n| seq 1024 | 1.00 |\n<!-- end -->\nAfter it.\n"
    )
    made = page.written(tmp_path / "page.md")
    assert made.startswith("# Page\n<!-- table: sweep *.jsonl -->\nNVIDIA H200; torch 2.11.0")
    assert "| seq 1024 | 10.00 | 15.00 | 1.50 x |" in made and made.endswith("<!-- end -->\nAfter it.\n")
    (tmp_path / "odd.md").write_text("<!-- table: sweeps *.jsonl -->\n<!-- end -->")
    with pytest.raises(UserError, match="table 'sweeps': no such kind; use one of training"):
        page.written(tmp_path / "odd.md")
    (tmp_path / "a.jsonl").rename(tmp_path / "b.json")
    with pytest.raises(OSError, match="No such file"):
        page.written(tmp_path / "page.md")


def test_a_table_of_steps_that_are_not_one_run(tmp_path: Path) -> None:
    lines = (RECIPES / "benchmarks/results/infer_h200/3b.jsonl").read_text().splitlines()
    in_turn = [json.loads(line) for line in lines]
    for number, line in enumerate(in_turn):
        line["cell"]["round"] = number  # no two of one
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, in_turn)))
    assert "| 5.18 | 4.59 | not run |" in page.inference([tmp_path / "a.jsonl"])
    (tmp_path / "b.jsonl").write_text(lines[0].replace('"commit": "', '"commit": "0'))
    with pytest.raises(UserError, match="2 runs, and a prediction is of one; name its file"):
        page.prediction([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_where_the_ms_of_a_step_go(tmp_path: Path) -> None:
    line = json.loads((RECIPES / "benchmarks/results/tensor_parallel_h200/8b.jsonl").read_text().splitlines()[0])
    cell = {**line["cell"], "batch": 1, "context": 512}
    in_order = {**cell, "ms": 8.0, "all_reduces": 65, "all_reduce_ms": 1.0, "other_kernels_ms": 6.0}
    fused = {**cell, "form": "fused", "pairs": "15:29", "layers": 25}
    fused |= {"ms": 6.0, "all_reduces": 51, "all_reduce_ms": 0.8, "other_kernels_ms": 4.7}
    others = [
        {**in_order, "context": 4096, "ms": 80.0},
        {**fused, "batch": 8},
        {**fused, "mode": "compile"},
        {**fused, "form": "paired"},
        {**cell, "context": 16},  # not profiled
    ]

    def write(*cells: dict[str, object]) -> list[Path]:
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({**line, "cell": cell}) for cell in cells))
        return [tmp_path / "a.jsonl"]

    made = page.split(write(*others, in_order, fused)).splitlines()
    assert made[0].startswith("2 x NVIDIA H200; torch 2.11.0")
    assert made[4:] == [
        "| llama-8b, in order | 8.00 | 65 | 1.00 | 6.00 | 1.00 |  |  |  |  |",
        "| llama-8b, 7 | 6.00 | 51 | 0.80 | 4.70 | 0.50 | 2.00 | 10% | 65% | 25% |",
    ]
    with pytest.raises(UserError, match="llama-8b: no step in order was profiled; measure with --profile"):
        page.split(write(fused))


@pytest.mark.parametrize(
    ("shape", "options", "version", "names"),
    [
        ("llama-8b", {}, None, []),
        ("llama-8b", {"fp8": True}, "4.0.0b36", ["FP8", "FlashAttention 4"]),
        ("llama-3b", {"gradient_checkpointing": True}, None, ["checkpointing"]),
        ("smollm2-135m", {}, "4.0.0b36", []),  # its heads have 64 values
    ],
)
def test_what_a_step_had_beyond_the_plain_one(
    shape: str, options: dict[str, bool], version: str | None, names: list[str]
) -> None:
    found = {"case": asdict(Case(shape, **options)), "versions": {"flash-attn-4": version}}
    assert results.beyond_the_plain_step(found) == names


@pytest.mark.parametrize("name", COMPUTED)
def test_the_commands_of_a_page_are_those_of_the_overview(name: str) -> None:
    smaller_batch = " train.per_device_train_batch_size=4"  # not on every page
    of_overview, of_page = (
        [c.replace(smaller_batch, "") for c in commands([RECIPES / of / "README.md"])] for of in ("", name)
    )
    assert len(of_page) > 10
    page_alone = {f"lp-train bench expect configs/{name}.yaml --page recipes/{name}/README.md"}
    assert set(of_page) - page_alone <= {command.replace("llama3b", name) for command in of_overview}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_a_page_says_of_8_gpus_divides(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (RECIPES / name / "README.md").read_text()
    asked = re.findall(r"8 GPUs \(`([\w.=]+)`", page)
    dry_run(load_config(f"configs/{name}.yaml", asked), 8)
    assert "x 8 processes x 1024 = 32,768 tokens" in capsys.readouterr().out
    if asked:
        with pytest.raises(UserError, match="per_device_train_batch_size"):
            dry_run(load_config(f"configs/{name}.yaml", []), 8)


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_head_of_a_config_has_the_memory_of_its_dry_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(load_config(f"configs/{name}", ["data.train=builtin:pydocs"]), 1)
    (total,) = re.findall(r"^  sum +([\d.]+) GiB", capsys.readouterr().out, flags=re.MULTILINE)
    assert f"{float(total):.0f}" == ESTIMATES[name]


# --- expect ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    model = tiny_run.save_model(tmp_path / "model", tiny_tokenizer)
    path = tiny_run.write_config(tmp_path / "tiny.yaml", model, tiny_run.write_text(tmp_path / "text.jsonl"))
    return str(path)


def test_a_shape_without_measurements_has_computed_rows_alone(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{expect.MARKS[0]}old\n{expect.MARKS[1]}below\n")
    command = ["expect", config, "train.global_batch_tokens=512", "--page", str(page)]
    assert bench.main(command) == 0
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["expected"]
    assert [row[0] for row in found] == [
        "train on 0.0 M tokens, one H200, 1 rows each",
        "train on 0.0 M tokens, 8 H200 by DDP, 1 rows each",
        "decode, in order or fused",
    ]
    assert all(source.startswith("computed") for *_, source in found)
    assert page.read_text() == f"above\n{expect.MARKS[0]}{expect.table(found)}\n{expect.MARKS[1]}below\n"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.max_steps=null", "train.num_train_epochs=1"], "train.max_steps: missing, and epochs depend on"),
        (["plan.pairs=2:9"], "pair"),
    ],
)
def test_a_mistake_is_one_line(
    overrides: list[str], says: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["expect", config, *overrides]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and says in shown and shown.count("\n") == 1
