"""``plan.pairs: auto:...`` becomes pairs: chosen greedily on calibration text, or as an earlier run chose them."""

import dataclasses

from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from lp_train import models
from lp_train.cluster import engine
from lp_train.cluster.launch import say
from lp_train.config import Config
from lp_train.data import RowCollator
from lp_train.pairing import AutoPairs, PairPlan
from lp_train.selection.calibration import Calibration
from lp_train.selection.greedy import greedy


def calibrate(config: Config, rows: Dataset, tokenizer: PreTrainedTokenizerBase, state: PartialState) -> Calibration:
    """The base of a configuration, loaded, on calibration rows."""
    collate = RowCollator(config.train["max_length"], tokenizer.pad_token_id)
    model = models.load_base(config.model, state.device)
    return Calibration(model, rows, collate, config.plan.algebra, state, config.evaluate.batch_size)


def choose_plan(
    config: Config, plan: PairPlan | None, rows: Dataset | None, tokenizer: PreTrainedTokenizerBase, state: PartialState
) -> tuple[Config, PairPlan, nn.Module | None]:
    """``plan`` is what the configuration says; where it is None, pairs are chosen on the calibration ``rows`` and stand
    in the configuration that is returned, and the base that was loaded for it comes too. Every process gets the same.

    Raises:
        UserError: as :func:`greedy`.
    """
    if plan is not None:
        return config, plan, None
    wanted = AutoPairs.parse(config.plan.pairs)
    assert wanted is not None and rows is not None
    engine.load_whole()
    calibration = calibrate(config, rows, tokenizer, state)
    say(f"choosing pairs on {calibration.tokens:,} tokens of calibration text")
    path = greedy(calibration, wanted)
    pairs = sorted([step.first, step.first + 1] for step in path)
    plan = PairPlan.parse(pairs, num_layers=calibration.num_layers).control(config.plan.kind, config.plan.remove)
    costs = f"KL {path[-1].kl:.4f} nats per token there"
    say(f"{config.plan.pairs}: {plan}, {costs}; kept in {calibration.folder}")
    return dataclasses.replace(config, plan=dataclasses.replace(config.plan, pairs=pairs)), plan, calibration.model
