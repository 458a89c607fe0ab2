"""Unsloth's scripts and notebooks: FastLanguageModel, its adapter, and TRL's SFTConfig.

Read in unsloth's release of August 2026 (`models/loader.py`, `models/llama.py`) and in its published notebooks.
"""

from __future__ import annotations

from qlora_hal.config.other_tools import hugging_face as hf
from qlora_hal.config.other_tools import trl
from qlora_hal.config.other_tools.tables import (
    Default,
    Given,
    Outcome,
    Tool,
    Value,
    becomes,
    is_off,
    left,
    no_place,
    not_needed,
    same,
    table,
    taken,
    translated,
    unneeded,
)

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _four_bit(value: Value, given: Given) -> Outcome:
    if is_off(value):
        return hf.four_bit(value, given)
    note = "Unsloth's 4 bits are NF4 with double quantization on NVIDIA and AMD"
    return becomes({"quantization.weight_format": "nf4", "quantization.double_quant": True}, note)


def _template(value: Value, given: Given) -> Outcome:
    if value == "chatml":
        return taken("data.chat_template", "chatml")
    return left(
        f"Unsloth writes its own template {value}; here the tokenizer's is used, or a Jinja file in data.chat_template"
    )


def _full(value: Value, given: Given) -> Outcome:
    return (
        unneeded("off there, as here") if is_off(value) else left("all weights are trained there; here an adapter is")
    )


_ITS_OWN_ARGUMENTS = hf.training_defaults(
    learning_rate=5e-5,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    warmup_ratio=0.1,
    weight_decay=0.001,
    optim="adamw_8bit",
    seed=3407,
)
"""What Unsloth writes over the defaults of SFTConfig and its own arguments (`models/rl.py`)."""


def _defaults(given: Given) -> dict[str, Default]:
    return {
        **(hf.training_defaults() if given.values.get("trainer") == "TrainingArguments" else _ITS_OWN_ARGUMENTS),
        "load_in_4bit": Default(True, ("quantization.weight_format",)),
        "lora_r": Default(16),
        "lora_alpha": Default(16),
        "lora_target_modules": Default(_TARGETS),
        "use_gradient_checkpointing": Default("unsloth"),
        "max_seq_length": Default(2048),
    }


_OWN = table(
    translated(
        "load_in_4bit from_pretrained.load_in_4bit",
        "quantization.weight_format",
        "NF4 with double quantization.",
        _four_bit,
    ),
    translated("load_in_8bit from_pretrained.load_in_8bit", "quantization.weight_format", "LLM.int8.", hf.eight_bit),
    same("max_seq_length from_pretrained.max_seq_length max_length", "data.max_seq_length"),
    translated(
        "use_gradient_checkpointing get_peft_model.use_gradient_checkpointing "
        "from_pretrained.use_gradient_checkpointing",
        "training.gradient_checkpointing",
        "`unsloth` also moves activations to the host.",
        hf.checkpointing,
    ),
    translated(
        "chat_template get_chat_template.chat_template",
        "data.chat_template",
        "Unsloth's own templates by name.",
        _template,
    ),
    translated("full_finetuning from_pretrained.full_finetuning", "", "All weights.", _full),
    no_place("get_peft_model.random_state", "Of the adapter's first values; training.seed draws them here."),
    no_place(
        "get_peft_model.finetune_vision_layers get_peft_model.finetune_audio_layers from_pretrained.whisper_language "
        "from_pretrained.whisper_task from_pretrained.num_labels from_pretrained.id2label from_pretrained.label2id "
        "from_pretrained.pooling_mode",
        hf.TEXT_MODELS,
    ),
    no_place(
        "get_peft_model.finetune_language_layers get_peft_model.finetune_attention_modules "
        "get_peft_model.finetune_mlp_modules",
        "Name the modules in lora.target_modules.",
        off=(True,),
    ),
    no_place(
        "get_peft_model.finetune_last_n_layers",
        "Write the layers into an expression: target_modules: 'model\\.layers\\.(?:30|31)\\..*'.",
    ),
    no_place("get_peft_model.ensure_weight_tying", hf.FROZEN),
    no_place("from_pretrained.rope_scaling", hf.AS_FILES_SAY),
    no_place(
        "from_pretrained.resize_model_vocab from_pretrained.tokenizer_name from_pretrained.tokenizer_revision "
        "from_pretrained.fix_tokenizer",
        hf.TOKENIZER,
    ),
    no_place("from_pretrained.subfolder", "Name the folder itself in model.name_or_path."),
    no_place(
        "cos_threshold gamma_proj proj_quant proj_quant_group_size proj_quant_n_bit queue_size "
        "stochastic_round update_proj_gap weight_group_size weight_quant",
        hf.ADAMW,
    ),
    no_place(
        "from_pretrained.load_in_fp8 from_pretrained.float8_kv_cache from_pretrained.float32_mixed_precision",
        f"Formats are those of quantization.weight_format. {hf.FP8}",
    ),
    no_place(
        "get_peft_model.qat_scheme from_pretrained.qat_scheme embedding_learning_rate get_chat_template.mapping",
        "It is not offered.",
    ),
    not_needed(
        "from_pretrained.fast_inference from_pretrained.max_lora_rank from_pretrained.gpu_memory_utilization "
        "get_peft_model.max_seq_length get_chat_template.map_eos_token from_pretrained.offload_embedding "
        "from_pretrained.load_in_16bit from_pretrained.auto_model from_pretrained.unsloth_force_compile "
        "from_pretrained.unsloth_tiled_mlp",
        "It is for serving or has no use there.",
    ),
    not_needed(
        "from_pretrained.auto_config from_pretrained.auto_config_from_caller from_pretrained.checkpoint_skip_layers "
        "from_pretrained.cls from_pretrained.device_map_planner_kwargs from_pretrained.disable_log_stats "
        "from_pretrained.for_inference from_pretrained.fullgraph from_pretrained.local_files_only "
        "from_pretrained.model_patcher from_pretrained.model_types from_pretrained.offload_layers "
        "from_pretrained.on_model_resolved from_pretrained.return_logits from_pretrained.return_tokenizer "
        "from_pretrained.supports_sdpa get_peft_model.temporary_location from_pretrained.text_intent "
        "from_pretrained.text_only from_pretrained.text_only_decoder from_pretrained.unsloth_vllm_standby "
        "from_pretrained.use_exact_model_name from_pretrained.use_unpadding",
        "It steers that tool's own program.",
    ),
)
_TAKEN = {name for key in _OWN for name in key.names}

UNSLOTH = Tool(
    name="unsloth",
    title="Unsloth",
    read="August 2026",
    keys=table(
        *_OWN,
        *(key for key in (*trl.SCRIPT, *trl.FINE_TUNING, *hf.KEY_OF_ALL) if not _TAKEN & set(key.names)),
    ),
    marks=frozenset({"FastLanguageModel", "FastModel", "FastVisionModel", "UnslothTrainingArguments"}),
    defaults=_defaults,
    habits=hf.HABITS | {"data.train_on": ("all", "all tokens are trained unless train_on_responses_only is called")},
    about=("On a Mac Unsloth's 4 bits are MLX's own format, on a GPU NF4; here a format is one on all devices.",),
)
