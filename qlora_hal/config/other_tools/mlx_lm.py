"""mlx-lm's lora_config.yaml and the arguments of mlx_lm.lora. Read in mlx-lm 0.32.2: `lora.py`, `tuner/trainer.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qlora_hal.config.other_tools import hugging_face as hf
from qlora_hal.config.other_tools.data_sets import DataSet, lies_here, renamed, rows_from, whole_split
from qlora_hal.config.other_tools.tables import (
    Default,
    Fate,
    Given,
    Outcome,
    Rule,
    Tool,
    Value,
    as_names,
    as_number,
    becomes,
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


def _model(value: Value, given: Given) -> Outcome:
    """mlx-lm never quantizes: a base is in as many bits as its files are."""
    settings: dict[str, Value] = {"model.name_or_path": value}
    if given.model:
        stored = "quantization" in given.model or "quantization_config" in given.model
        why = "its files are quantized already" if stored else "its files are in 16 bits"
    else:
        stored = re.search(r"\d-?bit|mxfp4|nvfp4|mxfp8", str(value).lower()) is not None
        why = f"by its name the base is {'quantized already' if stored else 'in 16 bits'}"
    if stored:
        return becomes(settings, f"mlx-lm trains a base as it is stored; {why}, and stays so")
    settings["quantization.weight_format"] = "none"
    return becomes(settings, f"mlx-lm trains a base as it is stored; {why} (LoRA, not QLoRA)")


def _scale(value: Value, given: Given) -> Outcome:
    scale, rank = as_number(value), given.number("lora_parameters.rank", 8)
    if scale is None:
        return taken("lora.alpha", value)  # refused with its line when the settings are checked
    note = f"the product is multiplied by {scale:g} itself there, by alpha / r here: {scale:g} x {rank:g}"
    return becomes({"lora.alpha": scale * rank}, note)


def _layers(value: Value, given: Given) -> Outcome:
    wanted, there = as_number(value), as_number(given.model.get("num_hidden_layers"))
    if wanted is None or wanted <= 0:
        return becomes({"lora.target_modules": _modules(given)}, "all layers")
    if there is None:
        note = (
            f"adapters are on the last {wanted:g} layers there; the base is not on this disk, so how many it has is "
            "not "
            "known and all layers are adapted: narrow lora.target_modules by an expression"
        )
        return Outcome(Fate.NO_PLACE, {"lora.target_modules": _modules(given)}, note)
    if wanted >= there:
        return becomes({"lora.target_modules": _modules(given)}, f"all {there:g} layers")
    numbers = "|".join(str(number) for number in range(int(there - wanted), int(there)))
    keys = given.get("lora_parameters.keys")
    names = "|".join(re.escape(name) for name in as_names(keys)) if keys else ".*"
    note = f"the last {wanted:g} of {there:g} layers"
    return becomes({"lora.target_modules": rf"model\.layers\.(?:{numbers})\.(?:{names})"}, note)


def _modules(given: Given) -> Value:
    keys = given.get("lora_parameters.keys")
    return as_names(keys) if keys else "all-linear"


def _steps(here: str) -> Rule:
    """Counts of micro-batches there, of optimizer steps here."""

    def rule(value: Value, given: Given) -> Outcome:
        number, micro_batches = as_number(value), given.number("grad_accumulation_steps", 1)
        if number is None or micro_batches == 1:
            return taken(here, value)
        note = f"{number:g} micro-batches there, of {micro_batches:g} to a step"
        return becomes({here: max(1, int(number // micro_batches))}, note)

    return rule


def _data(value: Value, given: Given) -> Outcome:
    if lies_here(str(value)) and not lies_here(f"{value}/valid.jsonl"):
        return taken("data.path", value)
    settings = {"data.path": value, "data.validation_path": value, "data.validation_split": "valid"}
    return becomes(settings, "its split valid is scored during training")


def _hub_data(value: Value, given: Given) -> Outcome:
    rows = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Mapping)]
    rows = [item for item in rows if isinstance(item.get("path"), str)]
    notes: list[str] = []
    settings = rows_from([_hub_data_set(row, notes) for row in rows], notes)
    if not settings:
        return left("a data set with a path is expected")
    valid = whole_split(rows[0].get("valid_split"), notes)
    if valid:
        settings |= {"data.validation_path": rows[0]["path"], "data.validation_split": valid}
        if len(rows) > 1:
            notes.append("rows for evaluation are those of the first data set")
    return becomes(settings, "; ".join(dict.fromkeys(notes)) or "a data set of the hub")


_HUB_COLUMNS = {
    **{"prompt_feature": "prompt", "completion_feature": "completion"},
    **{"text_feature": "text", "chat_feature": "messages"},
}


def _hub_data_set(row: Mapping[str, Value], notes: list[str]) -> DataSet:
    if "train_split" not in row or "valid_split" not in row:
        absent = "train[:80%] is trained on" if "train_split" not in row else "train[-10%:] is scored"
        notes.append(f"{absent} there where the file does not say it; here data.validation_fraction holds rows out")
    strange = sorted(map(str, row.keys() - {"path", "train_split", "valid_split", "test_split", *_HUB_COLUMNS}))
    if strange:
        notes.append(f"{', '.join(strange)} of {row['path']} is not taken")
    columns = renamed({here: row[there] for there, here in _HUB_COLUMNS.items() if there in row})
    return DataSet(str(row["path"]), whole_split(row.get("train_split"), notes), columns)


def _fine_tune_type(value: Value, given: Given) -> Outcome:
    return unneeded("LoRA, as here") if value == "lora" else left(f"{value} is not offered; here the adapter is LoRA")


def _optimizer(value: Value, given: Given) -> Outcome:
    name = str(value).lower()
    if name not in ("adam", "adamw"):
        return left(f"{value} is not offered; here AdamW is")
    options = given.get("optimizer_config")
    own = options.get(name) if isinstance(options, Mapping) else None
    own = own if isinstance(own, Mapping) else {}
    settings: dict[str, Value] = {"training.optim": "adamw", "training.weight_decay": 0.0}
    if name == "adamw":
        settings["training.weight_decay"] = own.get("weight_decay", 0.01)
    betas = own.get("betas")
    if isinstance(betas, list) and len(betas) == 2:
        settings |= {"training.adam_beta1": betas[0], "training.adam_beta2": betas[1]}
    if "eps" in own:
        settings["training.adam_epsilon"] = own["eps"]
    decay = "no weight decay" if name == "adam" else f"weight decay {settings['training.weight_decay']}"
    if is_on(own.get("bias_correction")):
        return becomes(settings, decay)
    # (1 - 0.9) / sqrt(1 - 0.999) = 3.16: the first update without the correction, over the one with it.
    note = f"{decay}; MLX does not correct the moments' bias, so its first updates are up to 3.2 times as large"
    return becomes(settings, note)


def _optimizer_config(value: Value, given: Given) -> Outcome:
    return unneeded("read with optimizer")


def _schedule(value: Value, given: Given) -> Outcome:
    kinds = {"cosine_decay": "cosine", "linear_schedule": "linear"}
    name = str(value)
    if name not in kinds:
        return left(f"{name} is not offered; here constant, linear and cosine are")
    return becomes(
        {"training.lr_scheduler_type": kinds[name]}, f"{name} over its own number of steps there, over all here"
    )


def _schedule_arguments(value: Value, given: Given) -> Outcome:
    numbers = [as_number(item) for item in value] if isinstance(value, list) else []
    if not numbers or numbers[0] is None:
        return left("a list that begins with the first rate is expected")
    linear = given.get("lr_schedule.name") == "linear_schedule"
    end = (numbers[1] if len(numbers) > 1 else 0.0) if linear else (numbers[2] if len(numbers) > 2 else 0.0)
    note = "its first number is the rate, which overrides learning_rate there"
    if end:
        note += f"; it ends at {end:g} there and at 0 here"
    return becomes({"training.learning_rate": numbers[0]}, note)


def _learning_rate(value: Value, given: Given) -> Outcome:
    if given.get("lr_schedule.name"):
        return unneeded("lr_schedule overrides it there")
    return taken("training.learning_rate", value)


def _warmup(value: Value, given: Given) -> Outcome:
    return taken("training.warmup_steps", value)


def _mask_prompt(value: Value, given: Given) -> Outcome:
    if is_on(value):
        return becomes({"data.train_on": "last"}, "the last answer of each row")
    return becomes({"data.train_on": "all"}, "loss on all tokens, as mlx-lm does unless mask_prompt is set")


def _defaults(given: Given) -> dict[str, Default]:
    return {
        "optimizer": Default("adam"),
        "seed": Default(0),
        "num_layers": Default(16),
        "batch_size": Default(4),
        "iters": Default(1000),
        "learning_rate": Default(1e-5, ("training.learning_rate",)),
        "steps_per_eval": Default(200),
        "max_seq_length": Default(2048),
        "lora_parameters.rank": Default(8),
        "lora_parameters.scale": Default(20.0),
        "mask_prompt": Default(False),
    }


MLX_LM = Tool(
    name="mlx-lm",
    title="mlx-lm",
    read="0.32.2",
    keys=table(
        translated("model", "model.name_or_path", "Trained as it is stored: never quantized by the run.", _model),
        translated("data", "data.path", "A folder with train.jsonl and valid.jsonl, or a hub id.", _data),
        translated("hf_dataset", "data.path", "A data set of the hub with names of columns.", _hub_data),
        translated("fine_tune_type", "", "`lora`; `dora` and `full` are not offered.", _fine_tune_type),
        same("lora_parameters.rank", "lora.r"),
        translated("lora_parameters.scale", "lora.alpha", "The factor itself: alpha = scale x rank.", _scale),
        same("lora_parameters.dropout", "lora.dropout"),
        translated("num_layers", "lora.target_modules", "The last so many layers; 16 by default, -1 for all.", _layers),
        *not_needed("lora_parameters.keys", "It is read with num_layers: which modules of a layer."),
        same("batch_size", "training.per_device_train_batch_size"),
        same(
            "grad_accumulation_steps",
            "training.gradient_accumulation_steps",
            "There each micro-batch counts alike; here each token does.",
        ),
        translated("iters", "training.max_steps", "Micro-batches, not optimizer steps.", _steps("training.max_steps")),
        translated("learning_rate", "training.learning_rate", "1e-5 by default.", _learning_rate),
        translated("lr_schedule.name", "training.lr_scheduler_type", "Constant when there is none.", _schedule),
        translated("lr_schedule.arguments", "training.learning_rate", "Rate, steps, last rate.", _schedule_arguments),
        translated("lr_schedule.warmup", "training.warmup_steps", "Steps.", _warmup),
        *no_place("lr_schedule.warmup_init", "The warm-up here begins with its first share of the rate."),
        translated(
            "optimizer", "training.optim", "Adam without decay, AdamW with 0.01; no correction of bias.", _optimizer
        ),
        translated("optimizer_config", "training.optim", "Options by optimizer.", _optimizer_config),
        same("seed", "training.seed", hf.SEED),
        same("max_seq_length", "data.max_seq_length", "Longer rows are cut, as here."),
        translated("mask_prompt", "data.train_on", "All tokens are trained unless it is set.", _mask_prompt),
        same("grad_checkpoint", "training.gradient_checkpointing"),
        translated("steps_per_report", "training.logging_steps", "Micro-batches.", _steps("training.logging_steps")),
        translated("steps_per_eval", "training.eval_steps", "Micro-batches.", _steps("training.eval_steps")),
        translated(
            "save_every steps_per_save", "checkpoint.save_steps", "Micro-batches.", _steps("checkpoint.save_steps")
        ),
        same("adapter_path", "output_dir", "The adapter is in its folder `adapter` here."),
        translated("report_to", "training.report_to", "Trackers.", hf.trackers),
        no_place(
            "resume_adapter_file",
            "A run begins with a new adapter; `qlora-hal adapter convert` reads mlx-lm's for other uses.",
        ),
        no_place("val_batches", "All rows that are held out are scored here.", off=(-1,)),
        no_place("test test_batches", "Score the test rows by naming them as data.validation_path."),
        no_place("trust_remote_code", hf.STRANGERS_CODE),
        not_needed("adapter_file", "The adapter is in the run's folder here."),
        not_needed("train config clear_cache_threshold project_name", "It steers that tool's own program."),
    ),
    marks=frozenset(
        {
            *("fine_tune_type", "iters", "num_layers", "steps_per_eval", "steps_per_report", "adapter_path"),
            *("grad_checkpoint", "mask_prompt", "hf_dataset", "lora_parameters.scale", "lora_parameters.rank"),
        }
    ),
    defaults=_defaults,
    habits={
        "data.group_by_length": (True, "mlx-lm sorts rows by length before it cuts batches"),
        "training.lr_scheduler_type": ("constant", "the rate is constant unless lr_schedule is set"),
        "training.warmup_ratio": (0.0, "no warm-up unless lr_schedule sets one"),
        "training.max_grad_norm": (0.0, "mlx-lm does not clip gradients"),
        "training.load_best_adapter_at_end": (False, "mlx-lm keeps the last adapter"),
    },
    about=(
        "With grad_accumulation_steps mlx-lm takes the mean of its micro-batches' means; here every trained token of "
        "a step "
        "counts alike, so rows with few tokens weigh less.",
        "mlx-lm also counts one padding token behind each row that is shorter than its batch (`default_loss`, 0.32.2).",
        "mlx-lm writes scale where PEFT writes alpha / r: a scale of 20 at rank 8 is alpha 160.",
    ),
    groups=frozenset({"lora_parameters", "lr_schedule"}),
)
