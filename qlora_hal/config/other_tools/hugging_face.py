"""Keys of transformers' TrainingArguments, peft's LoraConfig and bitsandbytes' configuration, shared by several tools.

Read in transformers 5.23.0, peft 0.21.2 and trl 1.15 (their own documentation of each argument).
"""

from __future__ import annotations

from qlora_hal.config.other_tools.tables import (
    Default,
    Given,
    Key,
    Outcome,
    Rule,
    Value,
    as_names,
    as_number,
    becomes,
    is_off,
    is_on,
    left,
    no_place,
    not_needed,
    same,
    table,
    taken,
    translated,
    unneeded,
)

SEED = "The same number draws other values here: order of rows, first adapter and dropout have generators of their own."
DEVICES = "Several devices are started with --devices N (parallel.mode)."
METRICS = "Evaluations give the loss here; metrics of your own are functions in Python (train(metrics=...))."
OBJECTIVE = "Another objective than supervised fine-tuning."
LOSS = "The loss here is the plain negative log-likelihood."
PLAIN_LORA = "Here the adapter is plain LoRA: A and B begin and learn as in its paper."
FROZEN = "Embeddings and heads stay frozen; adapters are on linear layers."
FP8 = (
    "It is another scheme there. quantization.compute_dtype: fp8 makes the products with a 4-bit base in 8-bit floats "
    "(NVIDIA Ada, Hopper and later)."
)
ADAMW = "Here the optimizer is AdamW on an adapter."
AS_FILES_SAY = "The model is taken as its files say."
TEXT_MODELS = "Text models are trained here."
TOKENIZER = "The tokenizer's files are taken unchanged."
ANSWERS = "It is for answers there, which training does not change."
STRANGERS_CODE = (
    "Code of a model's repository runs here only for a fixed commit: set model.revision to 40 digits and "
    "model.trust_remote_code to true, if the model needs it."
)
_OPTIMIZERS = {
    **dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw", "adamw_bnb"), "adamw"
    ),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "paged_adamw"),
    "paged_adamw_8bit": "paged_adamw_8bit",
}
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


# Rules -------------------------------------------------------------------------------------------------------------


def optimizer(value: Value, given: Given) -> Outcome:
    name = str(value).lower().removeprefix("optimizernames.")
    if name == "adamw_torch_8bit":
        note = "torchao's 8-bit AdamW there, bitsandbytes' 8-bit states here; the update is the same"
        return becomes({"training.optim": "adamw_8bit"}, note)
    here = _OPTIMIZERS.get(name)
    if here is None:
        return left(f"{value} is not offered; here AdamW is (adamw, adamw_8bit, paged_adamw, paged_adamw_8bit)")
    if here == name:
        return taken("training.optim", here)
    return becomes({"training.optim": here}, f"{value} is {here} here; kernels differ, the update does not")


def scheduler(value: Value, given: Given) -> Outcome:
    name = str(value).lower().removeprefix("schedulertype.")
    if name == "constant":
        # transformers' get_constant_schedule has no warm-up, whatever warmup_ratio says.
        note = "constant has no warm-up there, whatever the warm-up keys say"
        return becomes({"training.lr_scheduler_type": "constant", "training.warmup_steps": 0}, note)
    if name == "constant_with_warmup":
        return becomes({"training.lr_scheduler_type": "constant"}, "here constant has the warm-up that is set")
    if name in ("linear", "cosine"):
        return taken("training.lr_scheduler_type", name)
    return left(f"{value} is not offered; here constant, linear and cosine are")


def warmup_steps(value: Value, given: Given) -> Outcome:
    if str(given.get("lr_scheduler_type", "")).lower() == "constant":
        return unneeded("constant has no warm-up there")
    number = as_number(value)
    if number is not None and 0 < number < 1:
        return becomes({"training.warmup_ratio": number}, "below 1 it is a share of all steps there")
    return taken("training.warmup_steps", value if number is None or number % 1 else int(number))


def max_steps(value: Value, given: Given) -> Outcome:
    number = as_number(value)
    return unneeded("not set there") if number is not None and number <= 0 else taken("training.max_steps", value)


def half_precision(dtype: str) -> Rule:
    def rule(value: Value, given: Given) -> Outcome:
        if is_off(value):
            return unneeded("off there; here the device decides")
        if str(value).lower() == "auto":
            return unneeded("auto takes what the device has, as compute_dtype auto does here")
        return becomes({"quantization.compute_dtype": dtype}, f"the dtype of products: {dtype}")

    return rule


