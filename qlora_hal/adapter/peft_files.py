"""Adapters on disk in PEFT's layout, written and read without PEFT, so that every backend gives the same bytes.

`adapter_model.safetensors` and `adapter_config.json` are PEFT's; `qlora_hal.json` says how the adapter came to be;
`README.md` is the model card. Whatever of PEFT an adapter could use beyond plain LoRA is refused by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import NoReturn

from qlora_hal.adapter import peft_experts
from qlora_hal.adapter.as_written import is_vouched, provenance_in, require_as_written, vouched
from qlora_hal.adapter.fitting import check_base, check_fits
from qlora_hal.adapter.naming import PREFIX, module_of
from qlora_hal.adapter.peft_targets import PeftTargets
from qlora_hal.adapter.targets import shortest_names
from qlora_hal.contract.values import Adapter, AdapterConfig
from qlora_hal.errors import AdapterError, StorageError, UnsafeInputError
from qlora_hal.errors.redaction import published, redacted
from qlora_hal.files import durable, safetensors_file, strict_json
from qlora_hal.files.durable import WrittenFile
from qlora_hal.model.expert_stacks import place_of
from qlora_hal.model.safety import conversion_command

__all__ = [
    "check_base",
    "check_fits",
    "model_card",
    "published_files",
    "read_adapter",
    "read_provenance",
    "unvouched_note",
    "write_adapter",
    "write_adapter_files",
]

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PROVENANCE_FILE = "qlora_hal.json"
CARD_FILE = "README.md"

_MLX_PARAMETERS = "lora_parameters"
"""What mlx-lm's adapter_config.json has in the place of PEFT's fields."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
        "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
