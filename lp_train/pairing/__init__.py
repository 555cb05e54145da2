"""Layer pairs of a pretrained decoder, run side by side (arXiv 2502.02790). Depends on torch, transformers and peft only."""

from lp_train.pairing.families import FAMILIES, Family
from lp_train.pairing.pairs import is_paired, keep_originals, pair_layers, plan_of, sequential, unpair_layers
from lp_train.pairing.plan import PairPlan

__all__ = [
    "FAMILIES",
    "Family",
    "PairPlan",
    "is_paired",
    "keep_originals",
    "pair_layers",
    "plan_of",
    "sequential",
    "unpair_layers",
]
