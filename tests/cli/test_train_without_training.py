"""Verbs that look before anything trains, and options that are refused rather than passed over."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.cli.stream_encoding import escape_what_streams_cannot_hold
from qlora_hal.demo import data_path, model_path

CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, ...]:
    """Flags of a small run."""
    (tmp_path / "rows.jsonl").write_text("".join(data_path("train").read_text().splitlines(keepends=True)[:12]))
    return ("--model", str(model_path()), "--data", "rows.jsonl", "--backend", "cpu_torch", "--output_dir", "out/run")


def test_a_dry_run_prints_plan_and_memory_and_writes_nothing(
    qlora_hal: CommandLine, place: tuple[str, ...], tmp_path: Path
) -> None:
    done = qlora_hal("train", *place, "--training.per_device_train_batch_size", "5", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan: 3 steps of 5 sequences, from 12, on cpu_torch; nothing was written")
    assert re.search(r"  total +[\d.]+ [MG]iB   up to", done.stdout)
    assert not (tmp_path / "out").exists()
    told = json.loads(qlora_hal("train", *place, "--dry-run", "--json").stdout)["plan"]
    assert told["memory"]["total"] == sum(
        told["memory"][part]
        for part in (
            *("weights", "adapter", "gradients", "optimizer"),
            *("activations", "logits", "workspace", "runtime"),
        )
    )
    assert told["sequences"] == 12


def test_a_dry_run_says_what_the_run_would_not_use_and_whether_it_fits(
    qlora_hal: CommandLine, place: tuple[str, ...]
) -> None:
    done = qlora_hal(
        *("train", *place, "--dry-run", "true", "--training.per_device_train_batch_size", str(10**9)),
        *("--training.num_train_epochs", "2", "--training.max_steps", "5"),
        *("--data.validation_fraction", "0.2", "--training.eval_steps", "5", "--training.early_stopping_patience", "1"),
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "training.num_train_epochs is not used: training.max_steps says how long the run is" in said
    assert "training.eval_steps is 5, and the run ends with step 5: it is evaluated only before and after" in said
    assert "it cannot stop early" in said
    assert re.search(r"the estimated peak of \d+ TiB is above the [\d.]+ [GT]iB of memory here", said)


def test_an_estimate_refuses_lengths_that_train_refuses(qlora_hal: CommandLine) -> None:
    done = qlora_hal("estimate", "--demo", "--data.max_seq_length", "100000000000")
    assert done.returncode == 2
    assert "QH-D54" in done.stderr


@pytest.mark.long
def test_a_shown_batch_can_be_shown_again_by_its_seed(qlora_hal: CommandLine, place: tuple[str, ...]) -> None:
    first = qlora_hal("train", *place, "--show-batch").stdout
    seed = re.match(r"seed (\d+) was drawn; set training\.seed to get this batch again\n", first)
    assert seed is not None
    again = qlora_hal("train", *place, "--show-batch", "--training.seed", seed[1]).stdout
    assert again.splitlines()[1:] == first.splitlines()[1:]


@pytest.mark.fault("U12")
def test_a_batch_of_no_model_is_refused_and_not_taken_from_the_working_directory(qlora_hal: CommandLine) -> None:
    done = qlora_hal("train", "--show-batch")
    assert done.returncode == 2
    assert "QH-U12]: model.name_or_path, data.path are not set" in done.stderr


@pytest.mark.fault("U15")
def test_calibration_rows_without_a_calibration_are_refused(qlora_hal: CommandLine, place: tuple[str, ...]) -> None:
    done = qlora_hal("train", *place, "--quantization.calibration_rows", "5", "--dry-run")
    assert done.returncode == 2
    assert "QH-U15]: quantization.calibration_rows is set, but nothing is calibrated" in done.stderr


@pytest.mark.fault("U04")
@pytest.mark.parametrize("count", ["0", "-1"])
@pytest.mark.parametrize("verb", [("generate", "--prompt", "ls"), ("chat",)])
def test_an_answer_has_at_least_one_token(qlora_hal: CommandLine, verb: tuple[str, ...], count: str) -> None:
    done = qlora_hal(*verb, "--run", "nowhere", f"--max-new-tokens={count}")
    assert done.returncode == 2
    assert "QH-U04" in done.stderr
    assert "Must be >= 1" in done.stderr


@pytest.mark.fault("B01")
def test_an_estimate_that_no_backend_can_serve_has_the_status_of_its_code(
    qlora_hal: CommandLine, place: tuple[str, ...]
) -> None:
    done = qlora_hal("estimate", *place[:2], "--quantization.weight_format", "nf4", "--quantization.block_size", "96")
    assert done.returncode == 2
    assert "QH-B01" in done.stderr


def test_a_shown_batch_as_json_is_one_object(qlora_hal: CommandLine, place: tuple[str, ...]) -> None:
    shown = json.loads(qlora_hal("train", *place, "--show-batch", "--json", "--training.seed", "3").stdout)
    assert shown["seed"] == 3
    assert len(shown["sequences"]) == 4
    for sample in shown["sequences"]:
        assert len(sample["ids"]) == len(sample["tokens"]) == len(sample["trained"])
        assert {True, False} == set(sample["trained"])


@pytest.mark.long
def test_a_batch_is_shown_where_standard_output_takes_ascii_alone(
    qlora_hal: CommandLine, place: tuple[str, ...], tmp_path: Path
) -> None:
    row = {"messages": [{"role": "user", "content": "caf\u00e9"}, {"role": "assistant", "content": "\U0001f642 yes"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    done = qlora_hal("train", *place, "--show-batch", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "caf\\u00e9" in done.stdout
    assert "\\u27e6\\ud83d\\ude42 yes" in done.stdout
    as_json = qlora_hal("train", *place, "--show-batch", "--json", PYTHONIOENCODING="ascii").stdout
    assert as_json.isascii()
    assert "\ufffd" in json.loads(as_json)["sequences"][0]["tokens"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("text", ["plain", "caf\u00e9", "\U0001f642", "\u27e6a\u27e7", "lone \ud83d", "\u4e2d\u6587"])
def test_any_text_is_printed_in_any_encoding_and_json_keeps_its_values(
    encoding: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    escape_what_streams_cannot_hold()
    print(json.dumps({"text": text}, ensure_ascii=False), flush=True)
    shown = written.getvalue().decode(encoding)
    assert json.loads(shown) == {"text": text}
    if encoding == "utf-8" and text != "lone \ud83d":
        assert text in shown


def test_an_estimate_names_what_the_backend_can_run_on(qlora_hal: CommandLine, place: tuple[str, ...]) -> None:
    def told(backend: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(qlora_hal("estimate", *place[:2], "--backend", backend, "--json").stdout)
        return found

    here = told("cpu_torch")
    assert (here["cards"], here["not_ready"], here["machine"]["fits"]) == ([], "", True)
    for backend, vendor in (("mps_bnb", "Apple"), ("rocm_bnb", "AMD")):
        elsewhere = told(backend)
        assert elsewhere["machine"] is None
        assert elsewhere["cards"]
        assert {card["name"].split()[0] for card in elsewhere["cards"]} == {vendor}
        if elsewhere["not_ready"]:
            text = qlora_hal("estimate", *place[:2], "--backend", backend).stdout
            assert f"on {backend} (not ready here: " in text


def test_a_word_that_belongs_to_no_flag_is_explained(qlora_hal: CommandLine, place: tuple[str, ...]) -> None:
    done = qlora_hal("train", *place, "--data.packing", "maybe")
    assert done.returncode == 2
    assert "boolean flags take true or false" in done.stderr
    assert "--lora_rr is not a flag" in qlora_hal("train", "--lora_rr", "3").stderr