"""Fields that are read, or that say nothing about tensors already trained. `auto_mapping` names imports: never used."""
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways to start A and B; the others (pissa, olora, loftq, corda, ...) also change the base, which the file lacks."""


def write_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    base_name: str,
    base_revision: str | None,
    provenance: Mapping[str, object],
    linear_modules: Collection[str] | None = None,
) -> None:
    """Write the adapter's folder as one act, replacing an earlier adapter there; byte-identical for equal input.

    With `linear_modules` (all of the model's), `target_modules` is the list of leaf names where that is exact; without,
    full paths, which PEFT takes as well. Raises StorageError QH-S09 (no space), QH-S11, or QH-S14 when the folder
    holds foreign files.
    """
    _require_replaceable(folder)
    staging = folder.with_name(f".staging-{folder.name}-{durable.unique_name()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        write_adapter_files(
            staging,
            adapter,
            base_name=base_name,
            base_revision=base_revision,
            provenance=provenance,
            linear_modules=linear_modules,
        )
        card = model_card(adapter.config, base_name, provenance).encode("utf-8")
        durable.write_new(staging / CARD_FILE, [card])
        durable.flush_folder(staging)
        _put_in_place(staging, folder)
    except OSError as problem:
        raise durable.storage_error(problem, folder, what="the adapter") from problem
    finally:
        with suppress(OSError):
            durable.remove_tree(staging)


def write_adapter_files(
    folder: Path,
    adapter: Adapter,
    *,
    base_name: str,
    base_revision: str | None,
    provenance: Mapping[str, object],
    linear_modules: Collection[str] | None = None,
    midway: Callable[[Path], None] | None = None,
) -> dict[str, WrittenFile]:
    """Write the adapter without its model card into a folder: what a checkpoint holds too. `midway` as in `write_new`.

    File name -> size and hash, in the order of writing; `qlora_hal.json` comes last, with the hash of the tensors.
    Raises OSError.
    """
    config = _peft_config(adapter, base_name, base_revision, provenance, linear_modules)
    facts = {**provenance, "base_name": base_name, "base_revision": base_revision}
    tensors = safetensors_file.file_chunks(peft_experts.in_files(adapter.tensors, provenance), {"format": "pt"})
    written = {TENSORS_FILE: durable.write_new(folder / TENSORS_FILE, tensors, midway=midway)}
    for name, content in (
        (CONFIG_FILE, config),
        (PROVENANCE_FILE, vouched(facts, written[TENSORS_FILE], adapter.config)),
    ):
        written[name] = durable.write_new(folder / name, [strict_json.encode(content)], midway=midway)
    return written


def read_adapter(folder: Path) -> Adapter:
    """An adapter written here or by PEFT. The tensors tell which modules it has, and adapter_config.json has to mean
    those; float16 and bfloat16 become float32.

    Raises AdapterError: QH-C50 (a file is missing or malformed), QH-C51 (features beyond plain LoRA, all named),
    QH-C09 (tensors that are not LoRA's, of another rank, or of modules that PEFT would give no adapter),
    QH-C11 (a dtype that float32 cannot hold exactly), QH-C01 (truncated), QH-C22 (changed since qlora_hal wrote it).
    Raises UnsafeInputError: QH-C15, QH-C16 (see `safe_tensors_file`), QH-C17 (pickle only).
    """
    raw_config = _read_config(folder)
    tensors = _read_tensors(folder)
    tensors = replace(tensors, arrays=_named(tensors.arrays, raw_config.get("r"), folder))
    stacks = peft_experts.stacks_in(tensors.arrays)
    document = _document(folder)
    _refuse_unsupported(raw_config, folder, on_experts=bool(stacks) or peft_experts.LAYOUT in _provenance_of(document))
    paths = _modules_of(tensors.arrays, folder)
    modules = tuple(sorted(stacks | {path for path in paths if place_of(path) is None}))
    config = _adapter_config(raw_config, modules, folder)
    _refuse_other_patterns(raw_config, config, folder)
    _refuse_left_out(raw_config, paths, stacks, folder)
    _refuse_other_ranks(tensors.arrays, config.r, folder)
    lossy = {name: dtype for name, dtype in tensors.dtypes.items() if dtype not in ("F32", "F16", "BF16")}
    if lossy:
        name, dtype = next(iter(lossy.items()))
        raise AdapterError(
            "QH-C11",
            f"{len(lossy)} tensors cannot become float32 without loss, the first is {name} with {dtype}.",
            where=str(folder / TENSORS_FILE),
            fix="Save the adapter in float32, float16 or bfloat16.",
            context={"tensors": lossy},
        )
    require_as_written(folder, document, tensors.sha256, config)
    floats = {name: array.astype("float32", copy=False) for name, array in _stacked(tensors.arrays, folder).items()}
    return Adapter({name: floats[name] for name in sorted(floats)}, config)


def read_provenance(folder: Path) -> Mapping[str, object]:
    """What `qlora_hal.json` records; for an adapter of another tool, the base that `adapter_config.json` names.

    Raises AdapterError QH-C50 when a file is there but malformed.
    """
    if document := _document(folder):
        return provenance_in(document)
    config = _read_config(folder)
    return {"base_name": config.get("base_model_name_or_path"), "base_revision": config.get("revision")}


def unvouched_note(folder: Path) -> str:
    """What to say of an adapter that an earlier release wrote, without a hash; nothing of any other.

    Raises AdapterError QH-C50.
    """
    document = _document(folder)
    if not document or is_vouched(document):
        return ""
    return f"{folder.name} was written by an earlier release, without a hash: whether it was changed cannot be verified"


def _document(folder: Path) -> Mapping[str, object]:
    """`qlora_hal.json` as it is; empty for an adapter of another tool."""
    return _read_json(folder / PROVENANCE_FILE) if os.path.lexists(folder / PROVENANCE_FILE) else {}


def _peft_config(
    adapter: Adapter,
    base_name: str,
    base_revision: str | None,
    provenance: Mapping[str, object],
    linear_modules: Collection[str] | None,
) -> dict[str, object]:
    config = adapter.config
    stacks = {module_of(name)[0] for name, tensor in adapter.tensors.items() if tensor.ndim == 3}
    # Of a mixture PEFT takes the names of dense layers for the experts', whether these are adapted or not.
    chosen = (
        peft_experts.fields_for(config, stacks, linear_modules)
        if stacks or peft_experts.LAYOUT in provenance
        else {"target_modules": shortest_names(config.target_modules, linear_modules)}
    )
    return {
        **chosen,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "peft_type": "LORA",
        "r": config.r,
        "revision": base_revision,
        "task_type": "CAUSAL_LM",
        "use_rslora": config.use_rslora,
    }


def model_card(
    config: AdapterConfig,
    base_name: str,
    provenance: Mapping[str, object],
    *,
    name: str | None = None,
    sections: Sequence[str] = (),
) -> str:
    """README.md of an adapter: how to open it, and how it came to be. `name` is what it is opened by where it lies on
    the hub; `sections` are lines of Markdown between the two."""
    front = card_front("library_name: peft", ("lora", "qlora", "qlora_hal"), base_name)
    # A card is made to be published; of a local base it says the folder's name, not where somebody keeps it.
    shown = Path(base_name).name if Path(base_name).is_absolute() else base_name
    rows: list[tuple[str, object]] = [
        ("base", shown),
        ("r", config.r),
        ("alpha", config.alpha),
        ("dropout", config.dropout),
    ]
    rows += [("rsLoRA", config.use_rslora), ("modules", len(config.target_modules))]
    rows += sorted((key, value) for key, value in provenance.items() if key != "base_name")
    opened = "this_folder" if name is None else json.dumps(name)
    text = ["# LoRA adapter", "", *_how_to_open(shown, provenance, opened), "", *sections]
    return "\n".join([*front, *text, *card_table(rows), ""])


def card_front(library: str, tags: Sequence[str], base_name: str) -> list[str]:
    """The head of a model card, which the hub reads; the base is named where it is one of the hub's."""
    front = ["---", library, "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"]
    return [*front, *([f"base_model: {json.dumps(base_name)}"] if _HUB_ID.fullmatch(base_name) else []), "---", ""]


def card_table(rows: Iterable[tuple[str, object]]) -> list[str]:
    """Names and values as a table of Markdown."""
    return ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)]


