"""`--for` of a run on a mixture of experts, and of settings that the suite's own reading of a run leaves out."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conformance.conftest import HERE

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.files import strict_json
from qlora_hal.report.run_file import RunRecord, given_config, write_run_file
from qlora_hal_conformance.catalogue import RUN_SECTIONS_FOLDER
from qlora_hal_conformance.certificate import Document, content_hash
from qlora_hal_conformance.for_run import ForOptions
from qlora_hal_conformance.judged_run import judged_run
from qlora_hal_conformance.subject import Reference
from qlora_hal_conformance_runs.asked_run import asked_run
from qlora_hal_conformance_runs.judging import EIGHT_BIT_FOLDER, judge_run, sections_about, sources_hash
from qlora_hal_conformance_runs.mixture import MOST_CHOSEN, MOST_EXPERTS, Mixture
from qlora_hal_oracle import read_shape
from qlora_hal_oracle.families import MIXTURES, draw_config
from qlora_hal_oracle.random_models import draw_tensors, write_model

REFERENCE = Reference(spec="qlora_hal_conformance.reference_backend:SPEC")
MUTANT = "qlora_hal_conformance.mutants.specs:{}".format
SETTINGS = """
output_dir: {folder}/run
model:
  name_or_path: {folder}/model
quantization:
  compute_dtype: {dtype}
lora:
  r: {rank}
  alpha: 8
  dropout: {dropout}
  experts: {experts}
data:
  path: {folder}/rows.jsonl
  packing: {packing}
  max_seq_length: 32
training:
  {recomputation}
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 0.001
  weight_decay: {decay}
  optim: {optimizer}
"""
Written = Callable[..., Path]
Judged = Callable[..., tuple[int, Document]]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A settings file, with a drawn model of a family whose weights are stored in bfloat16."""

    def write(family: str = "qwen3_moe", keys: dict[str, object] | None = None, **changes: object) -> Path:
        random = np.random.default_rng(3)
        config = {**draw_config(family, random), **(keys or {})}
        shape = read_shape(config)
        write_model(tmp_path / "model", shape, draw_tensors(shape, random), stored_dtype="bfloat16", config=config)
        given = {"dtype": "float32", "dropout": 0, "experts": "all", "packing": "true", "decay": 0, **changes}
        given = {"rank": 4, "optimizer": "adamw", **given}
        given.setdefault("recomputation", "gradient_checkpointing: true")
        path = tmp_path / "run.yaml"
        path.write_text(SETTINGS.format(folder=tmp_path, **given))
        return path

    return write


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Judged:
    """Judge a settings file on a backend, by some cases of the sections about a run as a whole."""
    monkeypatch.setenv("PYTHONPATH", HERE)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.chdir(tmp_path)

    def judge(path: Path, spec: str, *, keyword: str) -> tuple[int, Document]:
        chosen = f"(test_36_mixture or test_35_combination) and ({keyword})"
        given = Reference(spec=spec) if ":" in spec else Reference(backend=spec)
        return judge_run(ForOptions(path, given, keyword=chosen, seed=2, quiet=True))

    return judge


def verdicts(document: Document) -> set[str]:
    cases = document["cases"]
    assert isinstance(cases, list)
    assert cases, "no case was chosen"
    return {str(case["verdict"]) for case in cases}


