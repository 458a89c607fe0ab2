"""Words of neighboring tools that people type from habit, and what they are called here. Used for hints alone: no such
word is taken for a setting.

Sources: the arguments of transformers' TrainingArguments, PEFT's LoraConfig and TRL's SFTConfig, and the settings of
Axolotl, LLaMA-Factory, mlx-lm, torchtune and Unsloth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def _words(names: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return ((word, setting) for setting, words in names.items() for word in words.split())


SETTINGS: Mapping[str, str] = dict(
    _words(
        {
            "model.name_or_path": "base_model model_name_or_path model_name model_id model_path base "
            "base_model_name_or_path pretrained_model_name_or_path",
            "model.revision": "model_revision",
            "lora.r": "lora_r rank lora_rank lora_dim",
            "lora.alpha": "lora_alpha",
            "lora.dropout": "lora_dropout",
            "lora.target_modules": "lora_target_modules lora_target targets lora_modules lora_layers",
            "lora.use_rslora": "rslora rs_lora use_rs_lora",
            "quantization.weight_format": "bnb_4bit_quant_type quant_type quantization_type",
            "quantization.double_quant": "bnb_4bit_use_double_quant double_quantization use_double_quant",
            "quantization.compute_dtype": "bnb_4bit_compute_dtype dtype torch_dtype precision mixed_precision",
            "quantization.block_size": "group_size q_group_size",
            "data.path": "dataset datasets dataset_path dataset_name data_path data_dir train_file train_data "
            "train_dataset training_data data_file",
            "data.validation_path": "validation_file eval_file eval_dataset eval_data test_datasets valid_file "
            "val_file validation_data",
            "data.validation_fraction": "val_set_size val_size valid_size val_split test_size eval_fraction",
            "data.max_seq_length": "sequence_len max_length max_seq_len cutoff_len seq_len seq_length sequence_length "
            "max_len context_length model_max_length max_tokens block_len",
            "data.packing": "sample_packing pack packed",
            "data.chat_template": "template prompt_template",
            "data.format": "dataset_format formatting",
            "training.learning_rate": "lr peak_lr max_lr learningrate",
            "training.num_train_epochs": "epochs num_epochs n_epochs epoch max_epochs train_epochs",
            "training.max_steps": "num_train_steps max_train_steps steps iters max_iters num_iters total_steps",
            "training.per_device_train_batch_size": "batch_size bs batch micro_batch_size train_batch_size mbs "
            "per_device_batch_size per_gpu_train_batch_size",
            "training.per_device_eval_batch_size": "eval_batch_size val_batch_size",
            "training.gradient_accumulation_steps": "grad_accumulation_steps grad_accum gradient_accumulation grad_acc "
            "accumulation_steps accum_steps accumulate_grad_batches",
            "training.lr_scheduler_type": "scheduler lr_scheduler lr_schedule",
            "training.warmup_ratio": "warmup",
            "training.warmup_steps": "num_warmup_steps warmup_iters",
            "training.optim": "optimizer optimiser",
            "training.weight_decay": "wd decay",
            "training.max_grad_norm": "clip grad_clip gradient_clipping clip_grad_norm max_norm gradient_clip_val",
            "training.adam_epsilon": "adam_eps eps epsilon",
            "training.gradient_checkpointing": "grad_checkpoint use_gradient_checkpointing checkpointing "
            "enable_activation_checkpointing",
            "training.tokens_per_batch": "max_tokens_per_batch batch_tokens tokens_per_micro_batch max_batch_tokens",
            "training.recompute": "recomputation activation_checkpointing activation_offloading recompute_granularity",
            "training.base_offload": "offload cpu_offload offload_param fsdp_cpu_offload fsdp_offload_params",
            "training.seed": "random_state random_seed",
            "training.logging_steps": "log_steps log_every logging_interval steps_per_report log_interval",
            "training.eval_steps": "steps_per_eval eval_every eval_interval eval_strategy evaluation_strategy",
            "training.early_stopping_patience": "patience early_stopping",
            "training.load_best_adapter_at_end": "load_best_model_at_end",
            "training.report_to": "logger loggers tracker trackers",
            "checkpoint.save_steps": "save_every save_interval save_strategy",
            "checkpoint.save_total_limit": "max_checkpoints keep_checkpoints",
            "output_dir": "output out out_dir save_dir save_path adapter_path adapter_dir output_path",
            "backend.name": "device",
        }
    )
)
"""Word -> the setting of the same meaning."""

_LEFT_OUT = "leave it out: LoRA on a quantized base is what is trained, and weight_format: none keeps it in 16 bits"
_IS_COMMAND = "leave it out: train is the command"
_SEVERAL_DEVICES = "pass --devices N"
_LINEAR = "write lora.target_modules: all-linear, which is the default"
_A_NUMBER = {"evals": "training.eval_steps", "saves": "checkpoint.save_steps"}
"""Of times in an epoch, where a number of steps is expected here."""
_BACKEND_CHOOSES = "leave it out: the backend chooses"

REMARKS: Mapping[str, str] = {
    "load_in_4bit": "write quantization.weight_format: nf4",
    "load_in_8bit": "write quantization.weight_format: int8",
    **dict.fromkeys(("quantization_bit", "bits", "q_bits"), "write quantization.weight_format: 4bit, or 8bit"),
    **dict.fromkeys(("bf16", "bfloat16"), "write quantization.compute_dtype: bfloat16"),
    **dict.fromkeys(("fp16", "float16", "half"), "write quantization.compute_dtype: float16"),
    **dict.fromkeys(("adapter", "finetuning_type", "fine_tune_type", "use_lora", "use_peft", "qlora"), _LEFT_OUT),
    **dict.fromkeys(("do_train", "train", "stage"), _IS_COMMAND),
    **dict.fromkeys(("lora_target_linear", "all_linear"), _LINEAR),
    **dict.fromkeys(("num_gpus", "gpus", "nproc_per_node", "num_devices", "fsdp", "deepspeed"), _SEVERAL_DEVICES),
    **dict.fromkeys(("wandb", "use_wandb"), "write training.report_to: [wandb]"),
    "wandb_project": "write training.tracker_project, and training.report_to: [wandb]",
    **{
        f"{what}_per_epoch": f"set {setting} to the steps of an epoch / the number"
        for what, setting in _A_NUMBER.items()
    },
    **dict.fromkeys(("flash_attention", "flash_attn", "attn_implementation", "use_flash_attn"), _BACKEND_CHOOSES),
    **dict.fromkeys(("resume", "resume_from_checkpoint"), "go on with a run by qlora-hal resume RUN_DIR"),
    **dict.fromkeys(("overwrite_output_dir", "force"), "pass --overwrite"),
    **dict.fromkeys(("config", "config_file", "cfg"), "name the file without a flag: qlora-hal train run.yaml"),
    "train_on_inputs": "write data.train_on: all, or assistant, which is the default",
    "scale": "lora.alpha takes it times lora.r",
    "num_layers": "name layers in lora.target_modules, by a regular expression over full paths",
}
"""Word -> what to do instead, where no setting takes the same value."""


def leaf(name: str) -> str:
    """The last word of a dotted name or flag, spelled as in the tables."""
    return name.replace("-", "_").lower().rpartition(".")[2]


def remark(name: str) -> str:
    """What to do instead of a word that has no setting, or ""."""
    return REMARKS.get(leaf(name), "")
