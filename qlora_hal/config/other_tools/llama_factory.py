"""LLaMA-Factory's YAML and JSON. Read in the release of August 2026: `hparams/*_args.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qlora_hal.config.other_tools import hugging_face as hf
from qlora_hal.config.other_tools.data_sets import DataSet, renamed, rows_from, whole_split
from qlora_hal.config.other_tools.tables import (
    Default,
    Given,
    Outcome,
    Rule,
    Tool,
    Value,
    as_names,
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
from qlora_hal.files import strict_json


def _quantization_bit(value: Value, given: Given) -> Outcome:
    if is_off(value):
        return unneeded("nothing is quantized there")
    method = str(given.get("quantization_method", "bnb")).lower()
    if method not in ("bnb", "bitsandbytes"):
        return left(f"{method} with {value} bits is not offered; here 4bit and 8bit are bitsandbytes' formats")
    if str(value) == "8":
        return hf.eight_bit(True, given)
    if str(value) != "4":
        return left(f"{value} bits are not offered; here 4bit and 8bit are")
    kind = str(given.get("quantization_type", "nf4"))
    return becomes({"quantization.weight_format": kind}, f"bitsandbytes' {kind.upper()} in blocks of 64")


def _only_with_bits(here: str) -> Rule:
    def rule(value: Value, given: Given) -> Outcome:
        if is_off(given.get("quantization_bit")):
            return unneeded("nothing is quantized there")
        return taken(here, value)

    return rule


def _finetuning_type(value: Value, given: Given) -> Outcome:
    if value == "lora":
        return unneeded("LoRA, as here")
    return left(f"{value} is not offered: here an adapter is trained, and the base stays frozen")


def _target(value: Value, given: Given) -> Outcome:
    if value == "all":
        return becomes({"lora.target_modules": "all-linear"}, "every linear layer but the head")
    return taken("lora.target_modules", as_names(value))


_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}


def _dataset(value: Value, given: Given) -> Outcome:
    """Names of dataset_info.json, which stand for files beside it or for data sets of the hub."""
    folder, notes = Path(str(given.get("dataset_dir"))), ["by dataset_info.json"]
    entries = {name: _entry(folder, name) for name in as_names(value)}
    found = [_data_set(folder, name, entry, notes) for name, entry in entries.items()]
    settings = rows_from([data_set for data_set in found if data_set is not None], notes)
    unsaid = ", ".join(name for name, data_set in zip(entries, found, strict=True) if data_set is None)
    if unsaid:
        notes.append(f"{folder / 'dataset_info.json'} does not say here what {unsaid} is: set its file or hub id")
    if not settings:
        return left(notes[-1])
    forms = {_form(entry) for entry in entries.values()}
    if not unsaid and len(forms) == 1 and (form := forms.pop()):
        settings["data.format"] = form
        if form == "alpaca":
            notes.append("instruction and input are joined by one line break there, by two here")
    return becomes(settings, "; ".join(notes))


_READ_OF_AN_ENTRY = frozenset({"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "formatting", "columns", "split"})
_COLUMNS = {
    **{"prompt": "instruction", "query": "input", "response": "output"},
    **{name: name for name in ("history", "messages", "system", "tools")},
}
"""What the columns of an entry are called there, and by which name of a format they are read here."""


def _data_set(folder: Path, name: str, entry: Mapping[str, Value], notes: list[str]) -> DataSet | None:
    if "hf_hub_url" in entry:
        path = str(entry["hf_hub_url"])
    elif "file_name" in entry:
        path = str(folder / str(entry["file_name"]))
    else:
        return None
    there = _columns(entry)
    named = (
        {"text": there["prompt"]}
        if _form(entry) == "text"
        else {_COLUMNS[key]: column for key, column in there.items() if key in _COLUMNS and column != "conversations"}
    )
    strange = sorted({*(entry.keys() - _READ_OF_AN_ENTRY), *(there.keys() - _COLUMNS.keys())})
    if strange:
        notes.append(f"{', '.join(strange)} of {name} is not taken; --show-batch shows what is trained on")
    return DataSet(path, whole_split(entry.get("split"), notes), renamed(named))


def _columns(entry: Mapping[str, Value]) -> Mapping[str, Value]:
    columns = entry.get("columns")
    return columns if isinstance(columns, Mapping) else {}


def _form(entry: Mapping[str, Value]) -> str:
    """The format of an entry's rows; a prompt that no column answers is a text to train on (`stage: pt`)."""
    columns = _columns(entry)
    form = _FORMATS.get(str(entry.get("formatting", "alpaca")), "")
    return "text" if form == "alpaca" and "prompt" in columns and "response" not in columns else form


