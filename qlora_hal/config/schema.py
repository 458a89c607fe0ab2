"""The configuration of a run: one tree for YAML, command line, Python and JSON schema.

Groups are ours, the names inside are Hugging Face's. Unknown keys are errors; every value is honoured, translated with
a note, or refused by the backend. pydantic is used at this border only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from qlora_hal.config.sizes import size_in_bytes
from qlora_hal.files.refused_paths import half_of_a_character
from qlora_hal.formats.catalogue import find_record, names
from qlora_hal.formats.record import LEVELS

SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
"""The normal numbers of float32, in which an adapter is updated on every backend."""

MOST_SEQUENCES = 2**40
"""Of a step. On all devices that one run may have there are still fewer than a record can count, and than a float."""


def _fits_64_bits(number: int) -> int:
    # Files of a run hold no others.
    if number >= 2**63:
        raise ValueError("a whole number below 2**63 is expected")
    return number


def _fits_float32(number: float) -> float:
    # There it would be 0 or infinite: another number than the one that was set.
    if number and not SMALLEST_FLOAT32 <= number <= LARGEST_FLOAT32:
        raise ValueError("a number that float32 can hold is expected, from 1.2e-38 to 3.4e38")
    return number


PositiveInt = Annotated[int, Field(gt=0), AfterValidator(_fits_64_bits)]
NonNegativeInt = Annotated[int, Field(ge=0), AfterValidator(_fits_64_bits)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0), AfterValidator(_fits_float32)]
NonNegative = Annotated[float, Field(ge=0.0), AfterValidator(_fits_float32)]


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, held in value.items():
            yield from _texts_in(name)
            yield from _texts_in(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _texts_in(held)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Every setting is written into run.json, and libraries take paths in UTF-8 alone."""
        if info.field_name != "output_dir":  # which has an error of its own
            for text in _texts_in(value):
                if (half := half_of_a_character(text)) is not None:
                    raise ValueError(f"UTF-8 text without {half} is expected")
        return value


class FormatName:
    """A level of quantization or a weight format, as the catalogue of this process knows them."""

    def choices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("auto", *LEVELS, *names())))

    def checked(self, name: str) -> str:
        """Raises PydanticCustomError, and BackendContractError QH-E80 for a format whose record is refused."""
        if name not in ("auto", *LEVELS) and find_record(name) is None:
            raise PydanticCustomError("unknown_choice", "no level and no weight format")
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.choices())}


class ModelConfig(_Part):
    """Which base model."""

    name_or_path: str = Field("", description="A folder, or a Hugging Face model id.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(
        False, description="Run Python files of the model's repository. Needs `revision` as a 40-digit commit."
    )


class QuantizationConfig(_Part):
    """How the frozen base is stored."""

    weight_format: Annotated[str, FormatName()] = Field(
        "auto",
        description="A level (none, 8bit, 4bit; auto: 4bit, or what a pre-quantized model has), or one format.",
    )
    block_size: PositiveInt | None = Field(
        None, description="Number of weights that share one scale; default: the format's own."
    )
    double_quant: bool | None = Field(
        None, description="Quantize the scales too (QLoRA section 3). Default: yes if the format supports it."
    )
    calibration_path: str | None = Field(
        None, description="Rows that a 16-bit model is calibrated on for a GPTQ format; default: the training rows."
    )
    calibration_rows: PositiveInt = Field(256, description="Maximum number of calibration rows.")
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = Field(
        "auto",
        description="auto: bfloat16 where a test computation confirms it, else float16 with loss scaling; "
        "float32 on CPU. fp8: bfloat16, but products with a dense 4-bit base in 8-bit floats (NVIDIA Ada, Hopper and "
        "later).",
    )

    @property
    def dtype(self) -> Literal["auto", "bfloat16", "float16", "float32"]:
        """What everything but the products with the base computes in."""
        return "bfloat16" if self.compute_dtype == "fp8" else self.compute_dtype

    @property
    def fp8_products(self) -> bool:
        """Whether the products with the base are in 8-bit floats (`Compute.fp8_products`)."""
        return self.compute_dtype == "fp8"


