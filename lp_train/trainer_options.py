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
    "cuda_graph": Default("auto", "compiled training of one process without checkpointing runs as one graph on a GPU"),
    "fp8": Default(False, "frozen projections in FP8 on Hopper: faster for large models, at some accuracy"),
    "seed": Default(0, "the data's order and the adapters' start"),
}

_KEPT = {  # reason or remedy: options of the trainer that a configuration cannot set
    "rows are packed and masked by lp_train.data": "packing packing_strategy padding_free eval_packing "
    "pad_to_multiple_of shuffle_dataset dataset_kwargs remove_unused_columns",
    "use text_column of a source in data.train": "dataset_text_field",
    "use data.truncate": "truncation_mode",
    "use loss.kd_on": "assistant_only_loss completion_only_loss",
    "the loss is this project's; see the section loss": "loss_type label_smoothing_factor use_liger_kernel "
    "liger_kernel_config label_names",
    "the loss is always divided by the global number of trained tokens": "average_tokens_across_devices",
    "noise in the embeddings would also reach the original, which is the teacher": "neftune_noise_alpha",
    "use the section track": "report_to",
    "use track.name": "run_name",
    "use track.project": "project",
    "nothing is uploaded; push the run's folder adapter/ yourself": "push_to_hub hub_model_id hub_token hub_strategy "
    "hub_private_repo hub_always_push hub_revision",
    "use model.dtype": "bf16 fp16 bf16_full_eval fp16_full_eval",
    "blocks are compiled by inductor for fixed shapes": "torch_compile_backend torch_compile_mode",
    "accelerate launch decides where it runs; ACCELERATE_USE_CPU=true forces the CPU": "use_cpu",
    "packed documents would see each other with a cache": "use_cache",
    "use the section model": "model_init_kwargs",
    "use model.trust_remote_code": "trust_remote_code",
    "the tokenizer's own is used": "chat_template_path eos_token pad_token",
    "choose the engine in accelerate's own config file": "deepspeed fsdp fsdp_config accelerator_config "
    "parallelism_config",
    "it is not exact; a signal saves at the end of the step without it": "enable_jit_checkpoint",
    "the batch is global_batch_tokens; set per_device_train_batch_size when memory is short": "auto_find_batch_size",
    "use evaluate.batch_size": "per_device_eval_batch_size",
    "give --resume on the command line": "resume_from_checkpoint",
}
OWNED_TRAIN: dict[str, str] = {name: reason for reason, names in _KEPT.items() for name in names.split()}

OUR_LORA_DEFAULTS: dict[str, Any] = {
    "scope": "paired",
    "start_from": None,  # a run or adapter folder, such as scripts/heal.py writes, or heal: fitted before training
    "heal_tokens": 65536,  # of data.train, for start_from: heal
    "r": 16,
    "lora_dropout": 0.0,
    "target_modules": None,
}

_PROGRAM = "set by the program from plan.pairs and lora.scope"
OWNED_LORA: dict[str, str] = {
    **dict.fromkeys(("layers_to_transform", "layers_pattern", "task_type", "peft_type", "inference_mode"), _PROGRAM),
    "layer_replication": "it adds layers, and the pairs are those of the original",
    "base_model_name_or_path": "set by the program from model.name_or_path",
    "revision": "use model.revision",
}

# These leave the base weights alone. Of the others, pissa, olora, corda, loftq and lora_ga rewrite them or leave
# something behind, so that the model without adapters is no longer the original; mica was not tried.
SAFE_INIT = (True, False, "gaussian", "orthogonal", "eva")
