"""`auto`, `--fit`, the advice of an estimate and `advise` have one order: the least costly that fits is taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.cli.__main__ import main
from qlora_hal.config.resolve import nest, resolve_settings
from qlora_hal.memory.fitting import BASE_OFFLOAD, BATCH, LENGTH, RECOMPUTE, Room
from qlora_hal.memory.gpus import GIB, known_gpu
from qlora_hal.run.card_table import OPTIMIZER, fits_of, remedy_of
from qlora_hal.run.planned_memory import PlannedModel
from tests.memory.configs import write_config

AUTO = {RECOMPUTE: "auto", BASE_OFFLOAD: "auto"}
MEMORIES = (4, 5, 5.5, 6, 7, 7.5, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 80)


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "llama-8b"
    write_config(folder, hidden=4096, inner=14336, layers=32, heads=32, key_heads=8, vocabulary=128256)
    return str(folder)


def planned(model: str, memory: float, settings: Mapping[str, object], host: float | None = None) -> PlannedModel:
    """On a card with so many GiB, in a machine whose host has so many left."""
    rows = {BATCH: 2, LENGTH: 2048, "training.gradient_accumulation_steps": 1, **settings}
    config = resolve_settings(None, keywords={"model": model, **rows}, environ={}).config
    there = PlannedModel.of(config, replace(known_gpu("H200"), memory_bytes=int(memory * GIB)))
    return replace(there, host_room=None if host is None else int(host * GIB))


def choice(settings: Mapping[str, object]) -> tuple[object, object]:
    return settings.get(RECOMPUTE, "none"), settings.get(BASE_OFFLOAD, ())


@pytest.mark.parametrize("host", [None, 3.0])
@pytest.mark.parametrize("memory", MEMORIES)
def test_fit_takes_what_auto_takes(memory: float, host: float | None, llama_8b: str) -> None:
    """Of the same rows, and with the optimizer as it is."""
    auto, as_it_is = planned(llama_8b, memory, AUTO, host), planned(llama_8b, memory, {}, host)
    taken = auto.placement()
    assert auto.room is not None
    found = fits_of(as_it_is, auto.room, (BATCH, LENGTH, OPTIMIZER))
    assert bool(found) == auto.fits
    if found:
        assert choice(found[0].settings) == (taken.recompute, taken.base_offload)
        assert (found[0].high, found[0].host) == (auto.needs().device, auto.needs().host)


@pytest.mark.parametrize("memory", MEMORIES)
def test_advice_is_what_auto_would_take(memory: float, llama_8b: str) -> None:
    """Whatever else it changes: rows of a micro-batch, moments."""
    as_it_is = planned(llama_8b, memory, {})
    assert as_it_is.room is not None
    found = remedy_of(as_it_is, as_it_is.room)
    if found.fits:
        others = {path: value for path, value in found.settings.items() if path not in AUTO}
        taken = planned(llama_8b, memory, {**others, **AUTO}).placement()
        assert choice(found.settings) == (taken.recompute, taken.base_offload)


@pytest.mark.parametrize("memory", [5, 6, 8, 12, 24, 80])
def test_advise_advises_what_auto_would_take(memory: float, llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", llama_8b, "--memory", f"{memory}GB", "--data.max_seq_length", "2048"]
    assert main(["advise", *words, "--backend", "cuda_bnb", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    auto = {"model.name_or_path": llama_8b, "backend.name": "cuda_bnb", **told["settings"], **AUTO}
    there = PlannedModel.of(resolve_settings(nest(auto), environ={}).config)
    taken = replace(there, memory_bytes=int(memory * GIB)).placement()
    advised = told["settings"]
    assert (advised[RECOMPUTE], tuple(advised.get(BASE_OFFLOAD, ()))) == (taken.recompute, taken.base_offload)


def test_advise_knows_all_that_can_be_recomputed(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And the embeddings, which cost less than any of it; what it prints can be pasted."""
    words = ["--model", llama_8b, "--memory", "8GB", "--data.max_seq_length", "2048", "--backend", "cuda_bnb"]
    assert main(["advise", *words]) == 0
    said = capsys.readouterr().out
    assert "activations recomputed with their inputs on the host, embeddings on the host" in said
    [command] = [line for line in said.splitlines() if line.strip().startswith("qlora-hal train")]
    assert "--training.recompute offload" in command
    assert "--training.base_offload embeddings" in command


