"""The replay: one forward of the original, and the paired model going on from its first pair, against full forwards."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from family_cases import CASES, VOCAB, WINDOW
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lp_train.distill.replay import Recording, run_original, run_suffix
from lp_train.pairing import pair_layers, sequential

PAIRS = ((1, 2), (4, 5))  # where a family alternates: (full, sliding) and (sliding, full); layer 0 is below the first
FAMILIES = ("llama", "gemma2", "qwen3", "gemma3")
LENGTHS = (5, 2 * WINDOW + 1, 3)  # documents packed into each row, one longer than the window


def lora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """Adapters on the paired layers, B random instead of zero so that they change the output."""
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f".layers.{i}." in name for pair in PAIRS for i in pair)
    ]
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return peft


def paired(name: str, algebra: str = "lp") -> nn.Module:
    return lora(pair_layers(CASES[name].model(), PAIRS, algebra)).train()


def inputs(rows: int = 2) -> dict[str, Tensor]:
    """Packed rows: positions start again with every document."""
    ids = torch.randint(1, VOCAB, (rows, sum(LENGTHS)), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]).expand(rows, -1)}


def last_hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """After the final norm, of a whole forward through the model's own front door."""
    return model(**batch, use_cache=False, output_hidden_states=True).hidden_states[-1]


