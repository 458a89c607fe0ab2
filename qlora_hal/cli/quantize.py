"""`qlora-hal quantize`: a 16-bit model into a folder in a format that needs calibration."""

from __future__ import annotations

import tempfile
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import Switch
from qlora_hal.errors.terminal_text import show, show_json

if TYPE_CHECKING:
    from qlora_hal.contract.backend import BackendSpec, Quantization
    from qlora_hal.model.source import ModelSource
    from qlora_hal.quantize.calibration import Calibration

CALIBRATION_ROWS = 256
CALIBRATION_TOKENS = 1024


def quantize(
    model: Annotated[str, Parameter(help="A 16-bit model: a folder, or a Hugging Face model id.")],
    out: Annotated[Path, Parameter(help="A folder that does not exist yet.")],
    /,
    *,
    data: Annotated[
        str, Parameter(help="Rows to calibrate on: a file or a dataset id, in any format that train reads.")
    ],
    format: Annotated[str, Parameter(help="The format: int4_gptq or int8_gptq.")] = "int4_gptq",
    group_size: Annotated[int, Parameter(help="Inputs that share a scale; -1: all of them.")] = 128,
    bits: Annotated[int | None, Parameter(help="Must be those of the format.")] = None,
    asymmetric: Annotated[
        bool, Switch, Parameter(help="Asymmetric quantization with zero points (format gptq_v2; with auto_gptq: gptq).")
    ] = False,
    act_order: Annotated[bool, Switch, Parameter(help="Solve inputs in order of activation (desc_act).")] = False,
    rows: Annotated[int, Parameter(help="Maximum number of rows.")] = CALIBRATION_ROWS,
    max_seq_length: Annotated[int, Parameter(help="Maximum length of a row in tokens.")] = CALIBRATION_TOKENS,
    revision: Annotated[str | None, Parameter(help="Branch, tag or commit of a hub model.")] = None,
    backend: Annotated[str, Parameter(help="The backend whose quantizer is used.")] = "auto",
    engine: Annotated[str, Parameter(help="The quantization library, if the backend has several.")] = "auto",
    json: Annotated[bool, Switch, Parameter(help="Print the result as JSON.")] = False,
) -> int:
    """Quantize a model with calibration: qlora-hal quantize MODEL OUT --data rows.jsonl."""
    from qlora_hal.cli.json_output import kept_for_json
    from qlora_hal.files.refused_paths import expanded, refuse_other_encodings
    from qlora_hal.model.source import plan_model, with_weights
    from qlora_hal.quantize.calibration import Recipe, quantize_into
    from qlora_hal.report.console import RunConsole

    out = expanded(out)
    for path in (model, str(out.absolute()), data):
        refuse_other_encodings(path)
    console = RunConsole(json=json)
    quantization = asked_storage(format, bits, group_size)
    source = plan_model(model, revision=revision, trust_remote_code=False)
    refuse_quantized(source)
    spec = able_backend(backend, quantization)
    calibration = calibration_of(source, data, rows=rows, max_seq_length=max_seq_length)
    recipe = Recipe(quantization, symmetric=not asymmetric, act_order=act_order)
    source = with_weights(source, progress=not json)
    with kept_for_json(json):
        made = quantize_into(out, source, spec, recipe, calibration, {"engine": engine}, console.note)
    result = {"folder": str(out), "fingerprint": made.facts.fingerprint, "backend": spec.name}
    if json:
        show_json(result)
    else:
        show(f"{out}\nTrain on it: qlora-hal train --model {quote(str(out))} --data ...")
    return 0


def asked_storage(weight_format: str, bits: int | None, group_size: int) -> Quantization:
    """The storage that the flags name. Raises ConfigError QH-U16, UnsupportedFeatureError QH-B01."""
    from qlora_hal.contract.backend import Quantization
    from qlora_hal.errors import ConfigError, UnsupportedFeatureError
    from qlora_hal.formats.catalogue import find_record, records

    record = find_record(weight_format)
    if record is None or not record.calibrated:
        calibrated = ", ".join(known.name for known in records() if known.calibrated)
        raise ConfigError(
            "QH-U16",
            f"--format {weight_format} needs no calibration; {calibrated} do.",
            where="--format",
            fix=f"Train with quantization.weight_format: {weight_format}; the model is quantized while it is loaded.",
        )
    if bits not in (None, record.bits):
        raise UnsupportedFeatureError(
            "QH-B01",
            f"{bits} bits were requested; {weight_format} has {record.bits}, on every engine here.",
            where="--bits",
            fix="Remove --bits: the format says how many.",
        )
    if group_size != -1 and group_size <= 0:
        raise ConfigError(
            "QH-U16",
            f"--group-size {group_size} is not a number of inputs; a positive one or -1 is expected.",
            where="--group-size",
            fix="Leave it at 128.",
        )
    return Quantization(record.weight_format, None if group_size == -1 else group_size)


def refuse_quantized(source: ModelSource) -> None:
    """Only 16-bit weights can be quantized. Raises ModelError QH-C76."""
    from qlora_hal.errors import ModelError

    stored = source.facts.prequantized
    if stored is not None:
        raise ModelError(
            "QH-C76",
            f"{source.name} is already quantized ({stored.weight_format}).",
            where=source.name,
            fix="Name the model it was made from; or train on it directly.",
        )


def able_backend(name: str, quantization: Quantization) -> BackendSpec:
    """The backend that is named, or the ready one of highest priority whose quantizer makes this format."""
    from qlora_hal.contract.capabilities import Feature, Requirements
    from qlora_hal.detect.discovery import find, listed, load_spec, reports
    from qlora_hal.detect.selection import choose

    entries = listed()
    probed = reports(entries)
    needs = Requirements(
        features=frozenset({Feature.QUANTIZE_ON_LOAD}),
        weight_format=quantization.weight_format,
        block_size=quantization.block_size,
        may_calibrate=True,
    )
    if name == "auto":
        ready = [load_spec(find(report.backend, entries)) for report in probed if report.ready]
        able = [spec for spec in ready if quantization.weight_format in spec.capabilities.calibrated_formats]
        name = max(able, key=lambda spec: spec.priority).name if able else name
    return choose(name, needs, entries, probed, allow_cpu=True).spec


def calibration_of(source: ModelSource, data: str, *, rows: int, max_seq_length: int) -> Calibration:
    """The rows of a file as token ids. Raises DataError, ConfigError QH-D54."""
    from qlora_hal.config.schema import DataConfig
    from qlora_hal.data import ChatTokenizer, prepare
    from qlora_hal.data.source.reading import blamed_on
    from qlora_hal.quantize.calibration import calibration_from

    facts = source.facts
    config = DataConfig(path=data, max_seq_length=max_seq_length, train_on="all")
    with tempfile.TemporaryDirectory(prefix="qlora_hal-calibration-") as folder, blamed_on("--data"):
        prepared = prepare(
            config,
            ChatTokenizer.from_folder(source.path, model_vocabulary_size=facts.vocabulary_size or None),
            cache_dir=Path(folder),
            seed=0,
            model_max_length=facts.max_position_embeddings,
            model_vocabulary_size=facts.vocabulary_size or None,
        )
        return calibration_from(prepared.train, rows=rows, context=facts.max_position_embeddings, where="--data")
