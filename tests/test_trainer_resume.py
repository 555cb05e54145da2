"""PairedTrainer's checkpoints: resuming is exact, and a run that diverges stops before it spoils them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_trainer import Make, adapter, assert_same_weights, logged, packed_rows, trainer_maker
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lp_train.distill.trainer import TrainingStopped
from lp_train.pairing import unpair_layers


@pytest.fixture
def make(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Make:
    return trainer_maker(tiny_llama, tiny_tokenizer, tmp_path)


# --- checkpoints


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(make: Make, logging_steps: int) -> None:
    options = {"rows": 20, "max_steps": 9, "dropout": 0.1, "learning_rate": 1e-2, "logging_steps": logging_steps}
    whole = make(name="whole", save_strategy="steps", save_steps=3, **options)  # step 3 ends the first epoch
    whole.train()
    for stopped_at in (3, 6):
        resumed = make(name=f"resumed{stopped_at}", **options)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{stopped_at}")
        assert resumed.state.global_step == 9
        assert logged(resumed) == logged(whole)
        assert_same_weights(adapter(resumed.model), adapter(whole.model), 0)
        assert int(resumed.trained_tokens) == int(whole.trained_tokens) == logged(whole, "trained_tokens")[-1]
        assert resumed.seconds > 0


def test_totals_go_on_from_the_checkpoint(make: Make, tmp_path: Path) -> None:
    first = make(name="first", max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    totals = tmp_path / "first" / "checkpoint-2" / "totals.json"
    saved = json.loads(totals.read_text())
    assert saved["trained_tokens"] == logged(first, "trained_tokens")[1]
    assert saved["processes"] == [1, "NO"]
    totals.write_text(json.dumps({**saved, "trained_tokens": 10**6, "seconds": 1000.0}))
    resumed = make(name="resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(totals.parent))
    steps = np.diff([0, *logged(first, "trained_tokens")])
    assert int(resumed.trained_tokens) == 10**6 + steps[2:].sum()
    assert 1000 < resumed.seconds < 1060


def test_a_checkpoint_holds_the_adapter_under_its_usual_names(make: Make, tmp_path: Path) -> None:
    trainer = make(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    unpair_layers(trainer.model)
    expected = {name.replace(".default", ""): value for name, value in adapter(trainer.model).items()}
    assert_same_weights(saved, expected, 0)


# --- divergence of the training


class Spoil(TrainerCallback):
    """Multiplies one weight of the adapter, or its gradient, at one step."""

    def __init__(self, step: int, factor: float, gradient: bool = False) -> None:
        self.step, self.factor, self.gradient = step, factor, gradient

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradient and state.global_step + 1 == self.step:
            for name, parameter in model.named_parameters():
                if "layers.3.mlp.down_proj.lora_B" in name:
                    parameter.data *= self.factor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.gradient and state.global_step + 1 == self.step:
            next(p for p in model.parameters() if p.requires_grad).grad *= self.factor


def newest_is_finite(folder: Path) -> str:
    newest = get_last_checkpoint(str(folder))
    assert newest is not None
    assert all(value.isfinite().all() for value in load_file(f"{newest}/adapter_model.safetensors").values())
    return newest


@pytest.mark.parametrize("factor", [math.nan, 1e4], ids=["nan", "far above the first"])
@pytest.mark.parametrize("logging_steps", [1, 10], ids=["each step logged", "not logged yet"])
def test_a_diverged_run_stops_before_it_is_saved(make: Make, tmp_path: Path, factor: float, logging_steps: int) -> None:
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "logging_steps": logging_steps}
    if logging_steps > 1:
        options["logging_first_step"] = True
    trainer = make(callbacks=(Spoil(5, factor),), learning_rate=1e-3, **options)
    with pytest.raises(TrainingStopped) as caught:
        trainer.train()
    newest = newest_is_finite(tmp_path / "run")
    assert newest.endswith("checkpoint-4")
    message = str(caught.value)
    assert "at step 5" in message and message.endswith(f"the last checkpoint is at {newest}")
    assert "lower train.learning_rate (now 0.001)" in message and "\n" not in message


def test_a_step_that_ruins_the_weights_is_not_saved(make: Make, tmp_path: Path) -> None:
    """The loss of that step is finite: it was computed before the gradient was applied."""
    trainer = make(callbacks=(Spoil(3, math.nan, gradient=True),), max_steps=9, save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingStopped) as caught:
        trainer.train()
    newest = newest_is_finite(tmp_path / "run")
    assert newest.endswith("checkpoint-2")
    assert str(caught.value).endswith(newest)


def test_without_a_checkpoint_the_message_says_so(make: Make) -> None:
    trainer = make(callbacks=(Spoil(2, math.nan),), max_steps=3)
    with pytest.raises(TrainingStopped, match=r"loss nan at step 2 .*no checkpoint yet$"):
        trainer.train()


def test_a_loss_that_goes_up_a_little_does_not_stop(make: Make) -> None:
    trainer = make(callbacks=(Spoil(3, 1.5),), max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 5


def test_a_first_batch_without_any_trained_token_does_not_stop(make: Make) -> None:
    rows = packed_rows(3, 300).select([2, 2, 2, 2, 0])
    trainer = make(rows=rows, batch=(1, 1), max_steps=5)
    trainer.train()
    assert logged(trainer)[0] == 0 < max(logged(trainer))