class LoraConfig(_Part):
    """The trainable adapter."""

    r: PositiveInt = Field(16, description="Rank.")
    alpha: Positive = Field(16.0, description="The adapter's product is scaled by alpha / r.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (rsLoRA).")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="all-linear, a list of names (q_proj), or a regular expression over full paths."
    )
    experts: Literal["all", "none", "shared"] = Field(
        "all",
        description="Of a mixture of experts: whether target_modules means experts too. none: no expert, shared: only "
        "those that see every token.",
    )
    bias: Literal["none"] = Field("none", description="Biases are not trained.")

    @field_validator("target_modules")
    @classmethod
    def _means_modules(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        """Spellings that would match no module, told before a model is looked at."""
        names = (value,) if isinstance(value, str) else value
        if len(names) == 1 and names[0].lower().replace("_", "-").strip() in ("all", "all-linear", "linear"):
            if names[0].lower() != "all-linear":
                raise ValueError("all-linear is expected for all linear layers")
        elif isinstance(value, str) and re.fullmatch(r"\w+(\s*[,\s]\s*\w+)+", value):
            listed = ", ".join(re.split(r"[,\s]+", value))
            raise ValueError(f"a list is expected for several names: [{listed}]")
        return value


FORMAT_COLUMNS = (
    *("messages", "conversations", "system", "system_prompt", "tools", "functions"),
    *("instruction", "input", "output", "history", "prompt", "completion", "text"),
)
"""The names by which rows of the known formats are read."""


def _column_name(value: object) -> object:
    # A header of numbers alone is read as numbers by YAML and by flags.
    return str(value) if type(value) is int else value


def _read_by_name(columns: dict[str, str]) -> dict[str, str]:
    if unknown := [name for name in columns if name not in FORMAT_COLUMNS]:
        raise ValueError(
            f"{unknown[0]!r} is no name that a format has; on the left one of {', '.join(FORMAT_COLUMNS)} is expected, "
            "on the right a column of your rows"
        )
    if len(set(columns.values())) < len(columns):
        raise ValueError("each column is expected once, for it can stand for one name only")
    return columns


Columns = Annotated[dict[str, Annotated[str, BeforeValidator(_column_name)]], AfterValidator(_read_by_name)]


class DataSource(_Part):
    """One of several data sets that are trained on together."""

    path: Annotated[str, Field(min_length=1)]
    split: str = "train"
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    columns: Columns = Field(default_factory=dict)


class DataConfig(_Part):
    """What is trained on."""

    path: str = Field("", description="A JSONL, JSON, CSV or Parquet file, a folder, or a Hugging Face dataset id.")
    split: str = Field(
        "train", description="Split of a Hugging Face dataset, or of a folder whose file names contain it."
    )
    sources: tuple[DataSource, ...] = Field(
        (),
        description="Several data sets in the place of data.path, each with path, weight (how often an epoch has each "
        "of its rows; default 1), columns and split.",
    )
    columns: Columns = Field(
        default_factory=dict,
        description="Names of a format and the columns of your rows that stand for them: prompt: question.",
    )
    max_rows: PositiveInt | None = Field(
        None, description="Read only so many rows from the beginning of the training data, of each source."
    )
    validation_path: str | None = Field(None, description="Rows for evaluation.")
    validation_split: str | None = Field(
        None, description="Split of validation_path; default: validation, if it has splits."
    )
    validation_fraction: Fraction = Field(0.0, description="Hold out this share of the rows when no path is given.")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = Field(
        "auto", description="Format of a row; auto recognizes it and reports it."
    )
    chat_template: str | None = Field(
        None, description="A built-in template's name, one of the tokenizer's, or a Jinja file; default: its own."
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="Loss on all assistant turns, on the last one of each row, or on all tokens."
    )
    mask_reasoning: bool = Field(
        False, description="No loss on what stands between the marks of reasoning, as <think> and </think>."
    )
    max_seq_length: PositiveInt = Field(1024, description="Maximum length of a row in tokens.")
    truncation: Literal["right", "left", "drop", "split"] = Field("right", description="What happens to longer rows.")
    packing: bool = Field(False, description="Pack several rows into one sequence, without attention across them.")
    group_by_length: bool = Field(True, description="Batch rows of similar length together.")
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="A malformed row stops the run, or is skipped and counted."
    )
    shuffle: bool = Field(True, description="A new row order in each epoch, determined by the seed.")

    @model_validator(mode="after")
    def _options_fit_together(self) -> DataConfig:
        if self.path and self.sources:
            raise ValueError("data.path and data.sources are mutually exclusive")
        if self.sources and self.split != "train":
            raise ValueError("data.split applies to data.path; name a split in each entry of data.sources")
        places = [(source.path, source.split) for source in self.sources]
        if len(set(places)) < len(places):
            raise ValueError("data.sources names the same rows twice; give them a weight instead")
        if self.mask_reasoning and self.train_on == "all":
            raise ValueError("data.mask_reasoning leaves tokens out, and data.train_on all trains every token")
        return self