def gradients(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """Of a fixed random projection of ``hidden``, with respect to what is trained."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7))
    return dict(zip(parameters, torch.autograd.grad((hidden * weight).sum(), parameters.values()), strict=True))


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[int]]:
    """How often each decoder layer's attention runs. (The first layer of a pair is called and only lets through.)"""
    calls: Counter[int] = Counter()

    def hook(i: int) -> Callable[..., None]:
        return lambda *_: calls.update([i])

    hooks = [layer.self_attn.register_forward_pre_hook(hook(i)) for i, layer in enumerate(model.get_decoder().layers)]
    yield calls
    for handle in hooks:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_is_bitwise_the_model_before_pairing(name: str) -> None:
    batch = inputs()
    with torch.no_grad():
        original = last_hidden(CASES[name].model().train(), batch)
    recording = run_original(paired(name), batch)
    assert recording.final is not None and not recording.final.requires_grad
    assert torch.equal(recording.final, original)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("algebra", ["lp", "par"])
@pytest.mark.parametrize("name", FAMILIES)
def test_student_and_gradients_are_bitwise_those_of_a_full_forward(
    name: str, algebra: str, checkpointing: bool
) -> None:
    model, batch = paired(name, algebra), inputs()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    full = last_hidden(model, batch)
    expected = gradients(model, full)
    replayed, _ = run_suffix(model, run_original(model, batch))
    assert torch.equal(replayed, full)
    found = gradients(model, replayed)
    assert len(found) == 4 * 7 * 2  # A and B on seven projections of each paired layer
    for parameter, gradient in found.items():
        assert torch.equal(gradient, expected[parameter]), parameter
        assert gradient.abs().max() > 0, parameter


@pytest.mark.parametrize("checkpointed", [range(6), [1, 2], [1, 2, 4, 5]], ids=str)
def test_reentrant_checkpointing_gives_the_same_gradients(checkpointed: Sequence[int]) -> None:
    """TRL forces it for adapters under DeepSpeed's ZeRO-3; it is silent where no input has a gradient."""
    model, batch = paired("gemma2"), inputs()
    expected = gradients(model, run_suffix(model, run_original(model, batch))[0])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for i, layer in enumerate(model.get_decoder().layers):
        layer.gradient_checkpointing = i in checkpointed
    student, _ = run_suffix(model, run_original(model, batch))
    (student * torch.randn(student.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss"])
def test_documents_of_a_row_stay_apart(name: str) -> None:
    model, batch = paired(name), inputs(rows=1)
    recording = run_original(model, batch)
    student, _ = run_suffix(model, recording)
    start = 0
    for length in LENGTHS:
        part, alone = slice(start, start + length), {"input_ids": batch["input_ids"][:, start : start + length]}
        recording_alone = run_original(model, alone)
        assert recording.final is not None and recording_alone.final is not None
        torch.testing.assert_close(recording.final[:, part], recording_alone.final, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student[:, part], run_suffix(model, recording_alone)[0], rtol=1e-4, atol=1e-5)
        start += length


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_layers_below_the_first_pair_run_once(checkpointing: bool) -> None:
    model, batch = paired("llama"), inputs()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with counted(model) as calls:
        student, _ = run_suffix(model, run_original(model, batch))
        student.sum().backward()
    assert calls[0] == 1
    again = 1 if checkpointing else 0  # in the backward, nothing of the teacher is run again
    assert [calls[i] for i in range(1, 6)] == [2 + again] * 5


def test_one_original_serves_several_variants() -> None:
    model, batch = paired("gemma3").eval(), inputs()
    recording = run_original(model, batch)
    student, _ = run_suffix(model, recording)
    with sequential(model):
        original, _ = run_suffix(model, recording)
    assert torch.equal(original, recording.final)
    assert not torch.equal(student, original)
    assert torch.equal(run_suffix(model, recording)[0], student)


@pytest.mark.parametrize("name", FAMILIES)
def test_pair_outputs_are_the_hidden_states_after_each_pair(name: str) -> None:
    model, batch = paired(name), inputs()
    recording = run_original(model, batch, keep_pair_outputs=True)
    student, outputs = run_suffix(model, recording)
    with torch.no_grad():
        # hidden_states[i + 1] is what layer i returned, but for the last, which is after the final norm
        theirs = CASES[name].model()(**batch, use_cache=False, output_hidden_states=True).hidden_states
        ours = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
    assert set(outputs) == set(recording.pair_outputs) == {0, 2}  # of the blocks (1, 2), 3, (4, 5)
    assert torch.equal(recording.pair_outputs[0], theirs[3]) and torch.equal(outputs[0], ours[3])
    norm = model.get_decoder().norm
    assert torch.equal(norm(recording.pair_outputs[2]), theirs[-1]) and torch.equal(norm(outputs[2]), student)
    assert outputs[0].requires_grad and not recording.pair_outputs[0].requires_grad


def test_nothing_is_kept_without_being_asked() -> None:
    model = paired("llama")
    recording = run_original(model, inputs())
    assert recording.pair_outputs == {} and run_suffix(model, recording)[1] == {}
    layers = list(model.get_decoder().layers)
    assert [[layers.index(layer) for layer, _ in block] for block in recording.blocks] == [[1, 2], [3], [4, 5]]


def test_the_layers_are_back_in_place_also_after_an_error() -> None:
    model = paired("llama")
    decoder = model.get_decoder()
    layers = decoder.layers
    run_original(model, inputs(), keep_pair_outputs=True)
    assert decoder.layers is layers
    handle = layers[3].mlp.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run_original(model, inputs())
    assert layers[1]._pairing.parallel  # and the pairs are side by side again
    handle.remove()
    decoder.rotary_emb.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run_original(model, inputs())
    assert decoder.layers is layers


def test_an_attention_mask_is_refused_as_it_would_let_documents_mix() -> None:
    batch = inputs()
    with pytest.raises(ValueError, match="attention_mask.*see each other"):
        run_original(paired("llama"), batch | {"attention_mask": torch.ones_like(batch["input_ids"])})


def test_a_cache_is_refused_as_it_would_let_documents_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = paired("llama")
    decoder, forward = model.get_decoder(), model.get_decoder().forward
    monkeypatch.setattr(decoder, "forward", lambda **kwargs: forward(**{**kwargs, "use_cache": True}))
    with pytest.raises(ValueError, match="past_key_values.*see each other"):
        run_original(model, inputs())


def stop(*_: Any) -> None:
    raise RuntimeError("stopped")


def test_the_teacher_has_no_adapter_dropout_and_draws_no_random_number() -> None:
    model = lora(pair_layers(CASES["llama"].model(), PAIRS), dropout=0.5).train()
    state = torch.get_rng_state()
    first, second = run_original(model, inputs()), run_original(model, inputs())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.final, second.final)
    assert not torch.equal(run_suffix(model, first)[0], run_suffix(model, first)[0])  # the student does


def test_replay_starts_at_the_embeddings_when_the_first_layer_is_paired() -> None:
    model, batch = pair_layers(CASES["llama"].model(), ((0, 1),)), inputs()
    recording = run_original(model, batch)
    assert isinstance(recording, Recording)
    assert torch.equal(recording.hidden, model.get_input_embeddings()(batch["input_ids"]))
    assert torch.equal(run_suffix(model, recording)[0], last_hidden(model, batch))


def test_the_model_is_the_same_after_a_replay() -> None:
    model, batch = paired("gemma2").eval(), inputs()
    before, weights = last_hidden(model, batch), copy.deepcopy(model.state_dict())
    run_suffix(model, run_original(model, batch))
    assert torch.equal(last_hidden(model, batch), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
