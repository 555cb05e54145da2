"""W&B by its real client, which can reach nothing: one run over all starts, kept whole in the run folder.

The programs are started afresh: each client deletes at its end a folder that it makes when it is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from launched import ROOT, Program, ends, losses, start
from transformers import PreTrainedTokenizerFast

from lp_train import track
from lp_train.config import TrackConfig

pytest.importorskip("wandb")
KEY = "0123456789abcdef" * 2 + "01234567"
NOWHERE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
TOKEN = "hf_f00dfeedf00dfeed"


@pytest.fixture
def no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)  # conftest.py disables it


def wandb(*arguments: str) -> str:
    """The client's own command, without a word to its server."""
    command = [str(Path(sys.executable).with_name("wandb")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **NOWHERE})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("no_mode")
def test_a_resumed_run_without_network_is_one_run(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    program = Program(tmp_path, tiny_tokenizer, "track.wandb=auto", "track.project=p", "track.tags=[a]")
    outputs = []
    for options in (["train.max_steps=2"], ["train.max_steps=4", "--resume"]):
        codes, output = ends(program.start("run", *options, afresh=True, HF_TOKEN=TOKEN, **NOWHERE))
        assert codes == [0], output
        outputs.append(output)
    folder = tmp_path / "run"
    line = f"W&B: 127.0.0.1:9 cannot be reached; the run is kept in {folder}/wandb, for: bash scripts/wandb_sync.sh"
    assert all(output.count(line) == 1 for output in outputs), outputs
    assert sorted(losses(folder)) == [1, 2, 3, 4] and (folder / "report.json").exists()

    parts, number = sorted((folder / "wandb").glob("offline-run-*")), (folder / "wandb_id").read_text()
    assert len(parts) == 2 and all(part.name.endswith(number) for part in parts)
    found = [json.loads(wandb("leet", "inspect", "--summary", "--json", str(part))) for part in parts]
    assert [summary(f)["train/global_step"] for f in found] == [2, 4]  # W&B's own step begins again
    assert summary(found[1])["recovered/kl"] == json.loads((folder / "report.json").read_text())["recovered"]["kl"]
    records = [
        json.loads(text) for text in wandb("leet", "inspect", "--json", str(parts[1])).splitlines() if text[0] == "{"
    ]
    assert {"glob_name": "eval/*", "step_metric": "train/global_step"}.items() <= {
        k: v for r in records if r["type"] == "metric" and "eval" in str(r) for k, v in r["metric"].items()
    }.items()
    run = next(json.dumps(record) for record in records if record["type"] == "run")
    assert '"config"' in run and "global_batch_tokens" in run and "transformers" in run

    dry = subprocess.run(
        ["bash", str(ROOT / "scripts" / "wandb_sync.sh"), "--dry-run", str(folder)],
        env={**os.environ, **NOWHERE, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert dry.returncode == 0 and all(part.name in dry.stdout + dry.stderr for part in parts), dry.stderr
    texts = [*outputs, *(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())]
    assert not [text for text in texts if KEY in text or TOKEN in text]


def summary(found: dict[str, Any]) -> dict[str, Any]:
    return found["summary"]


class Refuses(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


START = """
import sys; from pathlib import Path; import wandb
from lp_train import track; from lp_train.config import TrackConfig
track.start(TrackConfig(wandb="online"), Path(sys.argv[1]), "name", {"a": 1})
wandb.log({"eval/kl": 1.0, "train/global_step": 7})
"""


@pytest.mark.slow
@pytest.mark.usefixtures("no_mode")
def test_a_server_that_refuses_the_key_costs_a_line(refusing_server: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(START)
    command = [str(tmp_path / "program.py"), str(tmp_path)]
    codes, output = ends(start(command, afresh=True, **{**NOWHERE, "WANDB_BASE_URL": refusing_server}))
    assert codes == [0], output
    assert "W&B: " in output and "401" in output and f"the run is kept in {tmp_path}/wandb" in output
    (part,) = (tmp_path / "wandb").glob("offline-run-*")
    found = json.loads(wandb("leet", "inspect", "--summary", "--json", str(part)))
    assert summary(found)["train/global_step"] == 7 and KEY not in output


def test_modes_and_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert track.choose_mode(TrackConfig(wandb="off")) == ("off", "track.wandb is off")
    assert track.choose_mode(TrackConfig(wandb="offline"))[0] == "offline"
    assert track.choose_mode(TrackConfig(wandb="online")) == ("offline", "no key for api.wandb.ai; run `wandb login`")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
    assert track.choose_mode(TrackConfig()) == ("offline", "127.0.0.1:9 cannot be reached")
    assert track.choose_mode(TrackConfig(wandb="online")) == ("online", "as asked")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert track.choose_mode(TrackConfig()) == ("online", "through the proxy of HTTPS_PROXY")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert track.choose_mode(TrackConfig()) == ("disabled", "WANDB_MODE is disabled")
