"""The settings that `train` takes as keywords by their own names; the others go by group.

Nothing is imported here: `from qlora_hal import train` must not wait for the schema, which a test holds these against.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class CommonSettings(TypedDict, total=False):
    """What each one means, and its default: `docs/cli.md`."""

    learning_rate: float
    num_train_epochs: float
    max_steps: int | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int | None
    lr_scheduler_type: Literal["constant", "linear", "cosine"]
    warmup_ratio: float
    optim: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
    weight_decay: float
    gradient_checkpointing: bool
    recompute: Literal["none", "selective", "full", "offload", "auto"] | None
    base_offload: tuple[Literal["embeddings", "layers", "head"], ...] | Literal["auto"]
    seed: int | None
    eval_steps: int | None
    early_stopping_patience: int | None
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...]
    sample_prompts: tuple[str, ...]
    save_steps: int | None

    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]

    weight_format: str
    double_quant: bool | None
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"]

    max_seq_length: int
    packing: bool
    train_on: Literal["assistant", "last", "all"]
    chat_template: str | None
    validation_path: str | None
    validation_fraction: float


class SettingsByKeyword(CommonSettings, total=False):
    """The common settings, and groups for the others."""

    quantization: Mapping[str, object]
    lora: Mapping[str, object]
    training: Mapping[str, object]
    checkpoint: Mapping[str, object]
    parallel: Mapping[str, object]


def is_settings_of_data(data: object) -> bool:
    """Whether a mapping given as `data` holds settings of that group, and not the columns of a table or the splits of a
    data set: those are lists, arrays or data sets, one and all. Alone, `sources` is a setting; else a column."""
    if not isinstance(data, Mapping):
        return False
    return data.keys() <= {"sources"} or not all(map(_holds_rows, data.values()))


def _holds_rows(value: object) -> bool:
    if isinstance(value, str | bytes | Mapping):
        return False
    return isinstance(value, Sequence) or hasattr(value, "__array__") or hasattr(value, "features")


def with_named_settings(call: Callable[P, R]) -> Callable[P, R]:
    """Show the settings of `**settings` one by one, as `help` and a notebook's completion read them."""
    signature = inspect.signature(call)
    shown = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=..., annotation=kind)
        for name, kind in SettingsByKeyword.__annotations__.items()
    ]
    keep: Any = call
    keep.__signature__ = signature.replace(parameters=[*shown, *named])
    return call