def dtype(value: Value, given: Given) -> Outcome:
    name = str(value).removeprefix("torch.").lower()
    name = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32", "fp32": "float32"}.get(
        name, name
    )
    if name in ("bfloat16", "float16", "float32"):
        return becomes({"quantization.compute_dtype": name}, "what is not quantized is held and multiplied in it")
    if is_off(value) or name == "auto":
        return unneeded("auto: the device decides, as here")
    return left(f"{value} is not offered; here bfloat16, float16 and float32 are")


def trackers(value: Value, given: Given) -> Outcome:
    names = [name for name in as_names(value) if name.lower() not in ("none", "null", "")]
    if "all" in names:
        return left("all: name those that you use in training.report_to (tensorboard, wandb, mlflow, trackio)")
    known = [name for name in names if name in _TRACKERS]
    strange = [name for name in names if name not in _TRACKERS]
    if strange:
        note = f"{', '.join(strange)} is not offered; here {', '.join(_TRACKERS)} are"
        return becomes({"training.report_to": known}, note) if known else left(note)
    return taken("training.report_to", known) if known else unneeded("no tracker there, none here")


def save_steps(value: Value, given: Given) -> Outcome:
    number = as_number(value)
    if number is not None and 0 < number < 1:
        return left(
            "a share of all steps there; set checkpoint.save_steps to a number of steps (--dry-run counts them)"
        )
    if str(given.get("save_strategy", "steps")).lower() not in ("steps",):
        return unneeded("save_strategy is not steps there")
    return taken("checkpoint.save_steps", value if number is None else int(number))


def save_strategy(value: Value, given: Given) -> Outcome:
    name = str(value).lower()
    if name == "no" or value is False:
        return becomes({"checkpoint.save_steps": 0}, "saved at the end only; here also when the run is stopped")
    if name in ("steps", ""):
        return unneeded("by steps, as here")
    return left(f"{value}: set checkpoint.save_steps to the steps of one epoch (--dry-run counts them)")


def save_total_limit(value: Value, given: Given) -> Outcome:
    number = as_number(value)
    if number is not None and number < 2:
        return becomes({"checkpoint.save_total_limit": 2}, "two are kept at least, so that a damaged one costs little")
    return taken("checkpoint.save_total_limit", value)


def eval_steps(value: Value, given: Given) -> Outcome:
    strategy = given.get("eval_strategy", given.get("evaluation_strategy"))
    if strategy is not None and str(strategy).lower() != "steps":
        return unneeded("eval_strategy is not steps there")
    number = as_number(value)
    if number is not None and 0 < number < 1:
        return left("a share of all steps there; set training.eval_steps to a number of steps (--dry-run counts them)")
    return taken("training.eval_steps", value if number is None else int(number))


def eval_strategy(value: Value, given: Given) -> Outcome:
    name = str(value).lower()
    if name == "no" or value is False:
        return unneeded("not during training; here rows that are held out are scored before and after")
    if name == "steps":
        return unneeded("by steps, as here: training.eval_steps")
    return left(f"{value}: set training.eval_steps to the steps of one epoch (--dry-run counts them)")


def held_out(value: Value, given: Given) -> Outcome:
    number = as_number(value)
    if is_off(value) or number == 0:
        return unneeded("no rows are held out there, none here")
    if number is None or number < 0:
        return left(f"{value} is no share of the rows and no number of them")
    if number < 1:
        return becomes({"data.validation_fraction": number}, "the same share; other rows, for the draw is another")
    return left(f"{number:g} rows there; here a share is held out (data.validation_fraction) or a file is named")


def checkpointing(value: Value, given: Given) -> Outcome:
    if is_off(value):
        return taken("training.gradient_checkpointing", False)
    if is_on(value):
        return taken("training.gradient_checkpointing", True)
    note = f"{value} also moves activations to the host there; here training.recompute offload does, on torch"
    return becomes({"training.gradient_checkpointing": True}, note)


def four_bit(value: Value, given: Given) -> Outcome:
    if is_off(value):
        if is_off(given.get("load_in_8bit")):
            return becomes({"quantization.weight_format": "none"}, "the base stays in 16 bits: LoRA")
        return unneeded("8 bits are asked for instead")
    kind = str(given.get("bnb_4bit_quant_type", "nf4"))
    return becomes({"quantization.weight_format": kind}, f"bitsandbytes' {kind.upper()} in blocks of 64")


def eight_bit(value: Value, given: Given) -> Outcome:
    if is_off(value):
        return unneeded("off there")
    note = "LLM.int8's integers and row scales; its rounding of activations is not done here, so that devices agree"
    return becomes({"quantization.weight_format": "8bit"}, note)


