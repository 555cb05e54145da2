"""Every family, with and without pairs, against the independent reference of ``reference.py``.

Tolerance: 1e-5 of the largest logit (float32 models, float64 reference). Unpaired comparisons prove the reference.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
import transformers as hf
from family_cases import CASES, COMMON, PAIRS, VOCAB, WINDOW
from torch import Tensor, nn

from lp_train.errors import UserError
from lp_train.pairing import FAMILIES, pair_layers

LENGTHS = (WINDOW - 1, 3 * WINDOW + 1)  # within and beyond the sliding window


def ids(tokens: int, rows: int = 2) -> Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


def assert_same(ours: Tensor, expected: Tensor) -> None:
    error = (ours.double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_unpaired_model(name: str, tokens: int) -> None:
    model = CASES[name].model()
    assert_same(model(ids(tokens)).logits, reference.logits(CASES[name].arch, model.state_dict(), ids(tokens)))


@torch.no_grad()
@pytest.mark.parametrize("algebra", ["lp", "par"])
@pytest.mark.parametrize("name", CASES)
def test_paired_model_is_the_reference(name: str, algebra: str) -> None:
    model = CASES[name].model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    pair_layers(model, PAIRS, algebra)
    for tokens in LENGTHS:
        x = ids(tokens)
        expected = reference.logits(CASES[name].arch, state, x, PAIRS, algebra)
        assert_same(model(x).logits, expected)
        assert_same(model(x, use_cache=False).logits, expected)


def test_every_family_has_a_case() -> None:
    assert {case.config().model_type for case in CASES.values()} == set(FAMILIES)


def test_cases_tell_the_algebras_and_the_order_apart() -> None:
    arch, state = CASES["gemma2"].arch, CASES["gemma2"].model().state_dict()
    x = ids(LENGTHS[1])
    variants = [reference.logits(arch, state, x, pairs, algebra) for pairs in ((), PAIRS) for algebra in ("lp", "par")]
    assert torch.equal(variants[0], variants[1])
    for a, b in ((0, 2), (0, 3), (2, 3)):
        assert (variants[a] - variants[b]).abs().max() > 1e-2 * variants[a].abs().max()


SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
UNSUPPORTED = {
    "gpt2": hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4),
    "falcon": hf.FalconConfig(**SMALL),
    "granite": hf.GraniteConfig(**SMALL, intermediate_size=48, num_key_value_heads=4, residual_multiplier=0.22),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_other_families_are_refused_with_the_list(kind: str) -> None:
    model = hf.AutoModelForCausalLM.from_config(UNSUPPORTED[kind])
    with pytest.raises(UserError, match=f"^model type '{kind}': no pairing .* supported: gemma2, .*, smollm3$") as e:
        pair_layers(model, "0:2")
    assert "\n" not in str(e.value)
    assert all(name in str(e.value) for name in FAMILIES)


def test_a_familys_name_with_another_ones_layers_is_refused() -> None:
    """What somebody who adds a wrong line to the table meets: Granite scales its branches by 0.22."""
    model = hf.AutoModelForCausalLM.from_config(UNSUPPORTED["granite"])
    model.config.model_type = "llama"
    with pytest.raises(UserError, match=r"layer 0 \(GraniteDecoderLayer\) is not attention plus mlp"):
        pair_layers(model, "0:2")


class ScaledMlp(hf.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return h + 0.9 * self.mlp(self.post_attention_layernorm(h))


class ScaledAttention(hf.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = hidden_states + 0.9 * self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return h + self.mlp(self.post_attention_layernorm(h))


@pytest.fixture
def llama() -> Iterator[nn.Module]:
    yield CASES["llama"].model()


@pytest.mark.parametrize("tampered", [ScaledMlp, ScaledAttention])
@pytest.mark.parametrize("index", [1, 4])
def test_a_tampered_layer_is_refused(llama: nn.Module, tampered: type[nn.Module], index: int) -> None:
    layers = llama.model.layers
    layers[index].__class__ = tampered
    classes = [type(layer) for layer in layers]
    llama.train()
    with pytest.raises(UserError, match=rf"^model type 'llama': layer {index} \({tampered.__name__}\) .* supported: "):
        pair_layers(llama, PAIRS)
    assert [type(layer) for layer in layers] == classes
    assert all(module.training for module in llama.modules())
    assert not hasattr(llama.config, "layer_parallel")


def test_the_check_leaves_the_model_and_the_random_state_alone(llama: nn.Module) -> None:
    llama.model.layers[3].eval(), llama.model.layers[1].train()
    modes = [module.training for module in llama.modules()]
    random_state = torch.get_rng_state()
    pair_layers(llama, PAIRS)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in llama.modules()] == modes
    assert all(p.grad is None for p in llama.parameters())
    assert not llama.model.layers[0]._forward_pre_hooks


def test_a_model_without_weights_can_be_paired() -> None:
    """The meta device, as in a dry run: the branches cannot be compared there."""
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**COMMON))
    assert pair_layers(model, PAIRS) is model
