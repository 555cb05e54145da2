"""``HarnessModel`` where it goes other ways than ``HFLM``: windows, prefix tokens, and what it must leave alone."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_fidelity import random_states, with_adapter
from test_tasks import VARIANTS, answers, compare_answers, files, flat, plain_answers, short_answers, suite_of
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lp_train.distill.losses import Head
from lp_train.errors import UserError
from lp_train.evaluation.fidelity import as_it_is
from lp_train.evaluation.harness import HarnessModel, _answers
from lp_train.pairing import pair_layers

__all__ = ["files", "short_answers"]


@pytest.mark.parametrize("batch_size", [None, 3])
def test_texts_beyond_the_context_are_those_of_plain_hflm(
    files: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int | None
) -> None:
    tiny_llama.config.max_position_embeddings = 24
    suite = suite_of(files, "wikitext_local")
    texts = [request.args[0] for (request,) in suite.tasks["wikitext_local"].instances]
    assert max(len(tiny_tokenizer.encode(text)) for text in texts) > 2 * 24
    plain = HFLM(pretrained=tiny_llama, tokenizer=tiny_tokenizer, batch_size=4)
    expected = {"sequential": plain_answers(plain, suite, "wikitext_local")}
    pair_layers(tiny_llama, "2:6")
    expected["paired"] = plain_answers(plain, suite, "wikitext_local")
    found = answers(suite, tiny_llama, tiny_tokenizer, batch_size=batch_size)
    for model, theirs in expected.items():
        compare_answers(flat(found[model]["wikitext_local"]), theirs, 1e-4)


def test_no_second_prefix_token_before_a_text_that_has_one(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    assert tokenizer.encode("A list")[0] == bos[1]
    pairs = [("A parser", " reads"), (f"{bos[0]}A parser", " reads"), ("", "The sea"), ("", f"{bos[0]}The sea")]
    asked = {
        "loglikelihood": [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)],
        "loglikelihood_rolling": [Instance("loglikelihood_rolling", {}, (f"{bos[0]}The sea",), 0)],
    }
    plain = HFLM(pretrained=tiny_llama, tokenizer=tokenizer, batch_size=1)
    ours = HarnessModel(tiny_llama, tokenizer, {"it": as_it_is}, torch.float32, PartialState(cpu=True))
    for kind, requests in asked.items():
        expected = getattr(plain, kind)(requests, disable_tqdm=True)
        compare_answers(getattr(ours, kind)(requests)["it"], expected, 1e-4)


@pytest.mark.parametrize("context", [512, 24])
def test_adapters_modes_and_random_states_come_back(
    files: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, context: int
) -> None:
    """Also where an item is too long for the model."""
    tiny_llama.config.max_position_embeddings = context
    model = with_adapter(tiny_llama).train()
    model.get_base_model().model.layers[1].eval()  # as someone may want it
    suite = suite_of(files, "piqa_local", "gsm8k_local", task_limit=2, num_fewshot=0)
    before, ids = state_of(model), torch.arange(4, 20)[None]
    torch.manual_seed(0)
    logits = model(ids).logits
    drawn = random_states()
    if context == 24:
        with pytest.raises(UserError, match="the model takes 24"):
            answers(suite, model, tiny_tokenizer, VARIANTS | {"recovered": as_it_is})
    else:
        found = answers(suite, model, tiny_tokenizer, VARIANTS | {"recovered": as_it_is})
        assert len({str(of_model["piqa_local"].responses) for of_model in found.values()}) == 3
    assert random_states() == drawn
    assert state_of(model) == before
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, logits)


def state_of(model: torch.nn.Module) -> list[object]:
    """Each module's mode, which adapters it has switched on, and what is trained."""
    modes = [module.training for module in model.modules()]
    switched_off = [module.disable_adapters for module in model.modules() if hasattr(module, "disable_adapters")]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [modes, switched_off, model.active_adapters, trained]


def test_log_probabilities_are_those_of_hflm_s_kernel() -> None:
    """``log_softmax`` in float32. Over 49,152 tokens ``logsumexp`` is up to 1e-5 from it for each token, which a few
    invented items do not show and a real one of 25 tokens does."""
    generator = torch.Generator().manual_seed(0)
    head = Head(3 * torch.randn(49_152, 8, generator=generator), None, None)
    hidden, targets = torch.randn(200, 8, generator=generator), torch.randint(0, 49_152, (200,), generator=generator)
    logits = head.logits(hidden)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].double()
    found = _answers(head, hidden, targets)
    assert (found[:, 0] - expected).abs().max() < 1e-6
    assert torch.equal(found[:, 1] == 0, logits.argmax(-1) == targets)