def quant_type(value: Value, given: Given) -> Outcome:
    if is_off(given.get("load_in_4bit")):
        return unneeded("nothing is stored in 4 bits there")
    return taken("quantization.weight_format", str(value))


def nested(value: Value, given: Given) -> Outcome:
    if is_off(given.get("load_in_4bit")):
        return unneeded("nothing is stored in 4 bits there")
    return taken("quantization.double_quant", not is_off(value))


def target_modules(value: Value, given: Given) -> Outcome:
    if value == "all-linear":
        return taken("lora.target_modules", value)
    if isinstance(value, str) and any(mark in value for mark in "\\*()[]|^$"):
        return taken("lora.target_modules", value)  # peft reads a lone text as an expression over full paths, too
    names = as_names(value)
    return taken("lora.target_modules", names)


def bias(value: Value, given: Given) -> Outcome:
    return (
        unneeded("no biases are trained, as here") if value == "none" or is_off(value) else left("biases stay frozen")
    )


def revision(value: Value, given: Given) -> Outcome:
    return unneeded("main, as here") if value == "main" else taken("model.revision", value)


def truncation(value: Value, given: Given) -> Outcome:
    here = {"keep_start": "right", "keep_end": "left"}.get(str(value))
    return left(f"{value} is not offered") if here is None else becomes({"data.truncation": here}, f"{value}: {here}")


# Tables ------------------------------------------------------------------------------------------------------------

TRAINING = table(
    same("output_dir", "output_dir"),
    same("per_device_train_batch_size", "training.per_device_train_batch_size"),
    same("per_device_eval_batch_size", "training.per_device_eval_batch_size"),
    same(
        "gradient_accumulation_steps",
        "training.gradient_accumulation_steps",
        "Micro-batches of a step; here each counts by its tokens, which transformers does since 4.46.",
    ),
    same("num_train_epochs", "training.num_train_epochs"),
    translated("max_steps", "training.max_steps", "Overrides the epochs; -1 is not set.", max_steps),
    same("learning_rate", "training.learning_rate"),
    translated("lr_scheduler_type", "training.lr_scheduler_type", "`constant` has no warm-up there.", scheduler),
    same("warmup_ratio", "training.warmup_ratio", "The first step has rate 0 there, and a first share here."),
    translated("warmup_steps", "training.warmup_steps", "Below 1 a share of all steps.", warmup_steps),
    translated("optim", "training.optim", "torch's, bitsandbytes' and torchao's AdamW are one update.", optimizer),
    same("weight_decay", "training.weight_decay"),
    same("max_grad_norm", "training.max_grad_norm"),
    same("adam_beta1", "training.adam_beta1"),
    same("adam_beta2", "training.adam_beta2"),
    same("adam_epsilon", "training.adam_epsilon"),
    translated(
        "gradient_checkpointing activation_checkpointing",
        "training.gradient_checkpointing",
        "Saves memory; the result is the same.",
        checkpointing,
    ),
    same("seed", "training.seed", SEED),
    same("logging_steps", "training.logging_steps"),
    translated("eval_strategy evaluation_strategy", "training.eval_steps", "When to evaluate.", eval_strategy),
    translated("eval_steps", "training.eval_steps", "Needs held-out rows here.", eval_steps),
    translated("save_strategy", "checkpoint.save_steps", "When to save.", save_strategy),
    translated("save_steps", "checkpoint.save_steps", "Below 1 a share of all steps.", save_steps),
    translated("save_total_limit", "checkpoint.save_total_limit", "At least 2 here.", save_total_limit),
    same("load_best_model_at_end", "training.load_best_adapter_at_end"),
    translated("report_to", "training.report_to", "Trackers.", trackers),
    translated("bf16", "quantization.compute_dtype", "bfloat16 products.", half_precision("bfloat16")),
    translated("fp16", "quantization.compute_dtype", "float16 products with loss scaling.", half_precision("float16")),
    same("group_by_length", "data.group_by_length"),
    no_place(
        "neftune_noise_alpha",
        "NEFTune adds noise to embeddings; no backend here does, so that results can be compared.",
    ),
    no_place("label_smoothing_factor", "The loss here is the plain negative log-likelihood."),
    no_place("lr_scheduler_kwargs", "Schedules here have no arguments; cosine and linear end at 0."),
    no_place("optim_args optim_target_modules", "The optimizers here take betas, epsilon and weight decay alone."),
    no_place(
        "deepspeed fsdp fsdp_config",
        "Several devices are started with --devices N; parallel.mode shard holds the base in parts.",
    ),
    no_place(
        "resume_from_checkpoint", "Checkpoints of other tools cannot be continued; `qlora-hal resume` continues a run."
    ),
    no_place(
        "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision",
        "Nothing is uploaded by a run; `qlora-hal push` uploads it afterwards.",
    ),
    no_place(
        "metric_for_best_model greater_is_better",
        "The best adapter is the one with the lowest evaluation loss.",
        off=("eval_loss", "loss"),
    ),
    no_place("data_seed", "training.seed draws the order of rows, too."),
    no_place("accelerator_config parallelism_config", DEVICES),
    no_place("eval_delay", "Evaluations come every training.eval_steps from the beginning."),
    no_place("bf16_full_eval fp16_full_eval", "Evaluations are computed as training is."),
    no_place("ignore_data_skip", "A run that is resumed goes on with the rows that it had not seen."),
    no_place(
        "logging_nan_inf_filter",
        "A step that is not finite changes nothing here, stops the run and names the rows.",
        off=("false",),
    ),
    no_place("use_cpu", "Name a backend for CPUs in backend.name; `qlora-hal backends` lists them."),
    not_needed(
        "tf32 torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config "
        "dataloader_num_workers "
        "dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers dataloader_drop_last "
        "auto_find_batch_size",
        "It is for speed there; here backends choose their kernels, and rows are prepared before the first step.",
    ),
    not_needed(
        "run_name project hub_token logging_dir logging_strategy logging_first_step log_level disable_tqdm "
        "include_num_input_tokens_seen skip_memory_metrics save_only_model save_safetensors overwrite_output_dir",
        "It is for logs and files there; a run here has a folder with its record, and is never overwritten unasked.",
    ),
    not_needed(
        "do_train do_eval do_predict remove_unused_columns gradient_checkpointing_kwargs "
        "activation_checkpointing_kwargs "
        "ddp_timeout ddp_find_unused_parameters ddp_backend local_rank label_names average_tokens_across_devices "
        "length_column_name train_sampling_strategy use_cache ddp_broadcast_buffers ddp_bucket_cap_mb ddp_static_graph "
        "dataloader_in_order dataloader_multiprocessing_context torch_empty_cache_steps save_on_each_node "
        "log_level_replica log_on_each_node restore_callback_states_from_checkpoint enable_jit_checkpoint",
        "It steers that tool's own program.",
    ),
    not_needed(
        "batch_eval_metrics eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
        "prediction_loss_only",
        METRICS,
    ),
    not_needed("eval_on_start", "Held-out rows are scored before the first step here."),
    not_needed("full_determinism", "training.seed fixes all that is drawn here."),
    not_needed("trackio_bucket_id trackio_static_space_id", "It is for logs there."),
)