def published_files(folder: Path, adapter: Adapter, base_name: str) -> dict[str, bytes]:
    """The two JSON files of an adapter as they may be published: with this name of the base, and without where things
    lie on this machine or its secrets. `read_adapter` takes them beside the same tensors."""
    config = redacted({**_read_config(folder), "base_model_name_or_path": base_name})
    files = {CONFIG_FILE: strict_json.encode(config)}
    if document := _document(folder):
        facts = published({**provenance_in(document), "base_name": base_name})
        assert isinstance(facts, dict)
        tensors = durable.hashed(folder / TENSORS_FILE)
        files[PROVENANCE_FILE] = strict_json.encode(vouched(facts, tensors, adapter.config))
    return files


def _how_to_open(base: str, provenance: Mapping[str, object], opened: str) -> list[str]:
    """Lines that open the adapter, on the 4-bit base where transformers can make the one that it was trained on."""
    weight_format, dtype = provenance.get("weight_format"), provenance.get("compute_dtype")
    is_64 = provenance.get("block_size") == 64  # transformers makes no other blocks
    if weight_format not in ("nf4", "fp4") or not is_64 or dtype is None:
        opening = ["from peft import PeftModel", f"model = PeftModel.from_pretrained(base_model, {opened})"]
        return ["Trained with qlora_hal; open it with PEFT:", "", "```python", *opening, "```"]
    return [
        f"Trained with qlora_hal on the base in {weight_format}, whose rounding it makes up for; open it on that base:",
        "",
        "```python",
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, BitsAndBytesConfig",
        "",
        "four_bit = BitsAndBytesConfig(",
        f'    load_in_4bit=True, bnb_4bit_quant_type="{weight_format}",',
        f"    bnb_4bit_use_double_quant={bool(provenance.get('double_quant'))}, bnb_4bit_compute_dtype=torch.{dtype},",
        ")",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}, quantization_config=four_bit)",
        f"model = PeftModel.from_pretrained(base, {opened})",
        "```",
    ]


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else strict_json.encode(value).decode("utf-8")
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _require_replaceable(folder: Path) -> None:
    files = (TENSORS_FILE, CONFIG_FILE, PROVENANCE_FILE, CARD_FILE)
    if not os.path.lexists(folder):
        return
    foreign = ["not a folder"] if folder.is_symlink() or not folder.is_dir() else []
    foreign = foreign or sorted(entry.name for entry in folder.iterdir() if entry.name not in files)
    if foreign:
        raise StorageError(
            "QH-S14",
            f"{folder} cannot be replaced by the adapter: {', '.join(foreign[:5])}; a new or earlier adapter folder is "
            "expected.",
            where=str(folder),
            fix="Choose another folder for the adapter.",
        )


def _put_in_place(staging: Path, folder: Path) -> None:
    """Two renames when a folder is replaced; a crash between them leaves it as `.replaced-...`, which is put back."""
    if folder.is_dir():
        aside = folder.with_name(f".replaced-{folder.name}-{durable.unique_name()}")
        folder.rename(aside)
        staging.rename(folder)
        durable.flush_folder(folder.parent)
        with suppress(OSError):  # swept at the next start
            durable.remove_tree(aside)
    else:
        staging.rename(folder)
        durable.flush_folder(folder.parent)


