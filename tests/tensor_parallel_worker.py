"""One rank of ``test_tensor_parallel.py``: loads checkpoints sharded by Transformers, and writes logits and counts."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import lp_train  # noqa: F401  (registers the model types)

IDS = torch.arange(3, 15)[None]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for checkpoint in sorted(path for path in folder.iterdir() if path.is_dir()):
        config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=config).eval()
        with torch.no_grad(), CommDebugMode() as counted:
            logits = model(IDS, use_cache=False).logits
        tokens = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        counts = {str(op): count for op, count in counted.get_comm_counts().items()}
        parameter = model.model.layers[0].mlp.up_proj.weight
        found = {"logits": logits, "tokens": tokens, "counts": counts, "rows": len(parameter.to_local())}
        if dist.get_rank() == 0:
            torch.save(found, f"{checkpoint}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
