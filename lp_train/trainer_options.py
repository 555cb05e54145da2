"""Options of TRL's SFTConfig and PEFT's LoraConfig that this project changes or keeps to itself, with the reasons:
``trainer_options.yaml`` lists them."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Default(NamedTuple):
    """A default of ours and why it is not simply the library's."""

    value: Any
    reason: str


_LISTED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def _kept(section: str) -> dict[str, str]:
    """Of each option that a configuration cannot set, the reason or the remedy."""
    return {name: reason for reason, names in _LISTED[section].items() for name in names}


OUR_TRAIN_DEFAULTS: dict[str, Default] = {name: Default(**listed) for name, listed in _LISTED["train"].items()}
OWNED_TRAIN = _kept("train_kept")
OUR_LORA_DEFAULTS: dict[str, Any] = _LISTED["lora"]
OWNED_LORA = _kept("lora_kept")

# These leave the base weights alone. Of the others, pissa, olora, corda, loftq and lora_ga rewrite them or leave
# something behind, so that the model without adapters is no longer the original; mica was not tried.
SAFE_INIT = (True, False, "gaussian", "orthogonal", "eva")