ADAPTER = table(
    same("lora_r LoraConfig.r get_peft_model.r r", "lora.r"),
    same("lora_alpha LoraConfig.lora_alpha get_peft_model.lora_alpha", "lora.alpha"),
    same("lora_dropout LoraConfig.lora_dropout get_peft_model.lora_dropout", "lora.dropout"),
    same("use_rslora LoraConfig.use_rslora get_peft_model.use_rslora", "lora.use_rslora"),
    translated(
        "lora_target_modules LoraConfig.target_modules get_peft_model.target_modules target_modules",
        "lora.target_modules",
        "Names or one expression, by the same rules.",
        target_modules,
    ),
    translated("LoraConfig.bias get_peft_model.bias bias", "lora.bias", "none is the only choice here.", bias),
    no_place(
        "use_dora LoraConfig.use_dora", "DoRA trains magnitudes beside the product; here the adapter is plain LoRA."
    ),
    no_place(
        "lora_modules_to_save LoraConfig.modules_to_save get_peft_model.modules_to_save modules_to_save",
        "Embeddings and heads stay frozen; adapters are on linear layers.",
    ),
    no_place(
        "lora_target_parameters LoraConfig.target_parameters get_peft_model.target_parameters",
        "Experts are target modules like others (gate_proj, up_proj, down_proj); lora.experts leaves them out.",
    ),
    no_place(
        "LoraConfig.init_lora_weights get_peft_model.init_lora_weights init_lora_weights",
        "A begins with Kaiming's uniform values and B with zeros; other first values are not offered.",
        off=(True, "True", "true"),
    ),
    no_place(
        "LoraConfig.layers_to_transform get_peft_model.layers_to_transform LoraConfig.layers_pattern "
        "get_peft_model.layers_pattern",
        "Write the layers into an expression: target_modules: 'model\\.layers\\.(?:0|1)\\..*'.",
    ),
    no_place(
        "LoraConfig.rank_pattern LoraConfig.alpha_pattern LoraConfig.loftq_config get_peft_model.loftq_config",
        "One rank and one alpha hold for all modules, and A and B begin as usual.",
    ),
    no_place(
        "LoraConfig.alora_invocation_tokens LoraConfig.arrow_config LoraConfig.corda_config LoraConfig.eva_config "
        "LoraConfig.kasa_config LoraConfig.lora_ga_config LoraConfig.monteclora_config LoraConfig.velora_config "
        "LoraConfig.use_bdlora LoraConfig.use_qalora LoraConfig.qalora_group_size LoraConfig.lora_bias",
        PLAIN_LORA,
    ),
    no_place("LoraConfig.exclude_modules", "Name the modules that get an adapter in lora.target_modules."),
    no_place("LoraConfig.ensure_weight_tying LoraConfig.trainable_token_indices", FROZEN),
    no_place("LoraConfig.layer_replication", AS_FILES_SAY),
    not_needed(
        "LoraConfig.auto_mapping LoraConfig.fan_in_fan_out LoraConfig.megatron_config LoraConfig.megatron_core "
        "LoraConfig.peft_type LoraConfig.peft_version LoraConfig.runtime_config",
        "It steers that tool's own program.",
    ),
    not_needed(
        "LoraConfig.task_type lora_task_type task_type LoraConfig.inference_mode get_peft_model.task_type",
        "Language models only.",
    ),
)

