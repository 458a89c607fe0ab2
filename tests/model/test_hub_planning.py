"""What is fetched of a hub model before its weights, and what has to be right before they are."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from qlora_hal.demo import model_path
from tests.model.fake_hub import FakeHub, Sparse, llama_70b_shape, serving
from tests.model.hub_client import Client

LLAMA_70B = "org/llama-70b-shape"
SHORT = ("--data.max_seq_length", "128")
PARAMETERS = 70_553_706_496
"""Of Llama 3.1 70B."""


def weights_served(hub: FakeHub) -> int:
    """Bytes of weight files, in whichever format and copy."""
    return sum(count for name, count in hub.served.items() if name.endswith((".safetensors", ".pth", ".onnx_data")))


def rows(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    file.write_text('{"prompt": "Name a color.", "completion": "Blue."}\n' * 8)
    return file


def with_frequencies(stored: bytes | Sparse, count: int = 2**50) -> Sparse:
    """The same weights and (of 2**50, 4 PiB) frequencies, a buffer of old checkpoints that no architecture asks for."""
    start = 8 + int.from_bytes(stored[:8], "little")
    header, end = json.loads(stored[8:start]), len(stored) - start
    frequencies = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
    raw = json.dumps({**header, "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}).encode()
    return Sparse(len(raw).to_bytes(8, "little") + raw, 8 + len(raw) + end + 4 * count)


def demo_files() -> dict[str, bytes | Sparse]:
    return {path.name: path.read_bytes() for path in model_path().iterdir() if path.is_file()}


def test_estimate_of_70_billion_parameters_fetches_under_5_megabytes(client: Client) -> None:
    with serving(FakeHub(llama_70b_shape(), name=LLAMA_70B)) as hub:
        done = client.command(hub.address, "estimate", "--model", LLAMA_70B, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert 0.5 < told["bytes"]["weights"] / PARAMETERS < 0.7
    assert sum(hub.served.values()) < 1_000_000
    assert weights_served(hub) == 0, "config.json, the index and the sizes of the files agree"
    assert told["read_from"] == "config.json, with which the names and sizes of the weight files agree"
    assert set(hub.served) == {"api", "config.json", "model.safetensors.index.json"}
    assert "tokenizer.json" not in hub.served
    assert not {"consolidated.safetensors", "original/params.json", "onnx/model.onnx_data"} & hub.served.keys()


def test_headers_are_read_where_config_and_weights_differ(client: Client) -> None:
    files = llama_70b_shape()
    config = json.loads(bytes(files["config.json"]))  # type: ignore[arg-type]
    files["config.json"] = json.dumps({**config, "intermediate_size": 28416}).encode()
    with serving(FakeHub(files, name=LLAMA_70B)) as hub:
        done = client.command(hub.address, "estimate", "--model", LLAMA_70B, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert 0.5 < told["bytes"]["weights"] / PARAMETERS < 0.7
    assert told["read_from"] == "the headers of the weight files"
    assert weights_served(hub) == 30 * 16 * 1024


def test_hub_without_ranges_still_gives_the_facts(client: Client, files: dict[str, bytes]) -> None:
    weights = with_frequencies(files["model.safetensors"], 2**12)
    with serving(FakeHub({**files, "model.safetensors": weights}, ranges=False)) as hub:
        done = client.command(hub.address, "estimate", "--model", "org/tiny", *SHORT)
    assert done.returncode == 0, done.stderr
    assert weights_served(hub)


def test_hub_without_ranges_is_heard_no_longer_than_a_header_lasts(client: Client, files: dict[str, bytes]) -> None:
    weights = with_frequencies(files["model.safetensors"], 2**24)
    with serving(FakeHub({**files, "model.safetensors": weights}, ranges=False)) as hub:
        done = client.command(hub.address, "estimate", "--model", "org/tiny", *SHORT)
    assert done.returncode == 0, done.stderr
    assert hub.sent < len(weights) // 4


@pytest.mark.fault("E11")
def test_description_alone_in_the_cache_is_told_offline(client: Client, files: dict[str, bytes]) -> None:
    with serving(FakeHub(files)) as hub:
        assert client.command(hub.address, "estimate", "--model", "org/tiny", *SHORT).returncode == 0
        done = client.command(hub.address, "estimate", "--model", "org/tiny", *SHORT, offline=True)
    assert done.returncode == 11
    assert "this machine's cache has its description, without its weights" in done.stderr


def test_packed_weights_are_described_by_parts_that_are_read_in_place(
    client: Client, nf4_files: dict[str, bytes]
) -> None:
    with serving(FakeHub(nf4_files)) as hub:
        done = client.command(hub.address, "estimate", "--model", "org/tiny", *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weight_format"] == "nf4"


@pytest.mark.slow
@pytest.mark.fault("E22")
def test_disk_that_cannot_hold_the_weights_is_told_before_any_is_fetched(client: Client) -> None:
    files = demo_files()
    files["model.safetensors"] = with_frequencies(files["model.safetensors"])
    with serving(FakeHub(files)) as hub:
        done = train(client, hub, "org/tiny", rows(client.folder))
    assert done.returncode == 8, done.stderr
    assert "The files of org/tiny need 4096 TiB more; " in done.stderr
    assert " are free at " in done.stderr
    assert weights_served(hub) == 16 * 1024
    assert "tokenizer.json" in hub.served


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--data", "rows.jsnl"], "QH-D50"),
        (["--data", "rows.jsonl", "--training.lr", "1e-4"], "QH-U04"),
        (["--data", "rows.jsonl", "--backend", "auto"], "QH-E01"),
        (["--data", "rows.jsonl", "--data.validation_path", "gone.jsonl"], "QH-D50"),
    ],
)
def test_what_costs_nothing_to_see_is_told_before_the_hub_is_asked(
    client: Client, files: dict[str, bytes], arguments: list[str], code: str
) -> None:
    rows(client.folder)
    with serving(FakeHub(files)) as hub:
        done = client.command(hub.address, "train", "--model", "org/tiny", "--output_dir", "runs/a", *arguments)
    assert f"error[{code}]" in done.stderr
    assert not hub.requests


@pytest.mark.slow
def test_dry_run_fetches_no_weights_and_says_what_the_run_will(client: Client) -> None:
    with serving(FakeHub(demo_files())) as hub:
        done = train(client, hub, "org/tiny", rows(client.folder), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "of weights lie on the hub; the run fetches them" in done.stderr
    assert weights_served(hub) == 16 * 1024
    assert not (client.folder / "runs").exists()


@pytest.mark.slow
def test_rows_that_cannot_be_read_are_told_before_weights_are_fetched(client: Client) -> None:
    file = client.folder / "rows.jsonl"
    file.write_text('{"frage": "Nenne eine Farbe.", "antwort": "Blau."}\n')
    with serving(FakeHub(demo_files())) as hub:
        done = train(client, hub, "org/tiny", file)
    assert done.returncode == 4, done.stderr
    assert weights_served(hub) == 16 * 1024


@pytest.mark.slow
def test_run_fetches_its_weights_once_and_trains(client: Client) -> None:
    with serving(FakeHub(demo_files() | {"pytorch_model.bin": b"pickle", "copy.gguf": b"GGUF"})) as hub:
        done = train(client, hub, "org/tiny", rows(client.folder), "--training.max_steps", "1")
        assert done.returncode == 0, done.stderr
        assert "of weights from the hub, in 1 files" in done.stderr
        whole = len(hub.files["model.safetensors"])
        assert hub.served["model.safetensors"] == 16 * 1024 + whole
        assert not {"pytorch_model.bin", "copy.gguf"} & hub.served.keys()
        again = train(client, hub, "org/tiny", rows(client.folder), "--training.max_steps", "1", "--overwrite")
        assert again.returncode == 0, again.stderr
        assert hub.served["model.safetensors"] == 16 * 1024 + whole


def train(client: Client, hub: FakeHub, model: str, data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--model", model, "--data", str(data), "--output_dir", "runs/a", "--backend", "cpu_torch", *more)
    return client.command(hub.address, "train", *arguments)