def _read_json(path: Path) -> dict[str, object]:
    try:
        return strict_json.read_object(path)
    except OSError as problem:
        _refuse_file(path, f"cannot be read ({problem.strerror or problem})", problem)
    except strict_json.JsonProblem as problem:
        _refuse_file(path, f"is not valid JSON ({problem})", problem)


def _read_config(folder: Path) -> dict[str, object]:
    config = _read_json(folder / CONFIG_FILE)
    kind = config.get("peft_type")
    if kind is None and _MLX_PARAMETERS in config:
        raise AdapterError(
            "QH-C50",
            f"{folder} is an adapter in mlx-lm's layout; PEFT's is expected.",
            where=str(folder / CONFIG_FILE),
            fix=f"Convert it: qlora-hal adapter convert {quote(str(folder))} {quote(f'{folder}-peft')} --to peft",
        )
    if kind != "LORA":
        _refuse_file(folder / CONFIG_FILE, f"has peft_type {kind!r}, LORA is expected")
    return config


def _read_tensors(folder: Path) -> safetensors_file.TensorFile:
    path = folder / TENSORS_FILE
    pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if os.path.lexists(folder / name)]
    if pickled and not os.path.lexists(path):
        raise UnsafeInputError(
            "QH-C17",
            f"{folder} holds its tensors only as {pickled[0]}, a pickle, which can run code when opened.",
            where=str(folder / pickled[0]),
            fix=f"Convert it once: {conversion_command(str(folder))}",
        )
    try:
        return safetensors_file.read_arrays(path)
    except OSError as problem:
        _refuse_file(path, f"cannot be read ({problem.strerror or problem})", problem)


def _named(tensors: Mapping[str, safetensors_file.Array], r: object, folder: Path) -> dict[str, safetensors_file.Array]:
    document = _document(folder)
    try:
        return peft_experts.named(tensors, r, _provenance_of(document))
    except ValueError:  # the names are looked at next
        return dict(tensors)


def _provenance_of(document: Mapping[str, object]) -> Mapping[str, object]:
    return provenance_in(document) if document else {}


def _stacked(tensors: Mapping[str, safetensors_file.Array], folder: Path) -> dict[str, safetensors_file.Array]:
    try:
        return peft_experts.stacked(tensors)
    except ValueError as problem:
        raise AdapterError(
            "QH-C09",
            f"The adapter's tensors are not those of a stack of experts: {problem}.",
            where=str(folder / TENSORS_FILE),
            fix="Take both files from the same adapter.",
        ) from problem


def _refuse_other_patterns(raw: Mapping[str, object], config: AdapterConfig, folder: Path) -> None:
    """Of an adapter on experts: ranks and scales of modules, other than PEFT needs for the experts' fused weights."""
    expected = peft_experts.patterns(config)
    if found := [name for name in expected if raw.get(name) and raw[name] != expected[name]]:
        _refuse_settings(raw, found, folder)


def _refuse_unsupported(config: Mapping[str, object], folder: Path, *, on_experts: bool) -> None:
    """Everything set that plain LoRA does not have, unknown fields included: ignoring one could change the result."""
    plain = (*_HARMLESS, "bias", "init_lora_weights", *(peft_experts.FIELDS if on_experts else ()))
    found = [name for name in sorted(config) if name not in plain and config[name]]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if config.get("init_lora_weights") not in _PLAIN_INITIALISATIONS:
        found.append("init_lora_weights")
    if found:
        _refuse_settings(config, found, folder)


def _refuse_settings(config: Mapping[str, object], found: list[str], folder: Path) -> NoReturn:
    settings = ", ".join(f"{name}={_short(config[name])}" for name in found)
    raise AdapterError(
        "QH-C51",
        f"The adapter uses {len(found)} {'setting' if len(found) == 1 else 'settings'} beyond plain LoRA: {settings}.",
        where=str(folder / CONFIG_FILE),
        cause="They change what the tensors mean, so they are not dropped silently.",
        fix="Merge the adapter with PEFT, or train one without these settings.",
        context={"unsupported": found},
    )


