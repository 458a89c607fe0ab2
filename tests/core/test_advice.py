"""Advice on a run: by the estimate's arithmetic and by rules with sources."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.cli.__main__ import main
from qlora_hal.cli.advise import memory_bytes
from qlora_hal.cli.estimate import estimate_run
from qlora_hal.config.resolve import nest, resolve_settings
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import ConfigError
from qlora_hal.memory.advice import RANKS, Plan, RowFacts, Situation, advise
from qlora_hal.memory.fitting import (
    ACCUMULATION,
    AS_IT_IS,
    BATCH,
    LENGTH,
    RECOMPUTE,
    Needs,
    Remedy,
    Room,
    Step,
    remedy,
    smaller_batches,
)
from qlora_hal.memory.time_prices import PassChoice

GIB = 2**30


def peak(settings: Mapping[str, object]) -> int:
    """A model of 8B: 16 or 5 GiB, and a GiB for each sequence of 768 tokens whose activations are kept."""
    base = 16 if settings.get("quantization.weight_format") == "none" else 5
    kept = {"selective": 0.4, "full": 0.25}.get(str(settings.get(RECOMPUTE)), 1.0)
    moments = 0.5 if settings.get("training.optim") == "adamw_8bit" else 1.0
    tokens = int(str(settings[BATCH])) * int(str(settings.get(LENGTH, 768)))
    return int(GIB * (base - 1 + moments + kept * tokens / 768))


def least_costly(memory: int) -> Callable[[Mapping[str, object]], Remedy]:
    """With all that there is to recompute, and moments in 8 bits."""

    def found(settings: Mapping[str, object]) -> Remedy:
        def changed(changes: Mapping[str, object]) -> dict[str, Any]:
            return {LENGTH: 768, **settings, **changes}

        def price(changes: Mapping[str, object]) -> PassChoice:
            made = changed(changes)
            return PassChoice(made[BATCH] * made[LENGTH], made[RECOMPUTE])

        again = [Step(f"recompute {kind}", {RECOMPUTE: kind}) for kind in ("selective", "full")]
        moments = Step("moments in 8 bits", {"training.optim": "adamw_8bit"}, "moments are rounded")
        choices = (tuple(smaller_batches(16, 1)), (AS_IT_IS, *again), (AS_IT_IS, moments))
        return remedy(lambda changes: Needs(peak(changed(changes))), price, Room(memory), choices, 768)

    return found


SITUATION = Situation(
    backend="any",
    memory_bytes=80 * GIB,
    parameters=8_000_000_000,
    stored="",
    rows=RowFacts(1000, 200_000, 700),
    positions=4096,
    peak=peak,
    least_costly=least_costly(80 * GIB),
    adapter_parameters=lambda rank: 2_600_000 * rank,
)


def settings_for(memory: float, **changes: object) -> dict[str, object]:
    return plan_for(memory, **changes).settings


def plan_for(memory: float, **changes: object) -> Plan:
    size = int(memory * GIB)
    return advise(replace(SITUATION, memory_bytes=size, least_costly=least_costly(size), **changes))  # type: ignore[arg-type]


def test_a_large_card_trains_lora_and_a_small_one_qlora() -> None:
    assert settings_for(80)["quantization.weight_format"] == "none"
    assert settings_for(20)["quantization.weight_format"] == "none"  # 16 + 4 sequences
    assert settings_for(19.9)["quantization.weight_format"] == "4bit"


@pytest.mark.parametrize(
    ("memory", "size", "recompute", "optimizer"),
    [
        (80, 16, "none", None),
        (13.5, 8, "none", None),
        (7, 2, "none", None),  # a pass of two rows takes less time than one of four, recomputed
        (6, 1, "none", None),
        (5.5, 2, "full", None),
        (5.45, 1, "selective", None),
        (5.25, 1, "full", None),
        (4.75, 1, "full", "adamw_8bit"),
    ],
)
def test_the_least_costly_that_fits_is_taken_and_sixteen_sequences_make_a_step(
    memory: float, size: int, recompute: str, optimizer: str | None
) -> None:
    """Least costly by the prices of `time_prices`, which are those of `auto` and of the estimate."""
    made = settings_for(memory)
    assert (made[BATCH], made[RECOMPUTE], made.get("training.optim")) == (size, recompute, optimizer)
    assert size * int(str(made[ACCUMULATION])) == 16


def test_what_is_given_up_is_said() -> None:
    [batch] = [line for line in plan_for(4.75).advice if line.subject == "batch"]
    assert "gives up: moments are rounded" in batch.why


def test_what_does_not_fit_is_said_with_how_much_is_missing() -> None:
    plan = plan_for(4)
    assert not plan.fits
    assert "768 MiB too much: take a smaller model" in next(line.why for line in plan.advice if line.subject == "batch")
    shorter = plan_for(4.6)
    assert not shorter.fits, "rows stay as long as they are"
    [batch] = [line for line in shorter.advice if line.subject == "batch"]
    assert "rows of up to 256 tokens fit (data.max_seq_length), or take a smaller model" in batch.why


def test_a_quantized_checkpoint_is_used_as_it_is() -> None:
    assert "quantization.weight_format" not in settings_for(80, stored="int4_gptq")


@pytest.mark.parametrize(("trained_tokens", "rank"), [(1000, 16), (10**8, 32), (10**9, 256), (10**12, RANKS[-1])])
def test_the_rank_holds_what_the_rows_say(trained_tokens: int, rank: int) -> None:
    assert settings_for(80, rows=RowFacts(10, trained_tokens, 700))["lora.r"] == rank


def test_rows_that_an_adapter_cannot_hold_are_said() -> None:
    plan = advise(replace(SITUATION, rows=RowFacts(10, 10**12, 700)))
    assert "full tuning may learn more" in next(line.why for line in plan.advice if line.subject == "rank")


def test_the_rate_is_lower_above_twenty_billion_weights() -> None:
    assert settings_for(80)["training.learning_rate"] == 2e-4
    assert settings_for(80, parameters=33_000_000_000)["training.learning_rate"] == 1e-4


def test_rows_are_as_long_as_the_longest_and_no_longer_than_the_model() -> None:
    assert settings_for(80)["data.max_seq_length"] == 768
    assert settings_for(80, rows=RowFacts(10, 10, 9000))["data.max_seq_length"] == 4096
    assert "data.max_seq_length" not in settings_for(80, rows=None)


def test_every_line_has_a_reason_and_a_source() -> None:
    assert all(line.why and line.source for line in advise(SITUATION).advice)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * GIB), ("24 GiB", 24 * GIB), ("80", 80 * GIB), ("512mb", GIB // 2), ("1.5T", 1536 * GIB)],
)
def test_a_memory_is_read_as_cards_are_sold(text: str, size: int) -> None:
    assert memory_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "0GB", "-4GB", "24 GBs", "1e3GB"])
def test_another_text_is_no_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="24GB is expected") as caught:
        memory_bytes(text)
    assert caught.value.code == "QH-U01"


def test_the_command_uses_the_estimates_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", "--model", str(model_path()), "--data", str(data_path("validation")), "--memory", "24GB"]
    assert main([*words, "--backend", "cpu_torch", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    given = {"model.name_or_path": str(model_path()), "backend.name": "cpu_torch"}
    config = resolve_settings(nest({**given, **told["settings"]}), environ={}).config
    assert estimate_run(config).memory.high == told["peak_bytes"]
    assert told["fits"]


def test_what_it_prints_to_paste_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "my rows.jsonl"
    rows.write_text('{"question": "Which?", "answer": "This."}\n')
    data = ["--data", str(rows), "--data.columns", '{"prompt": "question", "completion": "answer"}']
    assert main(["advise", "--model", str(model_path()), *data, "--memory", "8GB", "--backend", "cpu_torch"]) == 0
    command = shlex.split(capsys.readouterr().out.rpartition("qlora-hal ")[2])
    assert main([*command, "--print-config"]) == 0
    assert "command line --lora.r" in capsys.readouterr().out


def test_rows_are_counted_as_far_as_the_model_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(model_path(), tmp_path / "longer")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Say it.", "completion": "word thing " * 1500}) + "\n")
    words = ["advise", "--model", str(model), "--data", str(rows), "--memory", "24GB", "--backend", "cpu_torch"]
    assert main([*words, "--json"]) == 0
    advice = {line["subject"]: line["why"] for line in json.loads(capsys.readouterr().out)["advice"]}
    assert "1 rows has 3007 tokens" in advice["length"]
    assert advice["rank"].startswith("3,002 trained tokens")


@pytest.mark.fault("D54")
def test_a_length_that_the_model_has_no_positions_for_is_not_advised(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", "--model", str(model_path()), "--memory", "24GB", "--data.max_seq_length", "100000"]
    assert main(words) == 2
    assert "error[QH-D54]: data.max_seq_length is 100000" in capsys.readouterr().err


def test_a_length_that_is_given_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", "--model", str(model_path()), "--data", str(data_path("validation")), "--memory", "24GB"]
    assert main([*words, "--data.max_seq_length", "48", "--backend", "cpu_torch", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["data.max_seq_length"] == 48
    given = {"model.name_or_path": str(model_path()), "backend.name": "cpu_torch"}
    config = resolve_settings(nest({**given, **told["settings"]}), environ={}).config
    assert estimate_run(config).memory.high == told["peak_bytes"]


@pytest.mark.parametrize("spreads", [True, False])
def test_devices_that_share_the_base_are_advised_where_they_can(spreads: bool) -> None:
    plan = plan_for(1, spreads=spreads)
    [batch] = [advice for advice in plan.advice if advice.subject == "batch"]
    assert ("--parallel.mode shard" in batch.why) is spreads


def test_a_mixture_is_advised_for_a_small_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    words = ["advise", "--model", str(tmp_path), "--memory", "12GB", "--backend", "cuda_bnb"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["settings"]["training.base_offload"] == ["embeddings", "layers"]
    given = {"model.name_or_path": str(tmp_path), "backend.name": "cuda_bnb"}
    config = resolve_settings(nest({**given, **told["settings"]}), environ={}).config
    assert estimate_run(config).memory.high == told["peak_bytes"] <= 12 * GIB
    assert main(words) == 0
    typed = shlex.split(capsys.readouterr().out.rpartition("qlora-hal ")[2])
    assert main([*typed, "--print-config"]) == 0


QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
