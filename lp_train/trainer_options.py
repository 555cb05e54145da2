"""Options of TRL's SFTConfig and PEFT's LoraConfig that this project changes or keeps to itself, with the reasons."""

from __future__ import annotations

from typing import Any, NamedTuple


class Default(NamedTuple):
    """A default of ours and why it is not simply the library's."""

    value: Any
    reason: str


OUR_TRAIN_DEFAULTS: dict[str, Default] = {
    "global_batch_tokens": Default(32768, "the batch is stated in tokens, whatever the number of processes"),
    "max_length": Default(1024, "length of a packed row; longer documents are split, never cut"),
    "learning_rate": Default(1e-3, "distilled adapters do best far above LoRA's usual rates"),
    "lr_scheduler_type": Default("cosine", "ends near zero, which the recovery needs"),
    "warmup_steps": Default(0.05, "a share of all steps when below 1"),
    "adam_beta2": Default(0.99, "short runs: the second moment must settle within some hundred steps"),
    "weight_decay": Default(0.0, "adapters start at zero, where the original is"),
    "max_grad_norm": Default(1.0, "the rates used here are close to diverging"),
    "logging_steps": Default(10, "one line per ten steps"),
    "logging_nan_inf_filter": Default(False, "a loss that is not finite must be seen"),
    "eval_strategy": Default("steps", "the recovery is followed during the run"),
    "eval_steps": Default(50, "held-out figures every fifty steps"),
    "task_steps": Default(
        None, "evaluate.tasks are measured during training every so many steps; a multiple of eval_steps"
    ),
    "save_strategy": Default("steps", "a stopped run can go on"),
    "save_steps": Default(50, "a stopped run loses at most fifty steps"),
    "save_total_limit": Default(2, "checkpoints of adapters, the last two are enough"),
    "metric_for_best_model": Default(
        "kl", "the best checkpoint is the closest to the original, not the one of lowest loss"
    ),
    "greater_is_better": Default(False, "of a distance"),
    "early_stopping_patience": Default(None, "stops after so many evaluations that are no better than the best one"),
    "gradient_checkpointing": Default(False, "costs a second forward; set it when the memory does not suffice"),
    "gradient_checkpointing_every": Default(1, "with 2, every second block from the first pair on: half of either"),
    "torch_compile": Default("auto", "each block of layers is compiled on a GPU; a minute at the start"),
    "cuda_graph": Default("auto", "compiled training without gradient checkpointing runs as one graph on a GPU"),
    "fp8": Default(False, "frozen projections in FP8 on Hopper: faster for large models, at some accuracy"),
    "seed": Default(0, "the data's order and the adapters' start"),
}

_DATA = "rows are packed and masked by lp_train.data"
_LOSS = "the loss is this project's; see the section loss"
_HUB = "nothing is uploaded; push the run's folder adapter/ yourself"
_ENGINE = "choose the engine in accelerate's own config file"

OWNED_TRAIN: dict[str, str] = {
    "packing": _DATA,
    "packing_strategy": _DATA,
    "padding_free": _DATA,
    "eval_packing": _DATA,
    "pad_to_multiple_of": _DATA,
    "shuffle_dataset": _DATA,
    "dataset_kwargs": _DATA,
    "dataset_text_field": "use text_column of a source in data.train",
    "truncation_mode": "use data.truncate",
    "assistant_only_loss": "use loss.kd_on",
    "completion_only_loss": "use loss.kd_on",
    "loss_type": _LOSS,
    "label_smoothing_factor": _LOSS,
    "use_liger_kernel": _LOSS,
    "liger_kernel_config": _LOSS,
    "label_names": _LOSS,
    "average_tokens_across_devices": "the loss is always divided by the global number of trained tokens",
    "remove_unused_columns": _DATA,
    "neftune_noise_alpha": "noise in the embeddings would also reach the original, which is the teacher",
    "report_to": "use the section track",
    "run_name": "use track.name",
    "project": "use track.project",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_token": _HUB,
    "hub_strategy": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "bf16": "use model.dtype",
    "fp16": "use model.dtype",
    "bf16_full_eval": "use model.dtype",
    "fp16_full_eval": "use model.dtype",
    "torch_compile_backend": "blocks are compiled by inductor for fixed shapes",
    "torch_compile_mode": "blocks are compiled by inductor for fixed shapes",
    "use_cpu": "accelerate launch decides where it runs; ACCELERATE_USE_CPU=true forces the CPU",
    "use_cache": "packed documents would see each other with a cache",
    "model_init_kwargs": "use the section model",
    "trust_remote_code": "use model.trust_remote_code",
    "chat_template_path": "the tokenizer's own chat template is used",
    "eos_token": "the tokenizer's own token is used",
    "pad_token": "the tokenizer's own token is used",
    "deepspeed": _ENGINE,
    "fsdp": _ENGINE,
    "fsdp_config": _ENGINE,
    "accelerator_config": _ENGINE,
    "parallelism_config": _ENGINE,
    "enable_jit_checkpoint": "it is not exact; a signal saves at the end of the step without it",
    "auto_find_batch_size": "the batch is global_batch_tokens; set per_device_train_batch_size when memory is short",
    "per_device_eval_batch_size": "use evaluate.batch_size",
    "resume_from_checkpoint": "give --resume on the command line",
}

OUR_LORA_DEFAULTS: dict[str, Any] = {"scope": "paired", "r": 16, "lora_dropout": 0.0, "target_modules": None}

_PROGRAM = "set by the program from plan.pairs and lora.scope"
OWNED_LORA: dict[str, str] = {
    "layers_to_transform": _PROGRAM,
    "layers_pattern": _PROGRAM,
    "task_type": _PROGRAM,
    "peft_type": _PROGRAM,
    "inference_mode": _PROGRAM,
    "layer_replication": "it adds layers, and the pairs are those of the original",
    "base_model_name_or_path": "set by the program from model.name_or_path",
    "revision": "use model.revision",
}

# These leave the base weights alone. Of the others, pissa, olora, corda, loftq and lora_ga rewrite them or leave
# something behind, so that the model without adapters is no longer the original; mica was not tried.
SAFE_INIT = (True, False, "gaussian", "orthogonal", "eva")
