"""The command `estimate`: from config.json alone, for a card, and what fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.cli.__main__ import main
from qlora_hal.cli.estimate import Wanted, estimate_as_json, estimate_run
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from tests.memory.configs import write_config

SHORT = ("--training.per_device_train_batch_size", "1", "--data.max_seq_length", "2048")


@pytest.fixture
def llama_8b(tmp_path: Path) -> str:
    folder = tmp_path / "llama-8b"
    write_config(folder, hidden=4096, inner=14336, layers=32, heads=32, key_heads=8, vocabulary=128256)
    return str(folder)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["estimate", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_config_alone_is_enough_and_is_named(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--model", llama_8b)
    assert (found["read_from"], found["parameters"]) == ("config.json alone", 8_030_261_248)
    assert 0.5 < found["bytes"]["weights"] / found["parameters"] < 0.75


@pytest.mark.parametrize(
    ("card", "backend", "dtype"),
    [
        ("RTX 4090", "cuda_bnb", "bfloat16"),
        ("V100 32GB", "cuda_bnb", "float16"),
        ("MI300X", "rocm_bnb", "bfloat16"),
        ("7900 XTX", "rocm_bnb", "bfloat16"),
    ],
)
def test_a_card_decides_backend_and_dtype(
    card: str, backend: str, dtype: str, llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(capsys, "--model", llama_8b, "--gpu", card)
    assert (found["backend"], found["compute_dtype"], found["machine"]) == (backend, dtype, None)
    assert len(found["cards"]) == 1


@pytest.mark.parametrize(
    ("dtype", "card", "lacks"),
    [
        ("fp8", "A100 80GB", "compute capability 8.0, and E4M3 came with 8.9 (Ada, Hopper)"),
        ("fp8", "RTX 3090", "compute capability 8.6, and E4M3 came with 8.9 (Ada, Hopper)"),
        ("bfloat16", "V100 32GB", "compute capability 7.0, and bfloat16 came with 8.0 (Ampere)"),
        ("bfloat16", "T4", "compute capability 7.5, and bfloat16 came with 8.0 (Ampere)"),
    ],
)
def test_a_card_that_does_not_compute_in_the_dtype_fits_nothing(
    dtype: str, card: str, lacks: str, llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it is told instead is a dtype that it has."""
    asked = ("--model", llama_8b, "--gpu", card, "--quantization.compute_dtype", dtype)
    found = told(capsys, *asked, "--fit")
    [here] = found["cards"]
    assert (here["fits"], here["class"], here["lacks"], found["fit"]) == (False, "no dtype", lacks, [])
    assert found["advice"]["settings"]["quantization.compute_dtype"] == "auto"
    typed = [word for path, value in found["advice"]["settings"].items() for word in _typed(path, value)]
    again = told(capsys, "--model", llama_8b, "--gpu", card, *typed)
    assert (again["cards"][0]["class"], again["high"]) == ("fits", found["advice"]["high"])
    assert main(["estimate", *asked, "--fit"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"no {dtype}:" in said
    assert f"nothing: it is of {lacks}" in said


def test_cards_that_have_the_dtype_are_judged_by_their_memory(
    llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One judgement for the list, the table and the card that is named."""
    in_fp8 = ("--model", llama_8b, *SHORT, "--quantization.compute_dtype", "fp8")
    found = told(capsys, *in_fp8, "--cards")
    classes = {card["name"]: card["class"] for card in found["cards"]}
    assert {row["name"]: row["methods"]["4-bit"]["class"] for row in found["table"]} == classes
    for name, expected in (("RTX 4090", "fits"), ("RTX 3090", "no dtype"), ("RTX 4060", "too small")):
        assert told(capsys, *in_fp8, "--gpu", name)["cards"][0]["class"] == classes[f"NVIDIA {name}"] == expected
    assert (found["fp8_products"], found["compute_dtype"]) == (True, "bfloat16")
    assert told(capsys, "--model", llama_8b, *SHORT)["fp8_products"] is False
    assert {card["class"] for card in told(capsys, "--model", llama_8b, *SHORT)["cards"]} == {"fits", "too small"}
    assert main(["estimate", *in_fp8, "--cards"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "products with the base in fp8" in said
    assert "no: it does not compute in the dtype" in said
    assert "4-bit fits with bfloat16 in place of fp8" in said


def test_a_named_backend_that_does_not_run_on_the_card_is_refused(llama_8b: str) -> None:
    config = resolve_settings(None, keywords={"model": llama_8b, "backend": "rocm_bnb"}, environ={}).config
    with pytest.raises(UnsupportedFeatureError, match="does not run on an NVIDIA RTX 4090"):
        estimate_run(config, None, Wanted(gpu="RTX 4090"))


def test_what_fits_is_held_against_the_estimate(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    card = ("--model", llama_8b, "--gpu", "RTX 3060 12GB")
    found = told(capsys, *card, "--fit")
    assert {one["settings"].get("training.recompute") for one in found["fit"]} >= {"selective", "full", "offload"}
    assert any("training.base_offload" in one["settings"] for one in found["fit"])
    for one in (found["fit"][0], found["fit"][-1]):
        words = [word for path, value in one["settings"].items() for word in _typed(path, value)]
        again = told(capsys, *card, *words)
        assert again["high"] == one["high"] <= found["cards"][0]["memory_bytes"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"training.recompute": "none"}, {"training.recompute": None}),
        ({"training.gradient_checkpointing": "true"}, {"training.recompute": None}),
        ({"training.base_offload": "embeddings"}, {"training.base_offload": None}),
        ({"training.optim": "adamw"}, {"training.optim": None}),
        ({"training.per_device_train_batch_size": "3"}, {"training.per_device_train_batch_size": 3}),
        ({"data.max_seq_length": "512"}, {"data.max_seq_length": 512}),
        (
            {"training.tokens_per_batch": "4096"},
            {"training.tokens_per_batch": None, "training.per_device_train_batch_size": None},
        ),
    ],
)
def test_what_is_given_stays_as_it_is(
    given: dict[str, str], kept: dict[str, object], llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """None: nothing is said of it, and so it stays."""
    card = (
        "--model",
        llama_8b,
        "--gpu",
        "RTX 3090",
        *[word for path, value in given.items() for word in _typed(path, value)],
    )
    fits = told(capsys, *card, "--fit")["fit"]
    assert fits
    for one in fits:
        assert {path: one["settings"].get(path) for path in kept} == kept
    words = [word for path, value in fits[0]["settings"].items() if path not in given for word in _typed(path, value)]
    assert told(capsys, *card, *words)["high"] == fits[0]["high"] <= 24 * 2**30


def test_rows_that_are_filled_by_tokens_are_as_many_as_their_length_allows(
    llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that is alone may be longer than two whose tokens are more."""
    by_tokens = ("--model", llama_8b, "--gpu", "RTX 3090", "--training.tokens_per_batch", "8192")
    fits = told(capsys, *by_tokens, "--fit")["fit"]
    kept = [one["settings"] for one in fits if one["settings"]["training.recompute"] == "none"][-1]
    longest = kept["data.max_seq_length"]
    assert 4096 < longest < 8192
    others = [word for path, value in kept.items() if path != "data.max_seq_length" for word in _typed(path, value)]
    peaks = [
        told(capsys, *by_tokens, *others, "--data.max_seq_length", str(longest + more))["high"] for more in (0, 128)
    ]
    assert peaks[0] <= 24 * 2**30 < peaks[1]
    assert told(capsys, *by_tokens, *others, "--data.max_seq_length", "4096")["high"] > 24 * 2**30
    assert main(["estimate", *by_tokens, "--fit"]) == 0
    assert "1 x 8192 " in capsys.readouterr().out


def test_a_small_card_is_advised_the_least_that_makes_it_fit(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    card = ("--model", llama_8b, "--gpu", "RTX 3070", *SHORT)
    advice = told(capsys, *card)["advice"]
    assert advice["settings"] == {"training.recompute": "offload", "training.base_offload": ["embeddings"]}
    assert advice["time"] > 1.2
    assert advice["gives_up"] == []
    for left_out in advice["settings"]:
        rest = {path: value for path, value in advice["settings"].items() if path != left_out}
        typed = [word for path, value in rest.items() for word in _typed(path, value)]
        assert told(capsys, *card, *typed)["high"] > 8 * 2**30
    assert main(["estimate", *card]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "GiB of the host's memory; 0.77 of the tokens/s, by an H200's" in said


def test_layers_on_the_disk_are_told_beside_what_they_cost(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    card = ("--model", llama_8b, "--gpu", "RTX 3070", "--backend.options.offloaded_layers", "disk", *SHORT)
    on_disk = ("--training.base_offload", "embeddings,layers")
    host = told(capsys, *card, *on_disk)["host"]
    assert host["disk_bytes"] > 3 * 2**30 > host["bytes"]
    assert main(["estimate", *card, *on_disk]) == 0
    assert "of the host's memory and 3.35 GiB of its disk, priced at 3 GiB/s" in " ".join(
        capsys.readouterr().out.split()
    )
    small = ("--model", llama_8b, "--gpu", "RTX 3050 6GB", "--backend.options.offloaded_layers", "disk", *SHORT)
    fits = told(capsys, *small, "--fit")["fit"]
    assert all(one["disk_bytes"] > 3 * 2**30 for one in fits)
    assert main(["estimate", *small, "--fit"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "disk: 3.35 GiB)" in said
    assert "by an H200's figures and a disk of 3 GiB/s" in said


def test_nothing_is_moved_to_the_host_where_the_device_has_no_other_memory(
    llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = told(capsys, "--model", llama_8b, "--cards", *SHORT)["table"]
    macs = [row for row in rows if row["name"].startswith("Apple") and row["advice"] is not None]
    assert macs
    for row in macs:
        assert "training.base_offload" not in row["advice"]["settings"]
        assert row["advice"]["settings"].get("training.recompute") != "offload"
    offloaded = ("--training.recompute", "offload", "--training.base_offload", "embeddings,layers,head")
    here = ("--model", llama_8b, "--backend", "cpu_torch", *SHORT)
    assert told(capsys, *here, *offloaded)["high"] == told(capsys, *here, "--training.recompute", "full")["high"]


def test_of_a_mixture_the_adapters_of_experts_are_what_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    card = ("--model", str(tmp_path), "--gpu", "RTX 4090", *SHORT)
    found = told(capsys, *card)
    advice = found["advice"]
    assert advice["fits"]
    assert advice["settings"]["lora.experts"] == "none"
    assert advice["gives_up"] == ["the experts stay as they are: 192 modules are trained"]
    assert "training.base_offload" not in advice["settings"]
    typed = [word for path, value in advice["settings"].items() for word in _typed(path, value)]
    assert told(capsys, *card, *typed)["high"] == advice["high"]
    assert told(capsys, *card, "--lora.experts", "none")["high"] < found["high"] - 12 * 2**30


def test_a_mixture_fits_a_small_card_with_its_experts_on_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    card = ("--model", str(tmp_path), "--gpu", "RTX 3060 12GB", "--data.max_seq_length", "512")
    advice = told(capsys, *card)["advice"]
    assert advice["fits"]
    assert advice["settings"] == {"training.base_offload": ["embeddings", "layers"], "lora.experts": "none"}
    typed = [word for path, value in advice["settings"].items() for word in _typed(path, value)]
    assert told(capsys, *card, *typed)["high"] == advice["high"]
    whole, moved = (
        told(capsys, *card, "--lora.experts", "none", "--training.base_offload", parts)["bytes"]["weights"]
        for parts in ("embeddings", "embeddings,layers")
    )
    of_48 = 48 / 46 * (whole - moved)  # packed layers, of which two stay
    assert of_48 == pytest.approx(29.9e9 * 0.516, rel=0.01)
    left = told(capsys, *card, "--lora.experts", "none", "--training.base_offload", "auto")
    assert left["advice"] is None


def test_devices_share_a_mixture_that_none_can_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    card = ("--model", str(tmp_path), "--gpu", "RTX 4070 Ti SUPER", *SHORT, "--lora.experts", "none")
    alone, two = told(capsys, *card), told(capsys, *card, "--devices", "2")
    assert (alone["cards"][0]["class"], two["plan"]["mode"]) == ("too small", "shard")
    packed = 29.9e9 * 0.516
    assert alone["bytes"]["weights"] - two["bytes"]["weights"] == pytest.approx(packed * (1 / 2 - 2 / 48), rel=0.01)


QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def test_advice_makes_it_fit(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--model", llama_8b, "--gpu", "RTX 3060 12GB")
    assert found["cards"][0]["class"] == "too small"
    assert found["advice"]["fits"]
    assert found["advice"]["high"] <= found["cards"][0]["memory_bytes"]


@pytest.mark.parametrize("asked", [("--training.recompute", "none"), ("--training.gradient_checkpointing", "true"), ()])
@pytest.mark.parametrize("limit", ["11GB", "5GB"])
def test_advice_is_what_makes_it_fit_when_it_is_typed(
    limit: str, asked: tuple[str, ...], llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever was said of recomputation before."""
    settings = ("--model", llama_8b, "--gpu", "RTX 3060 12GB", "--data.max_seq_length", "4096")
    advice = told(capsys, *settings, *asked, "--training.memory_limit", limit)["advice"]
    typed = [word for path, value in advice["settings"].items() if value is not None for word in _typed(path, value)]
    capsys.readouterr()
    others = asked if "--training.recompute" not in typed else ()
    again = told(capsys, *settings, *others, *typed)
    assert advice["fits"]
    assert again["high"] == advice["high"] <= int(limit.removesuffix("GB")) * 2**30


def _typed(path: str, value: object) -> tuple[str, str]:
    return f"--{path}", ",".join(value) if isinstance(value, list) else str(value)


def test_what_is_left_to_the_estimate_is_what_fits_the_card(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ("--training.recompute", "auto", "--training.base_offload", "auto")
    for card, choice in (("H200", "recompute none"), ("RTX 3060 12GB", "recompute offload")):
        assert main(["estimate", "--model", llama_8b, "--gpu", card, "--data.max_seq_length", "4096", *auto]) == 0
        assert f"{choice}: an estimated peak of" in capsys.readouterr().out


AUTO = ("--training.recompute", "auto", "--training.base_offload", "auto")


def test_what_is_left_to_the_card_is_judged_card_by_card(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    of_all = told(capsys, "--model", llama_8b, "--data.max_seq_length", "2048", *AUTO)["cards"]
    classes = {card["name"]: card["class"] for card in of_all}
    for name in ("NVIDIA RTX 3070", "NVIDIA RTX 4080", "NVIDIA V100 16 GB", "NVIDIA H200"):
        [alone] = told(capsys, "--model", llama_8b, "--data.max_seq_length", "2048", "--gpu", name, *AUTO)["cards"]
        assert classes[name] == alone["class"] == "fits"
    rows = told(capsys, "--model", llama_8b, "--data.max_seq_length", "2048", "--cards", *AUTO)["table"]
    assert {row["name"]: row["methods"]["4-bit"]["class"] for row in rows}["NVIDIA RTX 3070"] == "fits"


def test_devices_that_share_the_base_are_advised_for_their_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path / "32b", hidden=5120, inner=27648, layers=64, heads=40, key_heads=8, vocabulary=152064)
    settings = ("--model", str(tmp_path / "32b"), "--gpu", "RTX 4090", "--devices", "4", "--parallel.mode", "shard")
    advice = told(capsys, *settings)["advice"]
    assert "layers" not in advice["settings"].get("training.base_offload", ())
    typed = [word for path, value in advice["settings"].items() for word in _typed(path, value)]
    again = told(capsys, *settings, *typed)
    assert again["high"] == advice["high"] <= 24 * 2**30
    assert main(["estimate", *settings[:3], "RTX 3060 12GB", *settings[4:], *AUTO]) == 0
    assert "embeddings and head of the base on the host" in capsys.readouterr().out


def test_a_table_that_config_json_does_not_call_tied_is_one_table_where_no_head_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma ties by a default of its own."""
    folder = tmp_path / "gemma"
    config = write_config(folder, hidden=2048, inner=16384, layers=18, heads=8, key_heads=1, vocabulary=256000)
    told_of = []
    for tied in ({"tie_word_embeddings": True}, {}):
        gemma = {**config, "model_type": "gemma", "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", **tied}
        if not tied:
            del gemma["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(gemma))
        offloaded = told(capsys, "--model", str(folder), "--gpu", "4090", "--training.base_offload", "embeddings,head")
        told_of.append(offloaded["bytes"]["weights"])
    assert told_of[0] == told_of[1] > 0


def test_recompute_none_is_a_choice_and_not_its_absence(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    for choice in ("none", "selective"):
        both = ("--training.gradient_checkpointing", "true", "--training.recompute", choice)
        assert main(["estimate", "--model", llama_8b, *both]) == 2
        assert "contradict each other" in capsys.readouterr().err


def test_advice_keeps_to_a_global_batch_size(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten rows are halved to five and three, and micro-batches of three do not make up ten."""
    three = told(capsys, "--model", llama_8b, "--training.per_device_train_batch_size", "3")["high"]
    limit = ("--training.memory_limit", f"{three / 2**20 + 1:.3f}MB")
    settings = ("--model", llama_8b, *limit, "--training.global_batch_size", "10")
    advice = told(capsys, *settings, "--training.per_device_train_batch_size", "10")["advice"]
    assert advice["settings"] == {"training.per_device_train_batch_size": 2}
    assert told(capsys, *settings, "--training.per_device_train_batch_size", "2")["high"] == advice["high"]


def test_ranks_of_this_machine_share_its_memory(
    llama_8b: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_hal.detect.hardware.memory_here", lambda: 30 * 2**30)
    monkeypatch.setattr("qlora_hal.run.planned_memory.device_memory", lambda *given: 30 * 2**30)
    settings = ("--model", llama_8b, "--backend", "cpu_torch", "--data.max_seq_length", "128")
    [alone, both] = (told(capsys, *settings, "--devices", number) for number in ("1", "2"))
    assert alone["high"] < 30 * 2**30 < 2 * both["high"]
    assert "advice" not in alone or alone["advice"] is None
    assert both["advice"]["high"] <= 15 * 2**30
    assert both["advice"]["fits"]
    chosen = told(capsys, *settings, "--devices", "2", "--training.recompute", "auto")
    assert 2 * chosen["high"] <= 30 * 2**30


def test_a_named_backend_is_not_estimated_with_what_it_refuses(llama_8b: str) -> None:
    keywords = {"model": llama_8b, "backend": "mlx_lora", "training.base_offload": ["embeddings"]}
    config = resolve_settings(None, keywords=keywords, environ={}).config
    with pytest.raises(UnsupportedFeatureError) as refused:
        estimate_run(config)
    assert refused.value.code == "QH-B01"


def test_micro_batches_by_tokens_have_no_more_rows_than_a_step(
    llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    step = ("--model", llama_8b, "--data.max_seq_length", "1024", "--training.per_device_train_batch_size", "2")
    assert told(capsys, *step, "--training.tokens_per_batch", "8192")["high"] == told(capsys, *step)["high"]


def test_advice_with_tokens_per_batch_cuts_tokens(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--model", llama_8b, "--training.memory_limit", "19GB", "--training.tokens_per_batch")
    advice = told(capsys, *settings, "10240")["advice"]
    assert advice["settings"] == {"training.tokens_per_batch": 2048}
    assert told(capsys, *settings, "2048")["high"] == advice["high"]


def test_the_table_has_all_cards_and_methods_in_order(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in told(capsys, "--model", llama_8b, "--cards", *SHORT)["table"]}
    assert len(rows) > 40
    order = ["too small", "tight", "fits"]
    for row in rows.values():
        classes = [row["methods"][name]["class"] for name in ("full", "LoRA", "8-bit", "4-bit")]
        assert classes == sorted(classes, key=order.index), "less memory never fits worse"
        assert (row["advice"] is None) == (classes[-1] == "fits")
        totals = row["methods"]
        # 16 bytes a weight, and the activations.
        assert totals["full"]["total"] > 16 * 8_030_261_248
    assert rows["NVIDIA V100 32 GB"]["compute_dtype"] == "float16"
    assert rows["AMD Instinct MI250X"]["devices"] == 2
    assert rows["NVIDIA H200"]["methods"]["LoRA"]["class"] == "fits"


def test_keys_and_values_stand_beside_the_weights(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--model", llama_8b, "--gpu", "H100", "--inference", *SHORT)["inference"]
    assert found["bytes"]["kv_cache"] == 131_072 * 2048
    assert found["total"] == sum(found["bytes"].values())


def test_a_cap_is_what_the_run_has_to_fit_into(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", llama_8b, "--gpu", "H100", "--training.memory_limit", "10GB")
    found = told(capsys, *words, "--fit")
    assert found["memory_limit"] == {"memory_bytes": 10 * 2**30, "class": "too small"}
    assert all(one["high"] <= 10 * 2**30 for one in found["fit"])
    assert found["advice"]["fits"]


@pytest.mark.parametrize("arguments", [("--gpu", "RTX 3060 12GB", "--fit", "--inference"), ("--cards",), ()])
def test_the_text_fits_a_terminal(
    arguments: tuple[str, ...], llama_8b: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(llama_8b).parent)
    assert main(["estimate", "--model", "llama-8b", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)


@pytest.mark.fault("U82")
def test_fit_needs_a_memory(llama_8b: str) -> None:
    config = resolve_settings(None, keywords={"model": llama_8b, "backend": "rocm_bnb"}, environ={}).config
    with pytest.raises(ConfigError, match="--fit needs to know the memory") as refused:
        estimate_run(config, None, Wanted(fit=True))
    assert refused.value.code == "QH-U82"


@pytest.mark.fault("U83")
@pytest.mark.parametrize(("backend", "gpu"), [("auto", "RTX 4090"), ("rocm_bnb", None)])
def test_a_device_that_is_not_here_is_not_measured(backend: str, gpu: str | None, llama_8b: str) -> None:
    config = resolve_settings(None, keywords={"model": llama_8b, "backend": backend}, environ={}).config
    with pytest.raises(ConfigError, match="measures on a device of this machine") as refused:
        estimate_run(config, None, Wanted(gpu=gpu, probe=True))
    assert refused.value.code == "QH-U83"


@pytest.mark.long
def test_the_first_that_fits_is_measured_where_the_probe_is_asked_for(tmp_path: Path) -> None:
    write_config(tmp_path, hidden=64, inner=128, layers=3, heads=4, key_heads=2, vocabulary=512)
    keywords = {"model": str(tmp_path), "backend": "cpu_torch", "data.max_seq_length": 64, "training.recompute": "none"}
    limit = {"training.memory_limit": "700MB"}
    config = resolve_settings(None, keywords={**keywords, **limit}, environ={}).config
    given = frozenset({"data.max_seq_length", "training.recompute"})
    found = estimate_run(config, None, Wanted(probe=True, fit=True, given=given))
    by_arithmetic = estimate_run(config, None, Wanted(fit=True, given=given))
    assert found.fits_of
    assert by_arithmetic.fits_of
    first, foreseen = found.fits_of[0], by_arithmetic.fits_of[0]
    assert (first.is_measured, foreseen.is_measured) == (True, False)
    assert first.high <= 700 * 2**20
    assert first.rows != foreseen.rows
    assert found.probe is not None
    assert abs(found.high_of(found.memory) - found.probe.high) <= 1


@pytest.mark.slow
def test_the_probe_stands_beside_the_arithmetic(tmp_path: Path) -> None:
    write_config(tmp_path, hidden=64, inner=128, layers=3, heads=4, key_heads=2, vocabulary=512)
    keywords = {"model": str(tmp_path), "backend": "cpu_torch", "data.max_seq_length": 64}
    found = estimate_run(resolve_settings(None, keywords=keywords, environ={}).config, None, Wanted(probe=True))
    told = estimate_as_json(found)
    assert found.probe is not None
    assert found.high == found.probe.high != found.memory.high
    assert told["probe"]["total"] == found.probe.total  # type: ignore[index]
    assert told["total"] == found.memory.total


def test_experts_in_mxfp4_are_planned_for_the_host_and_for_several_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """gpt-oss-120b, which no card of 24 GB holds."""
    config = {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
        "num_experts_per_tok": 4, "vocab_size": 201088, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = ("--model", str(tmp_path), "--gpu", "RTX 4090", "--data.max_seq_length", "512", "--lora.experts", "none")
    advice = told(capsys, *card)["advice"]
    assert advice["fits"]
    assert "layers" in advice["settings"]["training.base_offload"]
    alone, four = told(capsys, *card), told(capsys, *card, "--devices", "4")
    assert four["plan"]["mode"] == "shard"
    in_layers = (alone["bytes"]["weights"] - four["bytes"]["weights"]) / (1 - 1 / 4 - 2 / 36)
    experts = 36 * 128 * 3 * 2880**2 * 4.25 / 8
    attention = 36 * 2 * 2880 * 64 * (64 + 8) * 2
    assert in_layers == pytest.approx(experts + attention, rel=0.01)


@pytest.mark.parametrize(("card", "is_advised"), [("RTX 3060 8GB", True), ("Apple 8GB", False)])
def test_to_share_the_base_is_advised_where_the_backend_can(
    card: str, is_advised: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path / "405b", hidden=16384, inner=53248, layers=126, heads=128, key_heads=8, vocabulary=128256)
    settings = ["--model", str(tmp_path / "405b"), "--gpu", card]
    assert main(["estimate", *settings]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "No setting makes it fit" in words
    assert ("--devices N --parallel.mode shard" in words) is is_advised
    assert (main(["estimate", *settings, "--devices", "8", "--parallel.mode", "shard"]) == 0) is is_advised


def test_micro_batches_that_are_advised_can_be_dealt_out_to_all_devices(
    llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a step of 24 rows each of two devices has 12; 24 and 8 do not divide them."""
    step = ("--model", llama_8b, "--gpu", "RTX 4090", "--devices", "2", "--training.global_batch_size", "24")
    batch = "training.per_device_train_batch_size"
    fitting = told(capsys, *step, "--fit")["fit"]
    assert max(one["settings"][batch] for one in fitting) == 12
    two_rows = told(capsys, "--model", llama_8b, "--gpu", "RTX 4090", f"--{batch}", "2")["high"]
    limit = ("--training.memory_limit", f"{two_rows / 2**20 + 1:.3f}MB")
    advice = told(capsys, *step[:-1], "6", f"--{batch}", "3", *limit)["advice"]
    assert advice["settings"][batch] != 2  # of a step of six rows, each device has three


def test_advice_for_a_base_that_is_spread_says_so(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Left to `auto`, the smaller micro-batches that are advised would have each device hold the whole base again."""
    card = ("--model", llama_8b, "--gpu", "RTX 3060 12 GB", "--devices", "2", "--training.global_batch_size", "16")
    found = told(capsys, *card, "--training.tokens_per_batch", "8192")
    assert found["plan"]["mode"] == "shard"
    assert found["advice"]["fits"]
    assert found["advice"]["settings"]["parallel.mode"] == "shard"
    words = [f"--{path} {value}" for path, value in found["advice"]["settings"].items()]
    again = told(capsys, *card, *" ".join(words).split())
    assert (again["plan"]["mode"], again["high"]) == ("shard", found["advice"]["high"])