class TrainingConfig(_Part):
    """Length, learning rate, optimizer and evaluation."""

    learning_rate: Annotated[Positive, Field(le=1.0)] = Field(
        2e-4, description="The rate after warmup. Adapters take about ten times that of full fine-tuning."
    )
    num_train_epochs: Annotated[float, Field(gt=0.0, le=1e9)] = Field(
        1.0, description="How often each row is seen; a part of an epoch is allowed."
    )
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; overrides num_train_epochs.")
    per_device_train_batch_size: PositiveInt = Field(
        4, description="Sequences of a micro-batch on each device; more take more memory, not another step."
    )
    tokens_per_batch: PositiveInt | None = Field(
        None,
        description="Micro-batches of as many sequences as fit into so many tokens, padding counted, in the place of "
        "per_device_train_batch_size; the step stays the same.",
    )
    per_device_eval_batch_size: PositiveInt = Field(8, description="Sequences of a batch of evaluation on each device.")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Micro-batches of one optimizer step. Each counted token weighs the same."
    )
    global_batch_size: PositiveInt | None = Field(
        None, description="Sequences in a step, over all devices; in the place of gradient_accumulation_steps."
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="How the rate goes on after warmup: it stays, or falls to 0 at the last step."
    )
    warmup_ratio: Fraction = Field(0.03, description="Share of all steps in which the rate rises to learning_rate.")
    warmup_steps: NonNegativeInt | None = Field(None, description="Overrides warmup_ratio.")
    optim: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw", description="AdamW with moments in float32 or in 8 bits; paged ones may move to the host's memory."
    )
    weight_decay: NonNegative = Field(0.0, description="AdamW's decay of the adapter, times the learning rate.")
    max_grad_norm: NonNegative = Field(1.0, description="0 disables clipping.")
    adam_beta1: Fraction = Field(0.9, description="How much of the first moment each step keeps.")
    adam_beta2: Fraction = Field(0.999, description="How much of the second moment each step keeps.")
    adam_epsilon: Positive = Field(1e-8, description="Added to the root of the second moment, which it is divided by.")
    adam_epsilon_from_noise: bool = Field(
        False,
        description="Raise adam_epsilon above the rounding error of the first gradient, so that backends begin alike.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: true is recompute full."
    )
    recompute: Literal["none", "selective", "full", "offload", "auto"] | None = Field(
        None,
        description="What backward computes again: nothing, the feed-forward's products, whole layers, or whole layers "
        "with their inputs in the host's memory; auto: the least costly that fits. Unset: as gradient_checkpointing "
        "says.",
    )
    base_offload: tuple[Literal["embeddings", "layers", "head"], ...] | Literal["auto"] = Field(
        (),
        description="Parts of the base that live in the host's memory and are copied when they are needed; auto: what "
        "has to, by the estimate.",
    )
    memory_limit: str | None = Field(
        None,
        description="The most that the run is planned to take of a device's memory, as 24GB: micro-batches are cut to "
        "what fits, and a run that cannot fit is refused before it loads.",
    )
    seed: NonNegativeInt | None = Field(None, description="Drawn, printed and stored when unset.")
    logging_steps: PositiveInt = Field(
        1, description="Print a line every this many steps; metrics.jsonl has every step."
    )
    eval_steps: PositiveInt | None = Field(
        None, description="Evaluate every this many steps; always before and after training."
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after this many evaluations without improvement. Needs eval_steps."
    )
    load_best_adapter_at_end: bool = Field(True, description="Keep the adapter with the lowest evaluation loss.")
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (), description="Trackers that get the figures of the run, beside metrics.jsonl. Each must be installed."
    )
    tracker_project: str | None = Field(
        None,
        min_length=1,
        description="The project (in MLflow: the experiment) that wandb, mlflow and trackio put the run into. "
        "Default: their own variables, else qlora-hal.",
    )
    sample_prompts: tuple[str, ...] = Field((), description="Prompts that are answered before and after training.")

    @field_validator("memory_limit")
    @classmethod
    def _means_a_size(cls, value: str | None) -> str | None:
        if value is not None and size_in_bytes(value) is None:
            raise ValueError("a size such as 24GB is expected")
        return value

    @property
    def memory_limit_bytes(self) -> int | None:
        return None if self.memory_limit is None else size_in_bytes(self.memory_limit)