def names_of_cases(file: Path) -> set[str]:
    """What pytest finds in it: functions that are defined there or imported by name."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    defined = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    imported = [alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    return {name for name in (*defined, *imported) if name.startswith("test_")}


# how a run is read ----------------------------------------------------------------------------------------------------
def test_mixture_is_judged_by_the_section_about_mixtures(written: Written) -> None:
    asked = asked_run(written(), REFERENCE)
    assert asked.mixture is not None
    assert asked.mixture.family == asked.run.combination.family == "qwen3_moe"
    assert "36" in sections_about(asked)
    assert "35" not in sections_about(asked)
    assert asked.judged_in_words("float32")[0].startswith("a drawn mixture of qwen3_moe, routing and experts, their")
    assert not any("layers of qwen3_moe" in line for line in asked.not_judged_in_words())


@pytest.mark.parametrize(
    ("experts", "kinds"),
    [
        ("all", {"mlp.experts.down_proj", "mlp.shared_expert.down_proj", "self_attn.q_proj"}),
        ("shared", {"mlp.shared_expert.down_proj", "self_attn.q_proj"}),
        ("none", {"self_attn.q_proj"}),
    ],
)
def test_target_modules_are_those_that_the_setting_of_experts_leaves(
    experts: str, kinds: set[str], written: Written
) -> None:
    asked = asked_run(written("qwen2_moe", experts=experts), REFERENCE)
    named = {"mlp.experts.down_proj", "mlp.shared_expert.down_proj", "self_attn.q_proj"}
    assert named & set(asked.run.combination.target_kinds) == kinds


def test_drawn_model_routes_as_the_config_of_the_run_says(written: Written) -> None:
    """A key that config.json leaves out is left to the architecture, there as here."""
    normalised = asked_run(written(keys={"norm_topk_prob": False}), REFERENCE).mixture
    assert normalised is not None
    assert normalised.draw(np.random.default_rng(5))["norm_topk_prob"] is False
    silent = Mixture("qwen3_moe", {}, 128, 8)
    assert "norm_topk_prob" not in silent.draw(np.random.default_rng(5))


def test_more_experts_than_drawn_models_have_are_told() -> None:
    [line] = Mixture("qwen3_moe", {}, 128, 8).not_judged_in_words()
    assert line.startswith("128 experts in a layer, 8 of them for each token: the drawn models have at most 8")
    assert Mixture("mixtral", {}, 8, 2).not_judged_in_words() == []


@pytest.mark.parametrize("family", MIXTURES)
def test_drawn_models_have_no_more_experts_than_is_said(family: str) -> None:
    shapes = [read_shape(draw_config(family, np.random.default_rng(seed))) for seed in range(40)]
    mixtures = [shape.mixture for shape in shapes if shape.mixture is not None]
    assert len(mixtures) == len(shapes)
    assert max(mixture.experts for mixture in mixtures) <= MOST_EXPERTS
    assert max(mixture.experts_per_token for mixture in mixtures) <= MOST_CHOSEN


def test_dropout_on_experts_is_refused_as_train_refuses_it(written: Written) -> None:
    with pytest.raises(UnsupportedFeatureError, match="stacks of experts, which have no dropout"):
        asked_run(written(dropout=0.1), REFERENCE)
    assert asked_run(written(dropout=0.1, experts="none"), REFERENCE).run.combination.dropout == 0.1


@pytest.mark.parametrize("recompute", ["full", "selective", "offload", "auto", "none"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_recomputation_is_judged_however_it_is_asked_for(recompute: str, family: str, written: Written) -> None:
    """Of dense models too. What a case cannot ask for is told."""
    path = written(family, recomputation=f"recompute: {recompute}")
    try:
        asked = asked_run(path, Reference(backend="cpu_torch"))
    except UnsupportedFeatureError:
        pytest.fail(f"cpu_torch does not serve recompute {recompute}")
    assert asked.run.combination.gradient_checkpointing is (recompute in ("full", "selective", "offload"))
    told = [line for line in asked.not_judged_in_words() if line.startswith(f"training.recompute {recompute}:")]
    assert bool(told) is (recompute in ("selective", "offload", "auto"))


def test_run_that_began_is_read_with_what_auto_became(written: Written) -> None:
    config = resolve_settings(written("llama", recomputation="recompute: auto")).config
    folder = Path(config.output_dir)
    folder.mkdir()
    resolved = {"backend": "cpu_torch", "compute_dtype": "float32", "recompute": "full", "base_offload": ["embeddings"]}
    write_run_file(folder, RunRecord(given_config(config), {}, resolved=resolved))
    asked = asked_run(folder)
    assert asked.run.combination.gradient_checkpointing is True
    assert judged_run(folder).combination.gradient_checkpointing is False, "the suite's own reading has the file's word"
    assert [line for line in asked.beside if "base_offload" in line] == [
        "training.base_offload embeddings: the base was on the device"
    ]


def test_run_with_8_bit_moments_is_put_to_all_cases_of_its_section() -> None:
    exact, eight_bits = (
        names_of_cases(folder / "test_35_combination.py") for folder in (RUN_SECTIONS_FOLDER, EIGHT_BIT_FOLDER)
    )
    assert exact == eight_bits
    assert len(exact) > 5


def test_mixture_that_is_not_drawn_is_told_as_not_judged(written: Written) -> None:
    path = written()
    config = path.parent / "model" / "config.json"
    content = strict_json.decode_object(config.read_bytes())
    config.write_bytes(strict_json.encode({**content, "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]}))
    asked = asked_run(path, Reference(backend="cpu_torch"))
    assert asked.mixture is None
    assert "35" in sections_about(asked)
    assert "adapters of experts: the drawn mixtures are of mixtral" in asked.not_judged_in_words()[0]


# what is judged -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "keyword", "changes"),
    [
        ("experts_frozen", "low_key", {}),
        ("routing_weights_detached", "low_key", {}),
        ("ties_to_the_higher_index", "long_rows", {}),
        ("idle_expert_decays", "with_tokens_and_nothing_else", {}),
        ("moments_of_idle_experts_decay", "with_tokens_and_nothing_else", {}),
        ("adapter_of_the_wrong_expert", "logits", {}),
        ("experts_in_16_bits", "weights_of_every_expert", {"dtype": "bfloat16"}),
        ("routing_weights_always_normalised", "logits", {"keys": {"norm_topk_prob": False}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_mixture_is_found_by_the_run_that_uses_it(
    mutant: str, keyword: str, changes: dict[str, object], written: Written, judged: Judged
) -> None:
    path = written(**changes)
    assert verdicts(judged(path, MUTANT(mutant), keyword=keyword)[1]) == {"failed"}
    assert verdicts(judged(path, REFERENCE.spec, keyword=keyword)[1]) == {"passed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({}, "failed"), ({"packing": "false"}, "passed"), ({"recomputation": "recompute: none"}, "passed")],
    ids=["all_together", "without_packing", "without_recomputation"],
)
def test_what_is_wrong_only_together_is_found_in_a_mixture_too(
    changes: dict[str, object], verdict: str, written: Written, judged: Judged
) -> None:
    path = written(dropout=0.2, experts="none", **changes)
    assert verdicts(judged(path, "odd_backends:TOGETHER", keyword="low_key")[1]) == {verdict}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gradients_of_a_run_with_8_bit_moments_are_not_read_from_rounded_ones(
    family: str, written: Written, judged: Judged
) -> None:
    """A rank whose tensors have more than 4096 numbers, of which bitsandbytes keeps moments in 8 bits."""
    path = written(family, rank=64, optimizer="adamw_8bit")
    assert verdicts(judged(path, "cpu_torch", keyword="low_key or base_is_the_same or nothing_else")[1]) == {"passed"}


@pytest.mark.slow
def test_result_names_the_sources_that_judged_it_beside_those_of_the_suite(
    written: Written, judged: Judged, tmp_path: Path
) -> None:
    judged(written(), REFERENCE.spec, keyword="weights_of_every_expert")
    kept = strict_json.decode_object((tmp_path / "run" / "conformance.json").read_bytes())
    assert kept["sha256"] == content_hash(kept)
    assert kept["sources_for_a_run"] == sources_hash()
    run = kept["run"]
    assert isinstance(run, dict)
    assert run["mixture"]["family"] == "qwen3_moe"
    assert "drawn mixture of qwen3_moe" in (tmp_path / "run" / "conformance.html").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", MIXTURES)
def test_honest_backend_is_right_for_a_run_on_each_mixture(
    family: str, dtype: str, written: Written, judged: Judged
) -> None:
    _, document = judged(written(family, dtype=dtype), REFERENCE.spec, keyword="test")
    assert verdicts(document) == {"passed"}
    cases = document["cases"]
    assert isinstance(cases, list)
    assert {name for case in cases for name in case["ran"]} == {
        f"nf4/64+double_quant in {dtype} of {family}",
    }