def test_nothing_is_proposed_that_the_host_has_no_memory_for(llama_8b: str) -> None:
    small = planned(llama_8b, 8, {}, host=2.0)
    assert small.room == Room(8 * GIB, 2 * GIB)
    fits = fits_of(small, small.room)
    assert fits
    assert all(one.host <= 2 * GIB for one in fits)
    free = fits_of(replace(small, host_room=None), Room(8 * GIB))
    assert any(one.host > 2 * GIB for one in free)
    advised = remedy_of(small, small.room)
    assert advised.fits
    assert advised.needs.host <= 2 * GIB
    assert planned(llama_8b, 8, AUTO, host=2.0).needs().host <= 2 * GIB


@pytest.mark.parametrize(("rest", "is_on_host"), [("auto", False), ("disk", False), ("host", True)])
def test_layers_that_may_rest_on_the_disk_need_no_host_that_holds_them(
    rest: str, is_on_host: bool, llama_8b: str
) -> None:
    settings = {BASE_OFFLOAD: ("embeddings", "layers"), "backend.options": {"offloaded_layers": rest}}
    small = planned(llama_8b, 6, settings, host=2.0)
    needs, embeddings = small.needs(), 128256 * 4096 * 2
    assert (needs.host > 4 * GIB) is is_on_host
    assert (needs.host == embeddings) is not is_on_host
    layers = 0 if rest == "disk" else 3.35 * GIB  # as an H200's host had them: docs/runs/h200_memory_steps.json
    assert planned(llama_8b, 6, settings, host=64).needs().host == pytest.approx(embeddings + layers, rel=0.002)


@pytest.mark.parametrize("rest", ["auto", "disk"])
def test_layers_that_rest_on_the_disk_are_told_and_priced_as_such(rest: str, llama_8b: str) -> None:
    settings = {BASE_OFFLOAD: ("embeddings", "layers"), "backend.options": {"offloaded_layers": rest}}
    small = planned(llama_8b, 6, settings, host=2.0)
    in_memory = planned(llama_8b, 6, {**settings, "backend.options": {"offloaded_layers": "host"}}, host=64.0)
    assert small.needs().disk == pytest.approx(3.35 * GIB, rel=0.002)
    assert in_memory.needs().disk == 0
    assert small.price().time > 5 * in_memory.price().time
    assert replace(small, devices=4, per_host=2).price().time == pytest.approx(2 * small.price().time)
    assert "GiB of its disk, priced at 3 GiB/s" in small.needs().on_host


def test_what_auto_leaves_on_the_disk_is_said_with_its_price(llama_8b: str) -> None:
    chosen = planned(llama_8b, 5, {**AUTO, LENGTH: 256}, host=2.0)
    assert "layers" in chosen.placement().base_offload
    assert "of the host's memory and 3.35 GiB of its disk, priced at 3 GiB/s" in chosen.placement().why


def test_layers_of_a_mixture_cross_whole_for_tokens_that_meet_a_part_of_them(tmp_path: Path, llama_8b: str) -> None:
    """All 64 experts, of which a token meets eight: streamed, it is dearer than a dense model."""
    experts = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 1024, "head_dim": 128}
    shape = write_config(tmp_path, hidden=2048, inner=6144, layers=24, heads=16, key_heads=4, vocabulary=32000)
    (tmp_path / "config.json").write_text(json.dumps({**shape, **experts, "model_type": "qwen3_moe"}))
    streamed = {BASE_OFFLOAD: ["layers"]}
    mixture, dense = (planned(model, 24, streamed).price() for model in (str(tmp_path), llama_8b))
    assert 5 < mixture.to_each < 8
    assert dense.to_each == 1
    assert mixture.time > 1.5 * dense.time


def test_what_waits_on_a_host_is_counted_for_each_device_on_it_and_for_none_of_another_host(llama_8b: str) -> None:
    there = planned(llama_8b, 24, {BASE_OFFLOAD: ["embeddings", "layers"]})
    assert replace(there, devices=3, per_host=3).needs().host == 3 * there.needs().host > 0
    assert replace(there, devices=6, per_host=3).needs().host == 3 * there.needs().host
