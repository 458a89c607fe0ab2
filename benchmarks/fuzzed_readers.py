"""Every reader of files and texts that strangers write, with sound inputs to start from."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_mutators import (
    Mutator,
    bytes_mutated,
    json_mutated,
    lines_mutated,
    safetensors_mutated,
)

from qlora_hal.contract.values import Adapter, AdapterConfig, OptimizerSnapshot
from qlora_hal.data.template.chat_template import BUILT_IN
from qlora_hal.errors import QloraHalError
from qlora_hal.files import safetensors_file

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "qlora_hal" / "demo"
RUN = ROOT / "docs" / "runs" / "cpu_demo"


@dataclass(frozen=True)
class Reader:
    """`read` takes the path of `file`, into which each input is written. `share` is its part of all inputs; what is
    `cheap` takes few milliseconds; the processor time of what `has_child` is that of its child, too."""

    name: str
    file: Path
    seeds: Sequence[bytes]
    mutate: Mutator
    read: Callable[[Path], object]
    share: int = 1
    cheap: bool = True
    has_child: bool = False

    def input(self, draw: random.Random) -> bytes:
        return self.mutate(draw, self.seeds)


def readers(scratch: Path, *, pickles: bool = True) -> list[Reader]:
    """All readers, their folders made below `scratch`; that of pickles needs torch."""
    places = _Places(scratch)
    found = [
        *_settings(places),
        *_rows(places),
        *_tokenizers(places),
        *_models(places),
        *_adapters(places),
        *_checkpoints(places),
        *_runs(places),
        *_others(places),
    ]
    return [*found, *_pickles(places)] if pickles else found


class _Places:
    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def folder(self, name: str) -> Path:
        folder = self._scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def _encoded(value: object) -> bytes:
    return json.dumps(value).encode("utf-8")


# Settings --------------------------------------------------------------------------------------------------------


def _settings(places: _Places) -> Iterator[Reader]:
    from qlora_hal.config.resolve import resolve_settings

    values = {
        "model": {"name_or_path": "models/m", "revision": "main"},
        "data": {"path": "rows.jsonl", "max_seq_length": 512, "chat_template": "chatml"},
        "lora": {"r": 8, "alpha": 16.0, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "training": {"learning_rate": 1e-4, "max_steps": 10, "seed": 3, "sample_prompts": ["Hello"]},
        "output_dir": "runs/x",
    }
    folder = places.folder("settings")

    def read(path: Path) -> object:
        return resolve_settings(path, environ={})

    def text(path: Path) -> object:
        words = path.read_bytes().decode("utf-8", "replace").split("\n")
        return resolve_settings(
            None, flags={"lora.target_modules": words[0], "training.seed": words[-1], words[0]: "1"}, environ={}
        )

    yield Reader("settings.json", folder / "run.json", [_encoded(values)], json_mutated, read, 3)
    yield Reader("settings.toml", folder / "run.toml", [_as_toml(values)], bytes_mutated, read, 3)
    yield Reader("settings.yaml", folder / "run.yaml", [_as_yaml(values)], bytes_mutated, read, 2, cheap=False)
    flags = [b'["q_proj", "v_proj"]\n7', b"all-linear\n12", b"q_proj,v_proj\nnone", b".*q_proj\n1e3"]
    yield Reader("settings of flags", folder / "flags.txt", flags, bytes_mutated, text, 2)
    arguments = [
        b"train\n--model\nm\n--data\nd\n--output_dir\no\n--lora.r\n8",
        b"explain\nQH-D05",
        b"schema",
        b"train\nx.yaml\n--lora.target_modules=[a,b]",
    ]
    yield Reader("arguments", folder / "arguments.txt", arguments, bytes_mutated, _command_line, 1, cheap=False)


def _as_toml(values: Mapping[str, Any]) -> bytes:
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for group, settings in values.items():
        if isinstance(settings, dict):
            lines += [f"[{group}]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
    return "\n".join(lines).encode()


def _as_yaml(values: Mapping[str, Any]) -> bytes:
    lines = []
    for group, settings in values.items():
        if isinstance(settings, dict):
            lines += [f"{group}:", *(f"  {key}: {json.dumps(value)}" for key, value in settings.items())]
        else:
            lines.append(f"{group}: {settings}")
    return "\n".join(lines).encode()


def _command_line(path: Path) -> object:
    """The real entry point; what would train is stopped by `--print-config`."""
    from qlora_hal.cli.__main__ import main

    arguments = path.read_bytes().decode("utf-8", "replace").replace("\0", "").split("\n")
    if not arguments[0] or arguments[0] not in ("train", "explain", "schema"):
        arguments = ["train", *arguments]
    if arguments[0] == "train":
        arguments.append("--print-config")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(arguments)
    if status == 1:
        raise AssertionError(f"a defect was reported: {said.getvalue()[:500]}")
    return status


# Rows and tokenizers ---------------------------------------------------------------------------------------------


def _rows(places: _Places) -> Iterator[Reader]:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]},
        {"prompt": "a", "completion": "b"},
        {"text": "a text\nof two lines"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "c", "weight": 1},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
    ]
    lines = b"\n".join(map(_encoded, rows))
    folder = places.folder("rows")
    read = _row_reader()
    yield Reader("rows.jsonl", folder / "rows.jsonl", [lines, *map(_encoded, rows)], lines_mutated, read, 6)
    yield Reader("rows.json", folder / "rows.json", [_encoded(rows)], json_mutated, read, 4)
    table = b'prompt,completion\na,b\n"a ""quoted"" one","two\nlines"\n'
    yield Reader("rows.csv", folder / "rows.csv", [table, table.replace(b",", b";")], bytes_mutated, read, 3)
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows[3:4] * 5), folder / "seed.parquet")
        seed = (folder / "seed.parquet").read_bytes()
        yield Reader("rows.parquet", folder / "rows.parquet", [seed], bytes_mutated, read, 1, cheap=False)


def _row_reader() -> Callable[[Path], object]:
    from qlora_hal.data.rendering import RowRenderer
    from qlora_hal.data.source.reading import open_source
    from qlora_hal.data.tokens.encoding import RowEncoder
    from qlora_hal.data.tokens.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.from_folder(DEMO / "model", chat_template="chatml")

    def read(path: Path) -> object:
        encoder = RowEncoder(tokenizer, train_on_all=False)
        renderer, rendered = RowRenderer(tokenizer, encoder, None), []
        refusal: QloraHalError | None = None
        for row in open_source(str(path)).rows():
            try:
                rendered.append(renderer.render(row))
            except QloraHalError as error:
                refusal = error
        usable = [row for row in rendered if row is not None]
        encoder.finish(usable, encoder.encode_texts(usable))
        if refusal is not None:
            raise refusal
        return len(rendered)

    return read


def _tokenizers(places: _Places) -> Iterator[Reader]:
    from qlora_hal.data.template.chat_template import ChatTemplate, TemplateFault
    from qlora_hal.data.tokens.tokenizer import ChatTokenizer

    def read(path: Path) -> object:
        return ChatTokenizer.from_folder(path.parent)

    def render(path: Path) -> object:
        source = path.read_bytes().decode("utf-8", "surrogateescape")
        asked = [{"role": "user", "content": "a </think> b"}, {"role": "assistant", "content": "c"}]
        with contextlib.suppress(TemplateFault):
            return ChatTemplate(source, "fuzzed", {"bos_token": "<s>", "eos_token": "</s>"}).render(asked)
        return None

    config = {
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "chat_template": BUILT_IN["chatml"],
        "add_bos_token": False,
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": 10**30,
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
    }
    small = _encoded(_small_tokenizer())
    for name, mutate, seeds, share, cheap in (
        ("tokenizer.json", json_mutated, [small], 5, True),
        ("tokenizer_config.json", json_mutated, [_encoded(config)], 2, False),
        (
            "special_tokens_map.json",
            json_mutated,
            [_encoded({"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}})],
            1,
            False,
        ),
        ("generation_config.json", json_mutated, [_encoded({"eos_token_id": [3, 4], "pad_token_id": 0})], 1, False),
    ):
        folder = places.folder(f"tokenizer {name}")
        (folder / "tokenizer.json").write_bytes(small)
        (folder / "tokenizer_config.json").write_bytes(_encoded({**config, "chat_template": BUILT_IN["chatml"]}))
        yield Reader(name, folder / name, seeds, mutate, read, share, cheap)
    looking = (
        "{% for m in messages %}{% set c = m.content.split('</think>')[-1] %}"
        "{% if c is string and m['role'] in ['user'] %}{{ m.role | upper + ': ' ~ c | trim | replace('a', 'b') }}"
        "{% else %}{{ m | tojson(indent=2) }}{% endif %}{% endfor %}"
        "{% set n = namespace(i=0) %}{% for i in range(9) %}{% set n.i = n.i * 3 + 1 %}{% endfor %}{{ '%d' % n.i }}"
        "{% macro f(x) %}{{ x | list | join(',') }}{% endmacro %}{{ f('abc') }}"
        "{{ messages | selectattr('role', 'eq', 'user') | list | length }}"
    )
    seeds = [*(template.encode() for template in BUILT_IN.values()), looking.encode()]
    yield Reader(
        "chat template",
        places.folder("template") / "t.jinja",
        seeds,
        bytes_mutated,
        render,
        4,
        cheap=False,
        has_child=True,
    )


def _small_tokenizer() -> dict[str, Any]:
    letters = {chr(code): number for number, code in enumerate((*range(33, 127), 0x120, 0x10A), start=1)}
    merges = [["a", "b"], ["ab", "c"]]
    vocabulary = {**letters, "ab": 200, "abc": 201}
    special = [(0, "<unk>"), (202, "<|im_start|>"), (203, "<|im_end|>")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": content, **flags} for number, content in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {"<unk>": 0, **vocabulary},
            "merges": merges,
        },
    }


# Models and adapters ---------------------------------------------------------------------------------------------

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "torch_dtype": "float32",
}
_MODULES = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}


def _weights() -> dict[str, Any]:
    weights = {
        f"model.layers.0.self_attn.{name}.weight": np.zeros(shape, np.float32) for name, shape in _MODULES.items()
    }
    table = np.zeros((64, 16), np.float32)
    return {**weights, "model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": table[0]}


def _stored(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    return b"".join(bytes(chunk) for chunk in safetensors_file.file_chunks(tensors, metadata or {"format": "pt"}))


def _models(places: _Places) -> Iterator[Reader]:
    from qlora_hal.adapter.targets import resolve_targets
    from qlora_hal.config.schema import LoraConfig
    from qlora_hal.model.facts import read_facts
    from qlora_hal.model.shape import decoder_shape

    del LoraConfig

    def read(path: Path) -> object:
        facts = read_facts(path.parent)
        return decoder_shape(facts), resolve_targets("all-linear", facts.linear_modules)

    weights = _stored(_weights())
    quantized = [
        {
            **_CONFIG,
            "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True},
        },
        {
            **_CONFIG,
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        },
        {**_CONFIG, "quantization": {"group_size": 64, "bits": 4}, "text_config": {"hidden_size": 8}},
    ]
    for name, seeds, mutate, share in (
        ("config.json", [_encoded(_CONFIG), *map(_encoded, quantized)], json_mutated, 4),
        ("model.safetensors", [weights], safetensors_mutated, 5),
        (
            "model.safetensors.index.json",
            [_encoded({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(_weights(), "a.safetensors")})],
            json_mutated,
            2,
        ),
    ):
        folder = places.folder(f"model {name}")
        (folder / "config.json").write_bytes(_encoded(_CONFIG))
        stored = "a.safetensors" if name.endswith("index.json") else "model.safetensors"
        (folder / stored).write_bytes(weights)
        yield Reader(name, folder / name, seeds, mutate, read, share)


def _adapter() -> Adapter:
    config = AdapterConfig(r=4, alpha=8.0, dropout=0.05, target_modules=("model.layers.0.self_attn.q_proj",))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    ones = np.ones((4, 16), np.float32)
    return Adapter({f"{prefix}.lora_A.weight": ones, f"{prefix}.lora_B.weight": ones.T.copy()}, config)


def _adapters(places: _Places) -> Iterator[Reader]:
    from qlora_hal.adapter import read_adapter, read_mlx_adapter, read_provenance, write_adapter, write_mlx_adapter
    from qlora_hal.adapter.mlx_reading import read_mlx_provenance

    def peft(path: Path) -> object:
        return read_adapter(path.parent), read_provenance(path.parent)

    def mlx(path: Path) -> object:
        return read_mlx_adapter(path.parent), read_mlx_provenance(path.parent)

    about: dict[str, Any] = {"base_name": "m", "base_revision": None, "provenance": {"weight_format": "nf4"}}
    for layout, write, read in (("PEFT", write_adapter, peft), ("MLX", write_mlx_adapter, mlx)):
        sound = places.folder(f"adapter {layout}") / "sound"
        write(sound, _adapter(), **about)
        for file in sorted(sound.iterdir()):
            if file.suffix in (".json", ".safetensors"):
                folder = places.folder(f"adapter {layout} {file.name}") / "a"
                shutil.copytree(sound, folder)
                mutate = json_mutated if file.suffix == ".json" else safetensors_mutated
                yield Reader(f"{layout} {file.name}", folder / file.name, [file.read_bytes()], mutate, read, 2)


# Checkpoints and runs --------------------------------------------------------------------------------------------


def _checkpoints(places: _Places) -> Iterator[Reader]:
    from qlora_hal.checkpoint import TrainingState, save_checkpoint
    from qlora_hal.checkpoint.manifest import MANIFEST_FILE, encode_manifest, file_sha256, read_manifest
    from qlora_hal.checkpoint.reading import latest_valid_checkpoint, load_checkpoint
    from qlora_hal.files.durable import WrittenFile

    run = places.folder("checkpoints") / "run"
    adapter = _adapter()
    moments = {
        f"{key}.{moment}": tensor for key, tensor in adapter.tensors.items() for moment in ("exp_avg", "exp_avg_sq")
    }
    optimizer = OptimizerSnapshot(3, moments, exact=True, native_kind="", native={})
    loop = {"losses": [[1, 2.5], [3, 2.0]], "best": None}
    about = {"base_name": "m", "base_revision": None, "base_fingerprint": "ab" * 32}
    run.mkdir()
    sound = save_checkpoint(run, TrainingState(3, 0.5, 300, adapter, optimizer, loop, about), keep=2)

    def read(path: Path) -> object:
        found, _ = latest_valid_checkpoint(path.parents[2], set_aside_broken=False)
        return load_checkpoint(found)

    def signed(path: Path) -> object:
        """What a manifest says of the file is made to fit, so that the reader behind the hashes is reached."""
        manifest = read_manifest(path.parent / "sound")
        files = {
            name: WrittenFile((path.parent / name).stat().st_size, file_sha256(path.parent / name))
            for name in manifest.files
        }
        (path.parent / MANIFEST_FILE).write_bytes(encode_manifest(manifest.step, files, manifest.summary))
        return load_checkpoint(path.parent)

    for file in sorted(sound.iterdir()):
        folder = places.folder(f"checkpoint {file.name}") / "checkpoints" / sound.name
        shutil.copytree(sound, folder)
        if file.suffix not in (".json", ".safetensors"):
            continue
        mutate = json_mutated if file.suffix == ".json" else safetensors_mutated
        is_manifest = file.name == MANIFEST_FILE
        if not is_manifest:
            (folder / "sound").mkdir()
            shutil.copy(sound / MANIFEST_FILE, folder / "sound")
        yield Reader(
            f"checkpoint {file.name}",
            folder / file.name,
            [file.read_bytes()],
            mutate,
            read if is_manifest else signed,
            2,
        )


def _runs(places: _Places) -> Iterator[Reader]:
    from qlora_hal.report.html import write_report
    from qlora_hal.report.metrics import MetricsFile, loss_before, read_metrics, trained_seconds
    from qlora_hal.report.run_file import read_run_config, read_run_file, record_from

    record = json.loads((RUN / "run.json").read_text("utf-8"))
    record = {key: value for key, value in record.items() if key not in ("samples", "detection")}
    metrics = (RUN / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:12]

    def run(path: Path) -> object:
        return read_run_config(path.parent), record_from(read_run_file(path.parent))

    def report(path: Path) -> object:
        return write_report(path.parent)

    def log(path: Path) -> object:
        read_metrics(path), loss_before(path), trained_seconds(path)
        with MetricsFile(path) as file:
            return file.truncate_after(3)

    folder = places.folder("run")
    yield Reader("run.json", folder / "run.json", [_encoded(record)], json_mutated, run, 3)
    yield Reader(
        "metrics.jsonl", places.folder("metrics") / "metrics.jsonl", [b"".join(metrics)], lines_mutated, log, 4
    )
    for name, seed, mutate in (
        ("run.json", _encoded(record), json_mutated),
        ("metrics.jsonl", b"".join(metrics), lines_mutated),
    ):
        folder = places.folder(f"report {name}")
        (folder / "run.json").write_bytes(_encoded(record))
        (folder / "metrics.jsonl").write_bytes(b"".join(metrics))
        yield Reader(f"report of {name}", folder / name, [seed], mutate, report, 1, cheap=False)


def _others(places: _Places) -> Iterator[Reader]:
    from qlora_hal.run.lock import RunLock
    from qlora_hal_conformance.certificate import problems, read_certificate

    document = json.loads((ROOT / "docs" / "certificates" / "cpu_torch.json").read_text("utf-8"))
    document["cases"] = document["cases"][:6]

    def certificate(path: Path) -> object:
        return problems(read_certificate(path))

    def lock(path: Path) -> object:
        with contextlib.closing(_Closing(RunLock.take(path.parent))):
            return None

    def store(path: Path) -> object:
        from qlora_hal.data.tokens.store import NotAStore, open_store

        with contextlib.suppress(NotAStore):
            return open_store(path)
        return None

    yield Reader(
        "certificate", places.folder("certificate") / "c.json", [_encoded(document)], json_mutated, certificate, 2
    )
    yield Reader(
        "token store", places.folder("store") / "t.safetensors", [_token_store(places)], safetensors_mutated, store, 2
    )
    owner = _encoded({"pid": os.getpid(), "host": "h", "since": "2030-01-01", "boot": "x"})
    yield Reader("run.lock", places.folder("lock") / "run.lock", [owner], json_mutated, lock, 1)


@dataclass
class _Closing:
    lock: Any

    def close(self) -> None:
        self.lock.release()


def _token_store(places: _Places) -> bytes:
    from qlora_hal.data.tokens.store import TokenWriter
    from qlora_hal.data.tokens.token_rows import TokenRows

    path = places.folder("sound store") / "t.safetensors"
    rows = TokenRows(
        np.arange(6, dtype=np.int32), np.ones(6, np.uint8), np.array([4, 2]), np.array([1, 2]), np.zeros(2, np.uint64)
    )
    with TokenWriter(path) as writer:
        writer.append(rows)
        writer.finish({"fingerprint": "a", "report": "{}"})
    return path.read_bytes()


def _pickles(places: _Places) -> Iterator[Reader]:
    """What the child process does with a pickle, done here."""
    try:
        import torch
    except ImportError:
        return

    from qlora_hal_backends.unpickling_child import opened

    folder = places.folder("pickles")
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8)}
    torch.save(tensors, folder / "zip.bin")
    torch.save(tensors, folder / "plain.bin", _use_new_zipfile_serialization=False)
    seeds = [(folder / name).read_bytes() for name in ("zip.bin", "plain.bin")]
    yield Reader("pickle", folder / "pytorch_model.bin", seeds, bytes_mutated, opened, 1, cheap=False)