class CheckpointConfig(_Part):
    """When the run is saved."""

    save_steps: NonNegativeInt | None = Field(
        100,
        description="Save every this many steps and at the end; none or 0: only at the end, and when the run is "
        "stopped.",
    )
    save_total_limit: Annotated[PositiveInt, Field(ge=2)] = Field(
        2, description="Older checkpoints are removed; at least 2 are kept."
    )


class ParallelConfig(_Part):
    """How several devices share a run."""

    mode: Literal["auto", "data", "shard"] = Field(
        "auto", description="data: each device holds the base; shard: each holds a part and gathers the rest."
    )
    timeout_seconds: Annotated[float, Field(gt=0.0, le=86400.0)] = Field(
        600.0, description="How long a device waits for another one before the run is ended."
    )


class BackendConfig(_Part):
    """Which backend, and its own settings."""

    name: str = Field("auto", description="A backend's name, or auto.")
    allow_cpu: bool = Field(False, description="Let auto choose the CPU when no accelerator is ready.")
    options: dict[str, Any] = Field(default_factory=dict, description="Settings of the backend itself.")


class RunConfig(_Part):
    """A whole run."""

    output_dir: str = Field("", description="A new folder for this run.")
    model: ModelConfig = ModelConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    backend: BackendConfig = BackendConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def full_batch_rows(self) -> int:
        """Rows of `data.max_seq_length` in a micro-batch, which their number bounds, or their tokens and the rows of a
        step."""
        if self.training.tokens_per_batch is None:
            return self.training.per_device_train_batch_size
        return min(self.training.tokens_per_batch // self.data.max_seq_length, self._rows_of_a_step)

    @property
    def _rows_of_a_step(self) -> int:
        """On one device, or over all of them."""
        training = self.training
        return training.global_batch_size or (
            training.per_device_train_batch_size * training.gradient_accumulation_steps
        )

    def with_rows(self, rows: int) -> RunConfig:
        """The same with micro-batches of so many full rows."""
        changes = {"per_device_train_batch_size": rows, "tokens_per_batch": None}
        return self.model_copy(update={"training": self.training.model_copy(update=changes)})

    @model_validator(mode="after")
    def _parts_fit_together(self) -> RunConfig:
        training, data = self.training, self.data
        if training.early_stopping_patience and not training.eval_steps:
            raise ValueError("training.early_stopping_patience needs training.eval_steps")
        if data.validation_path and data.validation_fraction:
            raise ValueError("data.validation_path and data.validation_fraction are mutually exclusive")
        if data.validation_split and not data.validation_path:
            raise ValueError("data.validation_split needs data.validation_path")
        if training.tracker_project and not set(training.report_to) - {"tensorboard"}:
            raise ValueError("training.tracker_project needs wandb, mlflow or trackio in training.report_to")
        if training.max_steps and training.warmup_steps and training.warmup_steps > training.max_steps:
            raise ValueError("training.warmup_steps is larger than training.max_steps")
        if training.global_batch_size and training.gradient_accumulation_steps != 1:
            raise ValueError(
                "training.global_batch_size and training.gradient_accumulation_steps are mutually exclusive"
            )
        if (rows := self._rows_of_a_step) > MOST_SEQUENCES:
            named = "global_batch_size" if training.global_batch_size else "per_device_train_batch_size"
            raise ValueError(
                f"training.{named} makes a step of {rows} sequences, with what is accumulated; at most "
                f"{MOST_SEQUENCES} are expected"
            )
        if training.tokens_per_batch and training.tokens_per_batch < data.max_seq_length:
            raise ValueError(
                f"training.tokens_per_batch {training.tokens_per_batch} is less than one row of data.max_seq_length "
                f"{data.max_seq_length}"
            )
        if training.gradient_checkpointing and training.recompute in ("none", "selective"):
            raise ValueError(
                f"training.gradient_checkpointing true and training.recompute {training.recompute} contradict each "
                "other"
            )
        if self.parallel.mode == "shard" and "layers" in training.base_offload:
            raise ValueError(
                "training.base_offload layers and parallel.mode shard are mutually exclusive: the layers are in the "
                "host's memory, or spread over the devices"
            )
        if self.model.trust_remote_code and not _is_commit(self.model.revision):
            raise ValueError("model.trust_remote_code needs model.revision as a 40-digit commit")
        return self


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)