def _entry(folder: Path, name: str) -> Mapping[str, Value]:
    try:
        entry = strict_json.read_foreign_object(folder / "dataset_info.json").get(name)
    except (OSError, ValueError):
        return {}
    return entry if isinstance(entry, Mapping) else {}


def _eval_dataset(value: Value, given: Given) -> Outcome:
    outcome = _dataset(",".join(as_names(value)[:1]), given)
    path = outcome.settings.get("data.path")
    if path is None:
        return outcome
    more = "; more data sets are not taken" if len(as_names(value)) > 1 else ""
    settings = {"data.validation_path": path, "data.validation_split": outcome.settings.get("data.split")}
    return becomes({here: held for here, held in settings.items() if held}, f"{outcome.note}{more}")


def _template(value: Value, given: Given) -> Outcome:
    if value == "chatml":
        return taken("data.chat_template", "chatml")
    return left(
        f"LLaMA-Factory writes its own template {value}; here the tokenizer's is used, or a Jinja file in "
        "data.chat_template"
    )


def _packing(value: Value, given: Given) -> Outcome:
    if is_on(given.get("neat_packing")):
        return becomes({"data.packing": True}, "neat_packing packs, whatever packing says")
    if is_off(value):
        return taken("data.packing", False)
    return becomes({"data.packing": True}, "rows of one sequence see each other there (without neat_packing), not here")


def _train_on_prompt(value: Value, given: Given) -> Outcome:
    if is_off(value) and is_on(given.get("mask_history")):
        return unneeded("no loss on prompts, as here; mask_history says which answers count")
    return (
        becomes({"data.train_on": "all"}, "loss on prompts, too")
        if is_on(value)
        else taken("data.train_on", "assistant")
    )


def _no_checkpointing(value: Value, given: Given) -> Outcome:
    return becomes({"training.gradient_checkpointing": not is_on(value)}, "on there unless it is disabled")


def _neat_packing(value: Value, given: Given) -> Outcome:
    if is_off(value):
        return unneeded("packing says it")
    return becomes({"data.packing": True}, "it packs, too; rows of one sequence do not see each other, as here")


def _mask_history(value: Value, given: Given) -> Outcome:
    if is_off(value):
        return unneeded("every turn is trained, as here")
    note = "the last turn of each row; a row that is too long loses its earliest turns there"
    return becomes({"data.train_on": "last"}, note)


def _no_shuffling(value: Value, given: Given) -> Outcome:
    return becomes(
        {"data.shuffle": not is_on(value)}, "rows in the order of the file" if is_on(value) else "in drawn order"
    )


def _defaults(given: Given) -> dict[str, Default]:
    rank = given.number("lora_rank", 8)
    return {
        **hf.training_defaults(),
        "lora_rank": Default(8),
        "lora_alpha": Default(2 * rank),
        "cutoff_len": Default(2048),
        "disable_gradient_checkpointing": Default(False),
        "dataset_dir": Default("data"),
        **({"packing": Default(True)} if given.get("stage") == "pt" else {}),
    }


def _objective(given: Given) -> str:
    stage = str(given.get("stage", "sft"))
    return "" if stage in ("sft", "pt") else f"stage: {stage}"


def _stage(value: Value, given: Given) -> Outcome:
    if value == "pt":
        return becomes({"data.train_on": "all"}, "pre-training is a loss on all tokens")
    return unneeded("supervised fine-tuning, as here")


