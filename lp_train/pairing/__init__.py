"""Layer pairs of a pretrained decoder, run side by side (arXiv 2502.02790). Needs torch, transformers, peft."""

from lp_train.pairing.families import FAMILIES, check_branches, check_family, decoder_of
from lp_train.pairing.pairs import (
    adapters_off,
    in_order,
    is_paired,
    keep_originals,
    pair_layers,
    pair_output,
    plan_of,
    sequential,
    unpair_layers,
)
from lp_train.pairing.plan import AutoPairs, PairPlan, blocks_of
