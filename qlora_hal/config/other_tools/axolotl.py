"""Axolotl's YAML. Read in the release of July 2026: `utils/schemas`, `loaders/model.py`, `core/builders/base.py`."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_hal.config.other_tools import hugging_face as hf
from qlora_hal.config.other_tools.tables import (
    Default,
    Fate,
    Given,
    Outcome,
    Rule,
    Tool,
    Value,
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

_FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "messages",
    "sharegpt": "sharegpt",
    "completion": "text",
}
_FULL = "All weights are trained there; here an adapter is, and the base stays frozen."


def _adapter(value: Value, given: Given) -> Outcome:
    if is_off(value):
        return left(_FULL)
    if value == "qlora":
        return becomes({"quantization.weight_format": "nf4"}, "qlora is NF4 with LoRA")
    if value == "lora":
        return unneeded("LoRA, as here; load_in_4bit and load_in_8bit say how the base is stored")
    return left(f"{value} is not offered; here the adapter is LoRA")


def _load_in_4bit(value: Value, given: Given) -> Outcome:
    if is_off(value) and given.get("adapter") == "qlora":
        return unneeded("adapter: qlora stores 4 bits")
    return hf.four_bit(value, given)


def _bnb_config(value: Value, given: Given) -> Outcome:
    if is_off(value) or not isinstance(value, Mapping):
        return unneeded("nothing is set there")
    settings: dict[str, Value] = {}
    if "bnb_4bit_use_double_quant" in value:
        settings["quantization.double_quant"] = not is_off(value["bnb_4bit_use_double_quant"])
    if "bnb_4bit_quant_type" in value:
        settings["quantization.weight_format"] = value["bnb_4bit_quant_type"]
    return becomes(settings, "Axolotl's own choice is NF4 with double quantization")


def _datasets(value: Value, given: Given) -> Outcome:
    rows = [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
    if not rows:
        return left("a list of data sets with a path each is expected")
    first, others = rows[0], [str(row.get("path")) for row in rows[1:]]
    settings: dict[str, Value] = {"data.path": _path_of(first)}
    kind = first.get("type", "")
    notes = []
    if isinstance(kind, str) and (form := _FORMATS.get(kind.partition(".")[0])):
        settings["data.format"] = form
        if form == "alpaca":
            notes.append("Axolotl writes Alpaca's own prompt around a row; here it becomes turns of the chat template")
    elif kind:
        notes.append(f"type {kind} is not known here: the format of a row is recognized and reported")
    if "split" in first:
        settings["data.split"] = first["split"]
    strange = sorted(first.keys() - {"path", "type", "split", "data_files", "ds_type"})
    if strange:
        notes.append(f"{', '.join(strange)} of the data set is not taken; --show-batch shows what is trained on")
    if others:
        notes.append(f"more data sets are not taken: {', '.join(others)}")
    return becomes(settings, "; ".join(notes)) if notes else Outcome(Fate.TAKEN, settings)


def _path_of(dataset: Mapping[str, Value]) -> Value:
    files = dataset.get("data_files")
    first = files[0] if isinstance(files, list) and files else files
    return first if isinstance(first, str) else dataset.get("path")


def _test_datasets(value: Value, given: Given) -> Outcome:
    rows = [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
    if not rows:
        return unneeded("nothing is set there")
    settings: dict[str, Value] = {"data.validation_path": _path_of(rows[0])}
    if "split" in rows[0]:
        settings["data.validation_split"] = rows[0]["split"]
    return becomes(settings, "the first one" if len(rows) > 1 else "rows for evaluation")


def _chat_template(value: Value, given: Given) -> Outcome:
    if is_off(value) or value in ("tokenizer_default", "jinja"):
        return unneeded("the tokenizer's own, as here")
    if value == "chatml":
        return taken("data.chat_template", "chatml")
    return left(
        f"Axolotl writes its own template {value}; here the tokenizer's is used, or a Jinja file in data.chat_template"
    )


def _targets_linear(value: Value, given: Given) -> Outcome:
    if not is_on(value):
        return unneeded("off there; lora_target_modules counts")
    if given.values.get("lora_target_modules"):
        return unneeded("lora_target_modules is set as well and is taken")
    return becomes({"lora.target_modules": "all-linear"}, "every linear layer but the head")


def _excess(value: Value, given: Given) -> Outcome:
    if value == "raise":
        return left("rows that are too long stop the run there; here data.truncation says what happens to them")
    return becomes({"data.truncation": "right" if value == "truncate" else "drop"}, f"{value} there")


def _per_epoch(setting: str) -> Rule:
    def rule(value: Value, given: Given) -> Outcome:
        number = as_number(value)
        if number is None or number == 0:
            return unneeded("not set there")
        return left(
            f"{number:g} in an epoch: set {setting} to the steps of an epoch / {number:g} (--dry-run counts them)"
        )

    return rule


def _train_on_inputs(value: Value, given: Given) -> Outcome:
    if is_on(value):
        return becomes({"data.train_on": "all"}, "loss on all tokens")
    return taken("data.train_on", "assistant")


def _tensorboard(value: Value, given: Given) -> Outcome:
    return unneeded("off there") if is_off(value) else becomes({"training.report_to": ["tensorboard"]}, "a tracker")


def _defaults(given: Given) -> dict[str, Default]:
    return {
        "adapter": Default(None),
        "sequence_len": Default(512),
        "micro_batch_size": Default(1),
        "lr_scheduler": Default("cosine"),
        "lora_target_modules": Default(hf.TARGETS_OF_PEFT, ("lora.target_modules",)),
        "excess_length_strategy": Default("drop"),
        "save_steps": Default(500, ("saves_per_epoch",)),
        "seed": Default(42),
    }


def _objective(given: Given) -> str:
    return "" if is_off(given.get("rl")) else f"rl: {given.get('rl')}"


AXOLOTL = Tool(
    name="axolotl",
    title="Axolotl",
    read="July 2026",
    keys=table(
        same("base_model", "model.name_or_path"),
        translated("revision_of_model", "model.revision", "Branch, tag or commit.", hf.revision),
        translated("adapter", "quantization.weight_format", "`qlora` is NF4; none trains all weights.", _adapter),
        translated("load_in_4bit", "quantization.weight_format", "NF4 with double quantization.", _load_in_4bit),
        translated("load_in_8bit", "quantization.weight_format", "LLM.int8.", hf.eight_bit),
        translated("bnb_config_kwargs", "quantization.double_quant", "Over Axolotl's own choice.", _bnb_config),
        same("lora_r", "lora.r"),
        same("lora_alpha", "lora.alpha"),
        same("lora_dropout", "lora.dropout"),
        same("peft_use_rslora", "lora.use_rslora"),
        translated("lora_target_modules", "lora.target_modules", "Names or one expression.", hf.target_modules),
        translated("lora_target_linear", "lora.target_modules", "Every linear layer but the head.", _targets_linear),
        translated("datasets", "data.path", "A list; `type` is the format of a row.", _datasets),
        translated("test_datasets", "data.validation_path", "Rows for evaluation.", _test_datasets),
        translated("val_set_size", "data.validation_fraction", "A share, or from 1 a number of rows.", hf.held_out),
        translated("chat_template", "data.chat_template", "Axolotl's own templates by name.", _chat_template),
        same("sequence_len", "data.max_seq_length"),
        translated("excess_length_strategy", "data.truncation", "Axolotl drops rows that are too long.", _excess),
        same("sample_packing", "data.packing", "Several rows in a sequence, without attention across them, as here."),
        translated("train_on_inputs", "data.train_on", "Loss on prompts, too.", _train_on_inputs),
        same("group_by_length", "data.group_by_length"),
        same("micro_batch_size", "training.per_device_train_batch_size", "Sequences of one device and one pass."),
        same("eval_batch_size", "training.per_device_eval_batch_size"),
        same("gradient_accumulation_steps", "training.gradient_accumulation_steps"),
        same("batch_size", "training.global_batch_size", "Sequences of a step over all devices."),
        same("num_epochs", "training.num_train_epochs"),
        translated("max_steps", "training.max_steps", "Overrides the epochs.", hf.max_steps),
        same("learning_rate", "training.learning_rate"),
        translated(
            "lr_scheduler lr_scheduler_type", "training.lr_scheduler_type", "Axolotl's own is cosine.", hf.scheduler
        ),
        same("warmup_ratio", "training.warmup_ratio"),
        translated("warmup_steps", "training.warmup_steps", "Below 1 a share of all steps.", hf.warmup_steps),
        translated("optimizer", "training.optim", "AdamW under several names.", hf.optimizer),
        same("weight_decay", "training.weight_decay"),
        same("max_grad_norm", "training.max_grad_norm"),
        same("adam_beta1", "training.adam_beta1"),
        same("adam_beta2", "training.adam_beta2"),
        same("adam_epsilon adam_eps", "training.adam_epsilon"),
        translated("gradient_checkpointing", "training.gradient_checkpointing", "Saves memory.", hf.checkpointing),
        translated(
            "bf16 bfloat16", "quantization.compute_dtype", "`auto`: what the device has.", hf.half_precision("bfloat16")
        ),
        translated("fp16 float16", "quantization.compute_dtype", "With loss scaling.", hf.half_precision("float16")),
        translated("torch_dtype", "quantization.compute_dtype", "The dtype of products.", hf.dtype),
        same("seed", "training.seed", hf.SEED),
        same("logging_steps", "training.logging_steps"),
        translated("eval_steps", "training.eval_steps", "Needs held-out rows here.", hf.eval_steps),
        translated(
            "evals_per_epoch", "training.eval_steps", "A number in an epoch.", _per_epoch("training.eval_steps")
        ),
        translated("save_strategy", "checkpoint.save_steps", "When to save.", hf.save_strategy),
        translated("eval_strategy evaluation_strategy", "training.eval_steps", "When to evaluate.", hf.eval_strategy),
        translated("save_steps", "checkpoint.save_steps", "Steps.", hf.save_steps),
        translated(
            "saves_per_epoch", "checkpoint.save_steps", "A number in an epoch.", _per_epoch("checkpoint.save_steps")
        ),
        translated("save_total_limit", "checkpoint.save_total_limit", "At least 2 here.", hf.save_total_limit),
        same("early_stopping_patience", "training.early_stopping_patience"),
        same("output_dir", "output_dir"),
        translated("use_tensorboard", "training.report_to", "A tracker.", _tensorboard),
        no_place("peft_use_dora", "DoRA trains magnitudes beside the product; here the adapter is plain LoRA."),
        no_place("lora_modules_to_save", "Embeddings and heads stay frozen; adapters are on linear layers."),
        no_place("lora_target_parameters", "Adapters on stacked experts are not offered."),
        no_place("peft_layers_to_transform", "Write the layers into an expression in lora.target_modules."),
        no_place("peft_init_lora_weights peft loraplus_lr_ratio relora", "A and B begin and learn as in LoRA's paper."),
        no_place("neftune_noise_alpha", "NEFTune adds noise to embeddings; no backend here does."),
        no_place("unfrozen_parameters", _FULL),
        no_place(
            "wandb_project use_wandb use_mlflow mlflow_experiment_name trackio_project_name comet_project_name",
            "Name trackers in training.report_to (tensorboard, wandb, mlflow, trackio); their own variables name "
            "projects.",
        ),
        no_place(
            "deepspeed fsdp fsdp_config fsdp_version", "Several devices are started with --devices N (parallel.mode)."
        ),
        no_place("context_parallel_size expert_parallel_size tensor_parallel_size", "Rows are not cut over devices."),
        no_place(
            "resume_from_checkpoint auto_resume_from_checkpoints", "Checkpoints of other tools are not continued."
        ),
        no_place("lora_model_dir", "A run begins with a new adapter; merge the old one into its base first."),
        no_place(
            "special_tokens tokens added_tokens_overrides", "The tokenizer's files are taken unchanged.", off=({},)
        ),
        no_place("eot_tokens", "What a turn ends with comes from the chat template itself."),
        no_place("trust_remote_code", hf.STRANGERS_CODE),
        no_place(
            "plugins", "Plugins are for speed or other losses there; here losses and kernels come from the backend."
        ),
        no_place("curriculum_sampling sample_packing_sequentially", "Rows are drawn anew in each epoch."),
        no_place("quantize_moe_experts gptq", "Stored as the checkpoint is, or by quantization.weight_format."),
        no_place("roles_to_train train_on_eos", "Assistant turns are trained whole, with their end."),
        not_needed(
            "flash_attention flash_attn_cross_entropy flash_attn_rms_norm xformers_attention sdp_attention "
            "attn_implementation "
            "flex_attention tf32 torch_compile liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
            "liger_fused_linear_cross_entropy liger_rms_norm_gated cut_cross_entropy lora_mlp_kernel lora_qkv_kernel "
            "lora_o_kernel unsloth_lora_mlp use_kernels use_scattermoe activation_offloading low_cpu_mem_usage "
            "gradient_checkpointing_kwargs pad_to_sequence_len eval_sample_packing multipack_real_batches",
            "It is for speed or memory there; here backends choose their kernels.",
        ),
        not_needed(
            "wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model dataset_prepared_path "
            "push_dataset_to_hub hub_model_id "
            "hf_use_auth_token save_only_model max_packed_sequence_len trackio_run_name trackio_space_id "
            "dataset_processes shuffle_merged_datasets skip_prepare_dataset",
            "It is for logs, caches and uploads there.",
        ),
        not_needed(
            "model_type tokenizer_type base_model_config tokenizer_config is_llama_derived_model strict debug "
            "local_rank "
            "device_map ddp ddp_find_unused_parameters remove_unused_columns loss_watchdog_threshold "
            "loss_watchdog_patience "
            "lora_fan_in_fan_out tokenizer_use_fast tokenizer_legacy processor_type tokenizer_use_mistral_common "
            "torchdistx_path "
            "gptq_groupsize gptq_model_v1",
            "The model's own files say it here.",
        ),
        no_place("cosine_min_lr_ratio cosine_constant_lr_ratio", "Schedules here have no arguments; cosine ends at 0."),
        no_place("model_config resize_token_embeddings_to_32x", "The model is taken as its files say."),
        no_place("rl", "Another objective than supervised fine-tuning."),
    ),
    marks=frozenset(
        {"base_model", "micro_batch_size", "sequence_len", "lora_target_linear", "val_set_size", "adapter"}
    ),
    defaults=_defaults,
    habits=hf.HABITS,
    about=("Axolotl's loss of a step is the mean over its trained tokens, as here.",),
    objective=_objective,
)
