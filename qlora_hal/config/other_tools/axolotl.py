"""Axolotl's YAML. Read in the release of July 2026: `utils/schemas`, `loaders/model.py`, `core/builders/base.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora_hal.config.other_tools import hugging_face as hf
from qlora_hal.config.other_tools.data_sets import DataSet, files_named, renamed, rows_from, whole_split
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
    notes: list[str] = []
    settings = rows_from([found for row in rows for found in _data_sets(row, notes)], notes)
    if not settings:
        return left("a list of data sets with a path each is expected")
    forms = {_form(row, notes) for row in rows}
    if len(forms) == 1 and (form := forms.pop()):
        settings["data.format"] = form
    return becomes(settings, "; ".join(dict.fromkeys(notes))) if notes else Outcome(Fate.TAKEN, settings)


_READ_OF_A_DATA_SET = frozenset(
    {
        *("path", "type", "split", "data_files", "ds_type", "field", "field_messages", "field_tools"),
        *("message_property_mappings", "message_field_role", "message_field_content"),
    }
)


def _data_sets(row: Mapping[str, Value], notes: list[str]) -> Iterator[DataSet]:
    text = isinstance(row.get("type"), str) and str(row["type"]).startswith("completion")
    named = (
        {"text": row.get("field")} if text else {"messages": row.get("field_messages"), "tools": row.get("field_tools")}
    )
    columns = renamed({name: column for name, column in named.items() if column != "conversations"})
    split = whole_split(row.get("split"), notes)
    if strange := sorted(str(key) for key in row.keys() - _READ_OF_A_DATA_SET | _other_turns(row)):
        notes.append(f"{', '.join(strange)} of the data set is not taken; --show-batch shows what is trained on")
    for path in _paths_of(row, notes):
        yield DataSet(path, split, columns)


def _other_turns(row: Mapping[str, Value]) -> set[str]:
    """Keys that name the parts of a turn otherwise than role and content, or from and value: those are read."""
    mapped = row.get("message_property_mappings")
    parts = dict(mapped) if isinstance(mapped, Mapping) else {}
    strange = (
        {"message_property_mappings"} if parts and not set(map(str, parts.values())) <= _PARTS_OF_A_TURN else set()
    )
    older = {"message_field_role", "message_field_content"}
    return strange | {key for key in older if str(row.get(key, "role")) not in _PARTS_OF_A_TURN}


_PARTS_OF_A_TURN = frozenset({"role", "content", "from", "value"})


def _form(row: Mapping[str, Value], notes: list[str]) -> str:
    """The format of its rows by their type, or "" for one that is recognized row by row."""
    kind = row.get("type") or ""
    form = _FORMATS.get(kind.partition(".")[0], "") if isinstance(kind, str) else ""
    if form == "alpaca":
        notes.append("Axolotl writes Alpaca's own prompt around a row; here it becomes turns of the chat template")
    elif kind and not form:
        notes.append(f"type {kind} is not known here: the format of a row is recognized and reported")
    return form


def _paths_of(dataset: Mapping[str, Value], notes: list[str]) -> list[str]:
    """The files that a data set names, or its path where they are files of a repository."""
    path, named = dataset.get("path"), dataset.get("data_files")
    if (files := files_named(path, named)) or not isinstance(path, str) or not path:
        return files
    if named:
        notes.append(f"data_files of {path} are a part of it, which is not taken: all its files are read")
    return [path]


def _test_datasets(value: Value, given: Given) -> Outcome:
    rows = [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
    if not rows:
        return unneeded("nothing is set there")
    notes = ["the first one" if len(rows) > 1 else "rows for evaluation"]
    paths, split = _paths_of(rows[0], notes), whole_split(rows[0].get("split"), notes)
    if not paths:
        return left("a list of data sets with a path each is expected")
    settings: dict[str, Value] = {"data.validation_path": paths[0]}
    if split:
        settings["data.validation_split"] = split
    return becomes(settings, "; ".join(notes))


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
    return becomes({"lora.target_modules": "all-linear"}, "every linear layer but the head")


def _target_modules(value: Value, given: Given) -> Outcome:
    if is_on(given.get("lora_target_linear")):
        return unneeded("lora_target_linear adds every linear layer to them")
    return hf.target_modules(value, given)


def _gptq(value: Value, given: Given) -> Outcome:
    if is_off(value):
        return unneeded("off there")
    return becomes({"quantization.weight_format": "auto"}, "the base stays as its files are stored")


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
        translated("lora_target_modules", "lora.target_modules", "Names or one expression.", _target_modules),
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
        translated("float32", "quantization.compute_dtype", "float32 products.", hf.half_precision("float32")),
        no_place("chat_template_jinja", "Write it into a file, and name that in data.chat_template."),
        no_place("gpu_memory_limit max_memory", "Write training.memory_limit, as 24GB."),
        no_place("pretraining_dataset", "Name the texts in data.path; rows of text are trained whole."),
        no_place("peft_use_dora", "DoRA trains magnitudes beside the product; here the adapter is plain LoRA."),
        no_place(
            "lora_modules_to_save peft_ensure_weight_tying peft_trainable_token_indices fix_untrained_tokens", hf.FROZEN
        ),
        no_place(
            "lora_target_parameters",
            "Experts are target modules like others (gate_proj, up_proj, down_proj); lora.experts leaves them out.",
        ),
        no_place(
            "peft_layers_to_transform peft_layers_pattern",
            "Write the layers into an expression in lora.target_modules.",
        ),
        no_place(
            "peft_init_lora_weights peft loraplus_lr_ratio loraplus_lr_embedding relora relora_cpu_offload "
            "relora_prune_method relora_prune_ratio jagged_restart_steps jagged_restart_warmup_steps "
            "jagged_restart_anneal_steps",
            hf.PLAIN_LORA,
        ),
        no_place("lora_rank_pattern lora_alpha_pattern", "One rank and one alpha hold for all modules."),
        no_place("peft_autocast_adapter_dtype", "Adapters are float32 here.", off=(True,)),
        no_place(
            "neftune_noise_alpha noisy_embedding_alpha", "NEFTune adds noise to embeddings; no backend here does."
        ),
        no_place(
            "unfrozen_parameters full_finetune lisa_n_layers lisa_step_interval lisa_layers_attribute reinit_weights",
            _FULL,
        ),
        no_place(
            "adam_beta3 adam_epsilon2 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of embedding_lr "
            "embedding_lr_scale lr_groups qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits "
            "qgalore_proj_group_size qgalore_proj_quant qgalore_proj_type qgalore_queue_size qgalore_rank "
            "qgalore_scale qgalore_update_proj_gap",
            hf.ADAMW,
        ),
        no_place("use_eaft eaft_alpha eaft_k ebft", hf.LOSS),
        no_place("fp8 fp8_config fp8_enable_fsdp_float8_all_gather", hf.FP8),
        no_place(
            "qat quantization model_quantization_config model_quantization_config_kwargs use_onebitllms",
            "Formats of the base are those of quantization.weight_format.",
        ),
        no_place(
            "wandb_project use_wandb use_mlflow mlflow_experiment_name use_trackio trackio_project_name use_comet "
            "comet_project_name use_swanlab swanlab_project",
            "Name trackers in training.report_to (tensorboard, wandb, mlflow, trackio) and their project in "
            "training.tracker_project.",
        ),
        no_place(
            "deepspeed fsdp fsdp_config fsdp_version fsdp_final_state_dict_type dp_shard_size dp_replicate_size "
            "world_size use_ray ray_num_workers resources_per_worker accelerator_config",
            hf.DEVICES,
        ),
        no_place(
            "context_parallel_size expert_parallel_size tensor_parallel_size sequence_parallel_degree heads_k_stride "
            "ring_attn_func",
            "Rows are not cut over devices.",
        ),
        no_place("layer_offloading ple_cpu_offload lora_on_cpu", "Write training.base_offload."),
        no_place(
            "resume_from_checkpoint auto_resume_from_checkpoints", "Checkpoints of other tools are not continued."
        ),
        no_place("lora_model_dir", "A run begins with a new adapter; merge the old one into its base first."),
        no_place(
            "special_tokens tokens added_tokens_overrides", "The tokenizer's files are taken unchanged.", off=({},)
        ),
        no_place(
            "default_system_message chat_template_kwargs role_boundaries",
            "What a row and the chat template say is rendered.",
        ),
        no_place("dataset_exact_deduplication", "Rows that are there twice are trained twice; the report counts them."),
        no_place(
            "min_sample_len dataset_shard_num dataset_shard_idx", "Rows are taken as data.path and data.max_rows say."
        ),
        no_place("eot_tokens", "What a turn ends with comes from the chat template itself."),
        no_place("trust_remote_code", hf.STRANGERS_CODE),
        no_place(
            "plugins", "Plugins are for speed or other losses there; here losses and kernels come from the backend."
        ),
        no_place(
            "curriculum_sampling sample_packing_sequentially batch_flattening pretraining_sample_concatenation",
            "Rows are drawn anew in each epoch.",
        ),
        translated("gptq", "quantization.weight_format", "A base that is stored in GPTQ.", _gptq),
        no_place("quantize_moe_experts", "Stored as the checkpoint is, or by quantization.weight_format."),
        no_place("roles_to_train train_on_eos", "Assistant turns are trained whole, with their end."),
        not_needed(
            "flash_attention flash_attn_cross_entropy flash_attn_rms_norm xformers_attention sdp_attention "
            "attn_implementation "
            "flex_attention tf32 torch_compile liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
            "liger_fused_linear_cross_entropy liger_rms_norm_gated cut_cross_entropy lora_mlp_kernel lora_qkv_kernel "
            "lora_o_kernel unsloth_lora_mlp use_kernels use_scattermoe activation_offloading low_cpu_mem_usage "
            "use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels torch_compile_mode "
            "chunked_cross_entropy chunked_cross_entropy_num_chunks deepcompile eager_attention sage_attention "
            "sdpa_varlen flash_attn_d512 flash_attn_fuse_mlp flash_optimum flex_attn_compile_kwargs fused_attn_kernel "
            "gemma4_hybrid_attn_impl large_head_attention experts_implementation lora_embedding_kernel "
            "torch_compile_options torch_empty_cache_steps tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp "
            "selective_checkpointing gc_steps gc_collect_steps embeddings_skip_upcast fp32_norms fp32_norm_classes "
            "pretrain_multipack_attn pretrain_multipack_buffer_size streaming_multipack_buffer_size "
            "sample_packing_bin_size sample_packing_eff_est sample_packing_group_size sample_packing_mp_start_method "
            "qlora_sharded_model_loading "
            "gradient_checkpointing_kwargs pad_to_sequence_len eval_sample_packing multipack_real_batches",
            "It is for speed or memory there; here backends choose their kernels.",
        ),
        not_needed(
            "wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model dataset_prepared_path "
            "push_dataset_to_hub hub_model_id "
            "hf_use_auth_token save_only_model max_packed_sequence_len trackio_run_name trackio_space_id "
            "swanlab_experiment_name swanlab_description swanlab_mode swanlab_log_completions "
            "comet_api_key comet_experiment_config comet_experiment_key comet_mode comet_online comet_workspace "
            "hf_mlflow_log_artifacts hub_revision mlflow_run_name mlflow_tracking_uri wandb_mode use_otel_metrics "
            "otel_metrics_host otel_metrics_port ray_run_name include_tkps include_tokens_per_second "
            "total_num_tokens total_supervised_tokens profiler_steps profiler_steps_start save_first_step "
            "tokenizer_save_jinja_files dynamic_checkpoint dataset_keep_in_memory num_dataset_shards_to_save "
            "preprocess_iterable shuffle_before_merging_datasets "
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
            "gptq_groupsize gptq_model_v1 is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model "
            "type_of_model trainer_cls axolotl_config_path is_preprocess experimental_skip_move_to_device "
            "ddp_broadcast_buffers ddp_bucket_cap_mb",
            "The model's own files say it here, or it steers that tool's own program.",
        ),
        no_place(
            "cosine_min_lr_ratio cosine_constant_lr_ratio eta_min lr_div_factor lr_quadratic_warmup",
            "Schedules here have no arguments; cosine ends at 0.",
        ),
        no_place(
            "model_config resize_token_embeddings_to_32x overrides_of_model_config overrides_of_model_kwargs "
            "cls_model_config shrink_embeddings mean_resizing_embeddings llama4_linearized_experts "
            "peft_layer_replication scaling_softmax scaling_softmax_bias scaling_softmax_factor s2_attention use_pose "
            "pose_max_context_len pose_num_chunks pose_split_on_token_ids",
            hf.AS_FILES_SAY,
        ),
        no_place("image_size image_resize_algorithm processor_kwargs freeze_mm_modules", hf.TEXT_MODELS),
        no_place(
            "rl rl_beta trl vllm dpo_beta dpo_generate_during_eval dpo_label_smoothing dpo_loss_type dpo_loss_weights "
            "dpo_norm_loss dpo_padding_free dpo_use_liger_kernel dpo_use_logits_to_keep dpo_use_weighting "
            "kto_desirable_weight kto_undesirable_weight orpo_alpha cpo_alpha rpo_alpha simpo_gamma reward_model "
            "process_reward_model center_rewards_coefficient num_labels max_prompt_len precompute_ref_log_probs",
            hf.OBJECTIVE,
        ),
        not_needed(
            "do_bench_eval bench_dataset bench_split do_causal_lm_eval eval_causal_lm_metrics eval_max_new_tokens "
            "eval_table_size eval_sequence_len",
            hf.METRICS,
        ),
        not_needed(
            "generate_samples num_generation_samples generation_do_sample generation_max_new_tokens "
            "generation_prompt_ratio generation_temperature generation_top_k generation_top_p gradio_max_new_tokens "
            "gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title",
            f"{hf.ANSWERS} Prompts for the report are training.sample_prompts here.",
        ),
        not_needed("merge_lora merge_method", "Merging is a command of its own: `qlora-hal merge`."),
    ),
    marks=frozenset(
        {"base_model", "micro_batch_size", "sequence_len", "lora_target_linear", "val_set_size", "adapter"}
    ),
    defaults=_defaults,
    habits={
        **hf.HABITS,
        "quantization.weight_format": ("none", "nothing is quantized unless load_in_4bit or load_in_8bit is set"),
    },
    about=("Axolotl's loss of a step is the mean over its trained tokens, as here.",),
    objective=_objective,
)
