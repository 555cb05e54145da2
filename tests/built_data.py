"""Data of a test's own text, without the rest of a run's configuration."""

from typing import Any, Literal

from lp_train.config import Config, DataConfig, LossConfig, ModelConfig, PlanConfig
from lp_train.data import Data, data_of


def build_data(
    data: DataConfig,
    tokenizer: Any,
    *,
    max_length: int,
    train_tokens: int | None,
    eval_tokens: int,
    kd_on: Literal["completion", "all"],
    seed: int,
    calibration_tokens: int = 0,
) -> Data:
    options = {"max_length": max_length, "seed": seed}
    config = Config(ModelConfig("-"), PlanConfig("0:2"), data, "test", loss=LossConfig(kd_on=kd_on), train=options)
    return data_of(config, tokenizer, train_tokens, eval_tokens, calibration_tokens)