_OWN = table(
    same("model_name_or_path", "model.name_or_path"),
    translated("model_revision", "model.revision", "Branch, tag or commit.", hf.revision),
    translated("stage", "data.train_on", "`sft`, or `pt`: a loss on all tokens.", _stage),
    translated("finetuning_type", "", "`lora`; others are not offered.", _finetuning_type),
    same("lora_rank", "lora.r"),
    same("lora_alpha", "lora.alpha", "Twice the rank there when it is not given."),
    same("lora_dropout", "lora.dropout"),
    same("use_rslora", "lora.use_rslora"),
    translated("lora_target", "lora.target_modules", "`all`, or names with commas.", _target),
    translated("quantization_bit", "quantization.weight_format", "bitsandbytes' 4 or 8 bits.", _quantization_bit),
    translated(
        "quantization_type", "quantization.weight_format", "nf4 or fp4.", _only_with_bits("quantization.weight_format")
    ),
    translated(
        "double_quantization",
        "quantization.double_quant",
        "On there by default.",
        _only_with_bits("quantization.double_quant"),
    ),
    translated("dataset", "data.path", "Names of dataset_info.json in `dataset_dir`.", _dataset),
    translated("eval_dataset", "data.validation_path", "Names of dataset_info.json.", _eval_dataset),
    translated("template", "data.chat_template", "LLaMA-Factory's own templates by name.", _template),
    same("cutoff_len", "data.max_seq_length"),
    translated("packing", "data.packing", "Rows of a sequence see each other, unless `neat_packing`.", _packing),
    translated("train_on_prompt", "data.train_on", "Loss on prompts, too.", _train_on_prompt),
    translated("val_size", "data.validation_fraction", "A share, or from 1 a number of rows.", hf.held_out),
    translated(
        "disable_gradient_checkpointing", "training.gradient_checkpointing", "On there by default.", _no_checkpointing
    ),
    same("max_samples", "data.max_rows", "The first rows of each data set."),
    translated("neat_packing", "data.packing", "Packs without attention across rows.", _neat_packing),
    translated("mask_history", "data.train_on", "The last turn alone.", _mask_history),
    translated("disable_shuffling", "data.shuffle", "Rows in the order of the file.", _no_shuffling),
    same("early_stopping_steps", "training.early_stopping_patience", "Evaluations without improvement."),
    no_place("use_dft_loss use_asft_loss use_eaft_loss asft_alpha eaft_alpha moe_aux_loss_coef", hf.LOSS),
    no_place(
        "pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight "
        "ld_alpha simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model "
        "ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters "
        "reward_model_quantization_bit reward_model_type",
        hf.OBJECTIVE,
    ),
    no_place(
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules train_from_scratch",
        "Weights of the base stay frozen here; an adapter is trained.",
    ),
    no_place("oft_rank oft_block_size oft_target module_dropout", "Here the adapter is LoRA."),
    translated(
        "pure_bf16",
        "quantization.compute_dtype",
        "Adapters are bfloat16, too, there; float32 here.",
        hf.half_precision("bfloat16"),
    ),
    no_place("use_dora", "DoRA trains magnitudes beside the product; here the adapter is plain LoRA."),
    no_place("additional_target", "Embeddings and heads stay frozen; adapters are on linear layers."),
    no_place("loraplus_lr_ratio pissa_init pissa_iter pissa_convert", "A and B begin and learn as in LoRA's paper."),
    no_place("adapter_name_or_path", "A run begins with a new adapter; merge the old one into its base first."),
    no_place(
        "default_system enable_thinking preserve_thinking tool_format",
        "What a row and the chat template say is rendered.",
    ),
    no_place(
        "mix_strategy interleave_probs streaming",
        "Data sets are joined, and read before the first step.",
        off=("concat",),
    ),
    no_place(
        "use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro apollo_layerwise apollo_proj "
        "apollo_proj_type apollo_rank apollo_scale apollo_scale_front apollo_scale_type apollo_target "
        "apollo_update_interval badam_mask_mode badam_mode badam_start_block badam_switch_interval badam_switch_mode "
        "badam_update_ratio badam_verbose galore_layerwise galore_proj_type galore_rank galore_scale galore_target "
        "galore_update_interval loraplus_lr_embedding",
        hf.ADAMW,
    ),
    no_place(
        "use_unsloth use_kt use_mca use_v1_kernels kt_config kt_cpu_activation "
        "kt_expert_checkpoint_path kt_lora_expert_intermediate_size kt_lora_expert_num kt_use_lora_experts "
        "kt_weight_path kt_non_expert_weight_path",
        "The backend is chosen by backend.name, which --help lists.",
    ),
    no_place("fp8 fp8_backend fp8_enable_fsdp_float8_all_gather", hf.FP8),
    no_place("use_hyper_parallel hyper_parallel_args", hf.DEVICES),
    no_place(
        "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size context_parallel_size "
        "sequence_parallel",
        "Rows and layers are not cut over devices.",
    ),
    no_place("create_new_adapter adapter_folder", "A run begins with one new adapter."),
    no_place(
        "add_tokens add_special_tokens init_special_tokens new_special_tokens_config split_special_tokens",
        hf.TOKENIZER,
    ),
    no_place("use_swanlab", "Trackers are named in training.report_to (tensorboard, wandb, mlflow, trackio)."),
    no_place("rope_scaling shift_attn mixture_of_depths resize_vocab", "The model is taken as its files say."),
    no_place(
        "image_max_pixels video_max_pixels video_fps video_maxlen freeze_vision_tower freeze_multi_modal_projector "
        "freeze_language_model image_min_pixels video_min_pixels image_do_pan_and_scan crop_to_patches "
        "audio_sampling_rate use_audio_in_video",
        hf.TEXT_MODELS,
    ),
    no_place("trust_remote_code", hf.STRANGERS_CODE),
    not_needed(
        "flash_attn enable_liger_kernel quantization_method quantization_device_map use_reentrant_gc upcast_layernorm",
        "It is for speed there, or is said by another key.",
    ),
    not_needed(
        "do_sample temperature top_k top_p num_beams max_new_tokens repetition_penalty length_penalty "
        "skip_special_tokens use_kv_cache infer_dtype vllm_config vllm_enforce_eager vllm_gpu_util vllm_max_lora_rank "
        "vllm_maxlen sglang_config sglang_lora_backend sglang_maxlen sglang_mem_fraction sglang_tp_size",
        hf.ANSWERS,
    ),
    not_needed(
        "compute_accuracy eval_num_beams eval_on_each_dataset task task_dir lang n_shot download_mode", hf.METRICS
    ),
    not_needed(
        "export_hub_model_id export_quantization_bit export_quantization_dataset export_quantization_maxlen "
        "export_quantization_nsamples",
        "It is for merging and quantizing afterwards: `qlora-hal merge` and `qlora-hal quantize`.",
    ),
    not_needed(
        "swanlab_api_key swanlab_lark_secret swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project "
        "swanlab_run_name swanlab_workspace enable_torch_profiler profile_modules profiler_active_steps "
        "profiler_output_dir profiler_profile_memory profiler_record_shapes profiler_repeat profiler_wait_steps "
        "profiler_warmup_steps profiler_with_stack print_param_status include_effective_tokens_per_second",
        "It is for logs and measuring there.",
    ),
    not_needed(
        "bias_activation_fusion apply_rope_fusion use_distributed_optimizer overlap_param_gather overlap_grad_reduce "
        "moe_grouped_gemm moe_token_dispatcher_type "
        "master_addr master_port ray_init_kwargs data_shared_file_system buffer_size block_diag_attn offload_folder "
        "use_unsloth_gc upcast_lmhead_output ms_hub_token om_hub_token",
        "It steers that tool's own program.",
    ),
    not_needed(
        "preprocessing_num_workers preprocessing_batch_size overwrite_cache plot_loss tokenized_path cache_dir "
        "dataset_dir media_dir ray_num_workers include_num_input_tokens_seen ignore_pad_token_for_loss "
        "predict_with_generate "
        "low_cpu_mem_usage hf_hub_token use_fast_tokenizer infer_backend export_dir export_size export_device "
        "export_legacy_format",
        "It is for caches, logs and processes there.",
    ),
)

LLAMA_FACTORY = Tool(
    name="llama-factory",
    title="LLaMA-Factory",
    read="August 2026",
    keys=table(
        *_OWN, *(key for key in hf.TRAINING if not {name for own in _OWN for name in own.names} & set(key.names))
    ),
    marks=frozenset(
        {
            "finetuning_type",
            "cutoff_len",
            "lora_rank",
            "lora_target",
            "quantization_bit",
            "stage",
            "dataset_dir",
            "template",
        }
    ),
    defaults=_defaults,
    habits={
        **hf.HABITS,
        "quantization.weight_format": ("none", "nothing is quantized unless quantization_bit is set"),
    },
    about=("LLaMA-Factory trains every assistant turn, as here.",),
    objective=_objective,
)