def _modules_of(tensors: Collection[str], folder: Path) -> tuple[str, ...]:
    halves: dict[str, set[str]] = {}
    foreign = []
    for key in tensors:
        try:
            module, half = module_of(key)
        except ValueError:
            foreign.append(key)
        else:
            halves.setdefault(module, set()).add(half)
    single = sorted(module for module, found in halves.items() if found != {"A", "B"})
    if not halves:
        first = ascii(min(tensors, default="nothing"))
        code, problem = "QH-C08", f"0 of {len(tensors)} tensors matched LoRA names of PEFT, it has {first}"
    elif foreign or single:
        listed = [*map(ascii, sorted(foreign)), *(f"{module} without its other half" for module in single)]
        code = "QH-C09"
        problem = f"{len(foreign)} unexpected tensors, {len(single)} missing; first: {', '.join(listed[:5])}"
    else:
        return tuple(sorted(halves))
    of_peft = bool(halves) and not single and all(key.startswith(PREFIX) for key in foreign)
    raise AdapterError(
        code,
        f"The adapter's tensors are not those of plain LoRA: {problem}.",
        where=str(folder / TENSORS_FILE),
        cause="PEFT writes such tensors of embeddings and heads that have an adapter or another size, and of LoRA's "
        "variants; here the linear layers before the head carry plain LoRA."
        if of_peft
        else "Names such as base_model.model.<module>.lora_A.weight are expected.",
        fix="Merge the adapter with PEFT, or train one without them."
        if of_peft
        else "Save the adapter with PEFT, or with qlora_hal.",
        context={"unexpected": sorted(foreign), "incomplete_modules": single},
    )


def _refuse_left_out(
    raw: Mapping[str, object], modules: tuple[str, ...], stacks: Collection[str], folder: Path
) -> None:
    """Tensors that PEFT would leave out, by what the configuration says of modules, parameters and layers."""
    try:
        left_out = PeftTargets.read(raw).left_out(modules, stacks)
    except ValueError as problem:
        _refuse_file(folder / CONFIG_FILE, ascii(str(problem))[1:-1], problem)
    if not left_out:
        return
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    settings = ", ".join(f"{name}={_short(raw[name])}" for name in fields if raw.get(name))
    raise AdapterError(
        "QH-C09",
        f"{len(left_out)} of {len(modules)} modules have tensors that adapter_config.json leaves out ({settings}); "
        f"first: {', '.join(map(ascii, left_out[:5]))}.",
        where=str(folder / CONFIG_FILE),
        cause="PEFT would not use these tensors, so that the two files are two different adapters.",
        fix="Take both files from the same adapter.",
        context={"left_out": left_out},
    )


def _refuse_other_ranks(tensors: Mapping[str, safetensors_file.Array], r: int, folder: Path) -> None:
    wrong = []
    for key, tensor in tensors.items():
        rank_axis = 0 if module_of(key)[1] == "A" else 1
        if tensor.ndim != 2 or tensor.shape[rank_axis] != r:
            wrong.append(f"{key} {list(tensor.shape)}")
    if wrong:
        raise AdapterError(
            "QH-C09",
            f"{len(wrong)} of {len(tensors)} tensors are not of rank {r}, which adapter_config.json states; first: "
            f"{', '.join(wrong[:5])}.",
            where=str(folder / TENSORS_FILE),
            fix="Take both files from the same adapter.",
            context={"misshapen": sorted(wrong)},
        )


def _adapter_config(raw: Mapping[str, object], modules: tuple[str, ...], folder: Path) -> AdapterConfig:
    r, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    rslora = raw.get("use_rslora") or False
    if type(r) is not int or r < 1:
        _refuse_file(folder / CONFIG_FILE, f"has r = {_short(r)}, a positive whole number is expected")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        _refuse_file(folder / CONFIG_FILE, f"has lora_alpha = {_short(alpha)}, a positive number is expected")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        _refuse_file(folder / CONFIG_FILE, f"has lora_dropout = {_short(dropout)}, a number in [0, 1) is expected")
    if not isinstance(rslora, bool):
        _refuse_file(folder / CONFIG_FILE, f"has use_rslora = {_short(rslora)}, true or false is expected")
    return AdapterConfig(r, float(alpha), float(dropout), rslora, modules)


def _short(value: object) -> str:
    text = repr(value)
    return ascii(text)[1:-1] if len(text) <= 60 else ascii(text[:57])[1:-1] + "..."


def _refuse_file(path: Path, problem: str, cause: BaseException | None = None) -> NoReturn:
    raise AdapterError(
        "QH-C50",
        f"{path.name} {problem}.",
        where=str(path),
        fix="Name a folder with adapter_model.safetensors and adapter_config.json.",
    ) from cause
