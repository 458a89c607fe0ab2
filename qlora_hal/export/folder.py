"""The files beside the weights: what transformers and mlx-lm read, and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from qlora_hal.adapter.peft_files import card_front, card_table
from qlora_hal.data.tokens.tokenizer import chosen_template
from qlora_hal.data.tokens.tokenizer_files import MORE_TEMPLATES, chat_templates
from qlora_hal.files import durable
from qlora_hal.model.safety import named_python_files
from qlora_hal.model.source import ModelSource

RECORD_FILE = "merge.json"
CARD_FILE = "README.md"
TEMPLATE_FILE = "chat_template.jinja"

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    TEMPLATE_FILE, "chat_template.json", "processor_config.json", "preprocessor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_OF_QUANTIZATION = ("quantization_config", "quantization")
"""Keys of config.json that describe packed weights: transformers and bitsandbytes or GPTQ, then MLX."""


def write_configuration(folder: Path, source: ModelSource, dtype: str, chat_template: str | None) -> None:
    """config.json without quantization, the base's tokenizer and generation files, its licence, and the chat template
    of the run where it was not the tokenizer's own. Raises OSError."""
    content = (json.dumps(merged_config(source.facts.config, dtype), indent=2, ensure_ascii=False) + "\n").encode()
    durable.write_new(folder / "config.json", [content])
    for path in sorted(source.path.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COPIED):
            shutil.copyfile(path, folder / path.name)
    if source.trust_remote_code:
        for name in named_python_files(source.facts.config):
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
    if chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    elif (source.path / MORE_TEMPLATES).is_dir():
        shutil.copytree(source.path / MORE_TEMPLATES, folder / MORE_TEMPLATES, ignore=_all_but_templates)


def _all_but_templates(folder: str, names: Sequence[str]) -> set[str]:
    return {name for name in names if not (name.endswith(".jinja") and Path(folder, name).is_file())}


def merged_config(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """The base's config.json for unquantized weights in `dtype`."""
    kept = {key: value for key, value in config.items() if key not in _OF_QUANTIZATION}
    names = [name for name in ("dtype", "torch_dtype") if name in kept] or ["dtype"]
    text = kept.get("text_config")
    if isinstance(text, Mapping):
        stale = {name: dtype for name in ("dtype", "torch_dtype") if name in text}
        kept["text_config"] = {**text, **stale}
    return {**kept, **dict.fromkeys(names, dtype)}


def chat_template_of(name: str | None, base: Path) -> str | None:
    """The text of a run's `data.chat_template`: built in, one that the base has under this name, or a file; None where
    the tokenizer's own was used. Raises DataError (QH-D12), ModelError (QH-D52)."""
    if name is None:
        return None

    return chosen_template(name, chat_templates(base))[0]


def model_card(
    record: Mapping[str, object], base_name: str, rows: Sequence[tuple[str, str]], sections: Sequence[str] = ()
) -> str:
    """README.md: what was merged and how close it is; `rows` are (name, value) of the report, `sections` lines of
    Markdown above them."""
    front = card_front("library_name: transformers", ("qlora", "qlora_hal", "merged"), base_name)
    notes = [f"- {_cell(note)}" for note in record.get("notes", ())]  # type: ignore[attr-defined]
    text = [*front, "# Merged model", ""]
    text += [
        "A LoRA adapter merged into its base with qlora_hal. The merged model was compared with base and adapter, as",
        f"they were trained, on rows of text; `{RECORD_FILE}` holds every figure. The license of the base applies.",
        "",
        *sections,
    ]
    return "\n".join([*text, *card_table(rows), *(["", "## Notes", "", *notes] if notes else []), ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
