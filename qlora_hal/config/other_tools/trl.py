"""TRL and Hugging Face's own trainers: YAML and JSON of arguments as TrlParser reads them, and Python scripts.

Read in trl's release of July 2026 (`SFTConfig`, `ModelConfig`, `ScriptArguments`), transformers 5.23.0, peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping

from qlora_hal.config.other_tools import hugging_face as hf
from qlora_hal.config.other_tools.data_sets import BUILDERS, DataSet, files_named, rows_from, whole_split
from qlora_hal.config.other_tools.tables import (
    Default,
    Given,
    Outcome,
    Tool,
    Value,
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

_RESPONSES_ONLY = "train_on_responses_only.called"


def _use_peft(value: Value, given: Given) -> Outcome:
    if is_on(value):
        return unneeded("an adapter, as here")
    return left("all weights are trained there; here an adapter is, and the base stays frozen")


def _length(value: Value, given: Given) -> Outcome:
    return taken("data.max_seq_length", value)


def _split(value: Value, given: Given) -> Outcome:
    if isinstance(value, str) and "[" in value:
        return left(f"{value} is a part of a split, which is not offered; keep the rows in a file")
    return taken("data.split", value)


def _model(value: Value, given: Given) -> Outcome:
    if isinstance(value, str):
        return taken("model.name_or_path", value)
    return unneeded("an object of the script; what it is made of is read where it is made")


def _data_set(value: Value, given: Given) -> Outcome:
    if files_named(value, given.get("load_dataset.data_files")):
        return unneeded("its rows are in load_dataset.data_files")
    if isinstance(value, str) and value in BUILDERS:
        return left(f"{value} is a kind of file, and the script does not spell its files out: set data.path to them")
    return taken("data.path", value)


def _data_files(value: Value, given: Given) -> Outcome:
    notes = ["files of this disk"]
    if isinstance(value, Mapping) and (others := [split for split in value if split != "train"]):
        notes.append(f"of {', '.join(map(str, others))} nothing is taken: name such rows in data.validation_path")
    files = files_named(given.get("load_dataset.path"), value)
    if settings := rows_from([DataSet(file) for file in files], notes):
        return becomes(settings, "; ".join(notes))
    return left("Parts of a data set are not offered; keep the rows in a file")


def _test_split(value: Value, given: Given) -> Outcome:
    path = given.get("dataset_name")
    if path is None or str(given.get("eval_strategy", "no")).lower() == "no":
        return unneeded("there is no evaluation there")
    return becomes({"data.validation_path": path, "data.validation_split": value}, "rows for evaluation")


def _narrower(given: Given, *keys: str) -> Outcome | None:
    """That one of the other keys leaves prompts out of the loss, which a key that is off does not undo there."""
    setting = next((key for key in keys if is_on(given.get(key))), None)
    return unneeded(f"{setting} is set") if setting else None


def _assistant_only(value: Value, given: Given) -> Outcome:
    if is_on(value):
        return taken("data.train_on", "assistant")
    if other := _narrower(given, "completion_only_loss", _RESPONSES_ONLY):
        return other
    note = "all tokens of a conversation or a text are trained there unless it is set"
    if given.values.get("completion_only_loss") is None:
        note += "; of rows of prompt and completion the completion alone: set data.train_on: assistant for such rows"
    return becomes({"data.train_on": "all"}, note)


def _completion_only(value: Value, given: Given) -> Outcome:
    if is_on(value):
        return becomes({"data.train_on": "assistant"}, "loss on completions")
    if other := _narrower(given, "assistant_only_loss", _RESPONSES_ONLY):
        return other
    return becomes({"data.train_on": "all"}, "loss on all tokens")


def _responses_only(value: Value, given: Given) -> Outcome:
    return becomes({"data.train_on": "assistant"}, "loss on answers only; no marks have to be named here")


def _packing_strategy(value: Value, given: Given) -> Outcome:
    if is_off(given.get("packing")) or value in ("bfd", "bfd_split"):
        return unneeded("rows of a sequence do not see each other, as here")
    return left("rows of a sequence see each other there; here they do not")


def _loss_type(value: Value, given: Given) -> Outcome:
    if value in ("nll", "chunked_nll"):
        return unneeded("the plain negative log-likelihood, as here")
    return left("the loss here is the plain negative log-likelihood")


def _template_path(value: Value, given: Given) -> Outcome:
    if isinstance(value, str) and value.endswith((".jinja", ".j2")):
        return taken("data.chat_template", value)
    return left("a tokenizer's folder there; give its Jinja file as data.chat_template")


def _dataset_mixture(value: Value, given: Given) -> Outcome:
    rows = [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
    notes: list[str] = []
    found = [
        DataSet(str(row["path"]), whole_split(row.get("split"), notes))
        for row in rows
        if isinstance(row.get("path"), str)
    ]
    settings = rows_from(found, notes)
    if not settings:
        return left("a list of data sets with a path each is expected")
    if strange := sorted({str(key) for row in rows for key in row} - {"path", "split"}):
        notes.append(f"{', '.join(strange)} of the data sets is not taken")
    return becomes(settings, "; ".join(dict.fromkeys(notes)) or "all rows of each")


def is_script(given: Given) -> bool:
    """Whether the values come from calls in a Python script."""
    return "script" in given.values


def _has_adapter(given: Given) -> bool:
    """Whether a script makes one: a trainer that is given none trains all weights."""
    return any(name.startswith(("LoraConfig.", "get_peft_model.", "SFTTrainer.peft_config")) for name in given.values)


def _defaults(given: Given) -> dict[str, Default]:
    own = hf.training_defaults(learning_rate=2e-5)
    own["gradient_checkpointing"] = Default(True)
    own["max_length"] = Default(1024)
    own["assistant_only_loss"] = Default(False, ("data.train_on",))
    own["lora_target_modules"] = Default(hf.TARGETS_OF_PEFT)
    if is_script(given):
        if given.values.get("trainer") == "TrainingArguments":
            own |= hf.training_defaults()
            del own["gradient_checkpointing"]
        adapter: dict[str, Value] = {"lora_r": 8, "lora_alpha": 8, "lora_target_modules": hf.TARGETS_OF_PEFT}
        if not _has_adapter(given):
            adapter["use_peft"] = False
        return {
            **own,
            **{name: Default(value) for name, value in adapter.items()},
            "bnb_4bit_quant_type": Default("fp4"),
            "use_bnb_nested_quant": Default(False),
        }
    adapter = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "use_peft": False, "use_bnb_nested_quant": False}
    return {**own, **{name: Default(value) for name, value in adapter.items()}}


SCRIPT = table(
    same("from_pretrained.model_name model_name_or_path base_model_name_or_path", "model.name_or_path"),
    translated("from_pretrained.revision model_revision", "model.revision", "Branch, tag or commit.", hf.revision),
    translated(
        "load_dataset.path dataset_name", "data.path", "A kind of file has its rows in `data_files`.", _data_set
    ),
    translated("load_dataset.data_files", "data.path", "Files of this disk.", _data_files),
    translated("load_dataset.split dataset_train_split", "data.split", "One split.", _split),
    no_place(
        "load_dataset.name dataset_config",
        "Parts of a data set are not offered; keep the rows in a file.",
    ),
    translated("train_on_responses_only.called", "data.train_on", "Loss on answers.", _responses_only),
    not_needed(
        "train_on_responses_only.instruction_part train_on_responses_only.response_part",
        "Turns are found in the rendered text here, without marks.",
    ),
    translated(
        "from_pretrained.dtype from_pretrained.torch_dtype", "quantization.compute_dtype", "Of the base.", hf.dtype
    ),
    no_place("from_pretrained.trust_remote_code", hf.STRANGERS_CODE),
    not_needed(
        "from_pretrained.device_map from_pretrained.token from_pretrained.attn_implementation "
        "from_pretrained.use_cache "
        "from_pretrained.quantization_config from_pretrained.low_cpu_mem_usage load_dataset.token "
        "load_dataset.num_proc "
        "load_dataset.data_dir load_dataset.streaming load_dataset.column_names load_dataset.skiprows",
        "It steers that tool's own program, or is read where it is made.",
    ),
    not_needed(
        "SFTTrainer.tokenizer SFTTrainer.processing_class SFTTrainer.train_dataset "
        "SFTTrainer.eval_dataset "
        "SFTTrainer.args SFTTrainer.peft_config SFTTrainer.data_collator SFTTrainer.callbacks "
        "SFTTrainer.compute_metrics",
        "Objects of the script; what they are made of is read where it is made.",
    ),
    translated("SFTTrainer.model", "", "A name is `model.name_or_path`; an object is read where it is made.", _model),
    no_place(
        "** from_pretrained.** get_peft_model.** LoraConfig.** BitsAndBytesConfig.** load_dataset.**",
        "The script computes what more is given there: check what stands above as not given.",
    ),
    no_place(
        "SFTTrainer.formatting_func SFTTrainer.optimizers",
        "The script's own functions are not run: write rows as messages or prompt and completion.",
    ),
)
"""Calls that TRL's and Unsloth's scripts share."""

FINE_TUNING = table(
    translated("max_length max_seq_length", "data.max_seq_length", "Longer rows are cut.", _length),
    translated("truncation_mode", "data.truncation", "keep_start or keep_end.", hf.truncation),
    same("packing", "data.packing"),
    translated("packing_strategy", "", "bfd keeps rows apart; wrapped does not.", _packing_strategy),
    translated(
        "assistant_only_loss", "data.train_on", "Off there: all tokens of a conversation are trained.", _assistant_only
    ),
    translated("completion_only_loss", "data.train_on", "Loss on completions.", _completion_only),
    translated("chat_template_path", "data.chat_template", "A Jinja file, or a tokenizer's folder.", _template_path),
    translated("loss_type", "", "The plain negative log-likelihood.", _loss_type),
    same("shuffle_dataset", "data.shuffle"),
    no_place("eos_token pad_token", "The tokenizer's files and the chat template say what a turn ends with."),
    no_place("dataset_kwargs model_init_kwargs", "Rows and the model are read by rules of their own."),
    not_needed(
        "dataset_text_field dataset_num_proc dataset_batch_size padding_free pad_to_multiple_of eval_packing "
        "activation_offloading attn_implementation dtype torch_dtype dataset_streaming ignore_bias_buffers",
        "The format of a row is recognized, and memory and speed are the backend's.",
    ),
)

TRL = Tool(
    name="trl",
    title="TRL",
    read="trl of July 2026, transformers 5.23.0, peft 0.21.2",
    keys=table(
        *SCRIPT,
        *FINE_TUNING,
        *hf.KEY_OF_ALL,
        translated("use_peft", "", "Without it all weights are trained there.", _use_peft),
        translated("dataset_test_split", "data.validation_split", "Rows for evaluation.", _test_split),
        translated("datasets", "data.path", "A list of data sets.", _dataset_mixture),
        no_place("test_split_size", "Hold rows out by data.validation_fraction."),
        no_place("trust_remote_code", hf.STRANGERS_CODE),
        no_place("router_aux_loss_coef", "The loss here is the plain negative log-likelihood."),
        *not_needed("env", "Variables of the environment are set in the shell."),
    ),
    marks=frozenset(
        {
            *("dataset_name", "use_peft", "assistant_only_loss", "completion_only_loss", "use_bnb_nested_quant"),
            *("packing_strategy", "dataset_text_field", "dataset_train_split", "lora_task_type"),
        }
    ),
    defaults=_defaults,
    habits=hf.HABITS | {"quantization.weight_format": ("none", "nothing is quantized unless it is asked for")},
    about=("transformers divides by the trained tokens of a step, as here, since 4.46.",),
)