QUANTIZATION = table(
    translated(
        "load_in_4bit BitsAndBytesConfig.load_in_4bit from_pretrained.load_in_4bit",
        "quantization.weight_format",
        "bitsandbytes' NF4 or FP4; false leaves the base in 16 bits.",
        four_bit,
    ),
    translated(
        "load_in_8bit BitsAndBytesConfig.load_in_8bit from_pretrained.load_in_8bit",
        "quantization.weight_format",
        "LLM.int8; activations are not rounded here.",
        eight_bit,
    ),
    translated(
        "bnb_4bit_quant_type BitsAndBytesConfig.bnb_4bit_quant_type",
        "quantization.weight_format",
        "nf4 or fp4; bitsandbytes' own default is fp4.",
        quant_type,
    ),
    translated(
        "use_bnb_nested_quant bnb_4bit_use_double_quant BitsAndBytesConfig.bnb_4bit_use_double_quant",
        "quantization.double_quant",
        "Scales are quantized, too.",
        nested,
    ),
    translated(
        "bnb_4bit_compute_dtype BitsAndBytesConfig.bnb_4bit_compute_dtype",
        "quantization.compute_dtype",
        "The dtype of products.",
        dtype,
    ),
    no_place(
        "BitsAndBytesConfig.llm_int8_threshold",
        "8 bits are of weights here; activations are not rounded, and no column is left out.",
    ),
    no_place("BitsAndBytesConfig.llm_int8_skip_modules", "Layers are not left out of quantization by name."),
    no_place(
        "BitsAndBytesConfig.llm_int8_enable_fp32_cpu_offload",
        "training.base_offload keeps the base in the host's memory, in its format.",
    ),
    not_needed("BitsAndBytesConfig.llm_int8_has_fp16_weight", "The base stays frozen."),
    not_needed(
        "bnb_4bit_quant_storage BitsAndBytesConfig.bnb_4bit_quant_storage",
        "The dtype that packed bytes are declared as; the numbers are the same.",
    ),
)


def training_defaults(**other: Value) -> dict[str, Default]:
    """What transformers does unasked where this project's default is another; `other` replaces values."""
    values: dict[str, Value] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "warmup_ratio": 0.0,
        "save_steps": 500,
        "seed": 42,
        **other,
    }
    unless = {"warmup_ratio": ("training.warmup_steps",), "num_train_epochs": ("training.max_steps",)}
    return {name: Default(value, unless.get(name, ())) for name, value in values.items()}


HABITS: dict[str, tuple[Value, str]] = {
    "data.group_by_length": (False, "transformers takes rows in drawn order unless it is asked for lengths"),
    "training.load_best_adapter_at_end": (False, "transformers keeps the last adapter unless it is asked for the best"),
}
TARGETS_OF_PEFT = ["q_proj", "v_proj"]
"""What peft takes for Llama, Mistral, Qwen, Gemma and Mixtral when no modules are named (peft 0.21.2)."""
KEY_OF_ALL: tuple[Key, ...] = (*TRAINING, *ADAPTER, *QUANTIZATION)
