"""`--for`: what is judged is what the run computes, and its result lies beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conformance.conftest import HERE, certificate_of, passed, suite

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.files import strict_json
from qlora_hal.report.run_file import RunRecord, given_config, write_run_file
from qlora_hal_conformance.certificate import Document, content_hash, problems, write_certificate
from qlora_hal_conformance.combination import Combination, judged_in_words, not_judged_in_words
from qlora_hal_conformance.for_run import ForOptions
from qlora_hal_conformance.judged_run import judged_run
from qlora_hal_conformance.software import Here, about_this_run, other_versions
from qlora_hal_conformance.subject import Reference
from qlora_hal_conformance.verdicts import CaseResult
from qlora_hal_conformance_runs.judging import judge_run
from qlora_hal_oracle.random_models import SHAPES, draw_tensors, write_model

REFERENCE = Reference(spec="qlora_hal_conformance.reference_backend:SPEC")
SETTINGS = """
output_dir: {folder}/run
model:
  name_or_path: {folder}/model
quantization:
  compute_dtype: {dtype}
lora:
  r: 8
  alpha: 16
  dropout: {dropout}
  use_rslora: true
  target_modules: [q_proj, down_proj]
data:
  path: {folder}/rows.jsonl
  packing: {packing}
  max_seq_length: 96
training:
  gradient_checkpointing: {checkpointing}
  gradient_accumulation_steps: 2
  per_device_train_batch_size: 2
  learning_rate: 0.001
  optim: {optimizer}
"""
ALL_TOGETHER = {"packing": "true", "dropout": 0.2, "checkpointing": "true"}
Written = Callable[..., Path]
Judged = Callable[..., tuple[int, Document]]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A settings file, with a small model whose weights are stored in bfloat16."""
    shape = SHAPES[0]
    write_model(tmp_path / "model", shape, draw_tensors(shape, np.random.default_rng(3)), stored_dtype="bfloat16")

    def write(**changes: object) -> Path:
        given = {"dtype": "float32", "optimizer": "adamw", **ALL_TOGETHER, **changes}
        path = tmp_path / "run.yaml"
        path.write_text(SETTINGS.format(folder=tmp_path, **given))
        return path

    return write


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Judged:
    """Judge a settings file on one of `odd_backends`, by some cases."""
    monkeypatch.setenv("PYTHONPATH", HERE)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.chdir(tmp_path)

    def judge(path: Path, spec: str, *, keyword: str, **options: object) -> tuple[int, Document]:
        reference = Reference(spec=f"odd_backends:{spec}") if spec else REFERENCE
        return judge_run(ForOptions(path, reference, keyword=keyword, seed=2, quiet=True, **options))  # type: ignore[arg-type]

    return judge


def verdicts(document: Mapping[str, object]) -> dict[str, str]:
    cases = document["cases"]
    assert isinstance(cases, list)
    return {case["case"]: case["verdict"] for case in cases}


# what is judged -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "failed"),
        ({"packing": "false"}, "passed"),
        ({"dropout": 0}, "passed"),
        ({"checkpointing": "false"}, "passed"),
    ],
    ids=["all_together", "without_packing", "without_dropout", "without_recomputation"],
)
def test_what_is_wrong_only_together_is_found_where_a_run_has_it_together(
    changes: dict[str, object], verdict: str, written: Written, judged: Judged
) -> None:
    _, document = judged(written(**changes), "TOGETHER", keyword="gradient_that and low_key and not other")
    assert set(verdicts(document).values()) == {verdict}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "verdict"), [("bfloat16", "failed"), ("float32", "passed")])
def test_what_is_wrong_in_one_dtype_is_found_by_the_run_that_computes_in_it(
    dtype: str, verdict: str, written: Written, judged: Judged
) -> None:
    _, document = judged(written(dtype=dtype), "OTHER_STORAGE", keyword="gradient_without_dropout")
    assert set(verdicts(document).values()) == {verdict}


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"packing": "false", "dropout": 0, "checkpointing": "false"}])
def test_honest_backend_is_right_for_a_run(changes: dict[str, object], written: Written, tmp_path: Path) -> None:
    """By every case about it, from the command."""
    ended = suite("--spec", REFERENCE.spec, "--for", str(written(**changes)), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "this run's combination is right here" in ended.stderr
    document = json.loads((tmp_path / "run" / "conformance.json").read_text())
    assert document["holds"] is True
    assert document["run"]["dtype"] == "float32"
    assert set(verdicts(document).values()) == {"passed"}
    judges_masks = any(case.startswith("43_determinism/masks") for case in verdicts(document))
    assert judges_masks is (not changes), "cases about dropout belong to a run that has it"
    page = (tmp_path / "run" / "conformance.html").read_text()
    assert "small drawn models stand for it" in page
    assert str(tmp_path) not in page


def test_combination_is_what_the_settings_come_to(written: Written) -> None:
    run = judged_run(written(), REFERENCE)
    assert run.combination == Combination(
        weight_format="nf4",
        dtype="float32",
        family="llama",
        block_size=64,
        double_quant=True,
        stored_dtype="bfloat16",
        gradient_checkpointing=True,
        packing=True,
        dropout=0.2,
        rank=8,
        alpha=16.0,
        use_rslora=True,
        target_kinds=("down_proj", "q_proj"),
        batch_size=2,
        accumulation=2,
        row_length=96,
        learning_rate=0.001,
    )
    assert run.folder is not None
    assert run.folder.name == "run"
    assert Combination.from_json(json.loads(json.dumps(run.combination.as_json()))) == run.combination


def test_run_with_fp8_products_is_judged_by_the_section_about_them(written: Written, judged: Judged) -> None:
    """The bounds of the other sections know nothing of 8-bit roundings; what is not judged is said."""
    path = written(dtype="fp8", packing="false", dropout=0.0, checkpointing="false")
    combination = judged_run(path, REFERENCE).combination
    assert (combination.dtype, combination.fp8_products) == ("bfloat16", True)
    assert Combination.from_json(combination.as_json()) == combination
    assert any("8-bit floats" in line for line in judged_in_words(combination, "bfloat16"))
    assert any("section 34" in line for line in not_judged_in_words(combination))
    _, document = judged(path, "", keyword="signs or logits")
    found = verdicts(document)
    assert {case.partition("/")[0] for case in found} == {"34_fp8_products"}
    assert set(found.values()) == {"passed"}
    assert len(found) > 1


def test_run_that_the_backend_cannot_do_is_refused_as_train_refuses_it(written: Written) -> None:
    with pytest.raises(UnsupportedFeatureError, match="adamw_8bit"):
        judged_run(written(optimizer="adamw_8bit"), REFERENCE)


@pytest.mark.parametrize(
    ("needs", "is_about_it"),
    [
        ((), True),
        ((Feature.PACKING, Feature.LORA_DROPOUT), True),
        ((Feature.TOKEN_WEIGHTS,), False),
        ((WeightFormat.NF4, "bfloat16"), True),
        ((WeightFormat.NF4, "float32"), False),
        (((WeightFormat.NF4, 64),), True),
        (((WeightFormat.NF4, 128),), False),
        ((WeightFormat.INT8,), False),
    ],
)
def test_case_is_about_a_run_that_uses_all_it_needs(needs: tuple[object, ...], is_about_it: bool) -> None:
    run = Combination("nf4", "bfloat16", block_size=64, packing=True, dropout=0.1)
    assert run.covers(needs, "bfloat16") is is_about_it  # type: ignore[arg-type]


def test_what_was_not_judged_is_said() -> None:
    run = Combination("nf4", "auto", family="olmo2", rank=512, accumulation=32, row_length=4096, optimizer="adamw_8bit")
    said = "\n".join(not_judged_in_words(run))
    for words in ("layers of olmo2", "rank 512", "32 x 4 rows", "641 to 4096 tokens", "8-bit moment", "own weights"):
        assert words in said
    relative = replace(run, family="qwen2")
    assert "qwen2" not in "\n".join(not_judged_in_words(relative))
    assert "a drawn model of qwen2" in judged_in_words(relative, "bfloat16")
    assert "bfloat16 (what auto takes here)" in "\n".join(judged_in_words(run, "bfloat16"))
    assert run.judged_alpha / run.judged_rank == run.alpha / run.rank


# beside the run -------------------------------------------------------------------------------------------------------
def test_folder_of_a_run_is_judged_by_its_record_and_keeps_all_it_has(written: Written, judged: Judged) -> None:
    """`auto` means what it meant when the run began."""
    config = resolve_settings(written(dtype="auto")).config
    folder = Path(config.output_dir)
    folder.mkdir()
    resolved = {"backend": "cpu_torch", "compute_dtype": "bfloat16"}
    write_run_file(folder, RunRecord(given_config(config), {}, resolved=resolved))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, document = judged(folder, "", keyword="weights_are_those")
    assert status == 20, "a run by a keyword says nothing of the whole"
    assert verdicts(document) == {"35_combination/weights_are_those_of_the_format": "passed"}
    run = document["run"]
    assert isinstance(run, dict)
    assert (run["named"], run["dtype"]) == ("run", "bfloat16")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"conformance.json", "conformance.html"}
    assert all(after[path] == content for path, content in before.items())


def test_result_of_a_run_is_no_certificate(written: Written, judged: Judged, tmp_path: Path) -> None:
    _, document = judged(written(), "", keyword="weights_are_those", out=tmp_path / "out")
    kept = strict_json.decode_object((tmp_path / "out" / "conformance.json").read_bytes())
    assert kept["sha256"] == content_hash(kept) == document["sha256"]
    assert any("about one run" in problem for problem in problems(kept))


# certificates ---------------------------------------------------------------------------------------------------------
RUN = Combination("nf4", "float32", block_size=64)


def said_of(document: Document, tmp_path: Path, combination: Combination = RUN, here: Here | None = None) -> str:
    write_certificate(tmp_path / "certificate.json", document)
    asked = here or Here("toy", "a device")
    return "\n".join(about_this_run(tmp_path / "certificate.json", combination, combination.dtype, asked))


def test_certificate_says_in_how_many_cases_it_judged_the_configuration(
    results: list[CaseResult], tmp_path: Path
) -> None:
    said = said_of(certificate_of(results), tmp_path)
    assert "it verifies: conformant" in said
    assert f"it judged nf4/64 in float32 in {len(results)} cases of 10_detection" in said


@pytest.mark.parametrize(
    ("combination", "words"),
    [
        (Combination("nf4", "bfloat16", block_size=64), "it judged nothing in bfloat16; its dtypes are float32"),
        (Combination("nf4", "float32", block_size=128), "it judged nf4/128 in float32 in no case"),
        (
            Combination("nf4", "float32", block_size=64, family="gemma2"),
            "it judged no model of gemma2; its families are llama",
        ),
    ],
    ids=["dtype", "block", "family"],
)
def test_certificate_about_another_configuration_is_told(
    combination: Combination, words: str, results: list[CaseResult], tmp_path: Path
) -> None:
    assert words in said_of(certificate_of(results), tmp_path, combination)


def test_certificate_of_another_backend_or_device_is_told(results: list[CaseResult], tmp_path: Path) -> None:
    document = certificate_of(results)
    assert "it is of toy, and the run is on cpu_torch" in said_of(document, tmp_path, here=Here("cpu_torch"))
    assert "made on a device; this is another" in said_of(document, tmp_path, here=Here("toy", "another"))


def test_edited_certificate_is_told(results: list[CaseResult], tmp_path: Path) -> None:
    said = said_of({**certificate_of(results), "wall_seconds": 2.0}, tmp_path)
    assert said.startswith("it does not verify: the content does not have the hash")


def test_certificate_of_a_filtered_run_is_told(results: list[CaseResult], tmp_path: Path) -> None:
    document: Document = {**certificate_of(results), "filtered": True}
    document["sha256"] = content_hash(document)
    assert "it does not verify: it is of a filtered run" in said_of(document, tmp_path)


def test_certificate_made_with_other_versions_is_told(results: list[CaseResult], tmp_path: Path) -> None:
    document = certificate_of(results)
    document["device"] = {"device": "a device", "versions": {"torch": "1.0", "numpy": np.__version__, "nowhere": "3"}}
    document["sha256"] = content_hash(document)
    here = Here("toy", "a device", {"torch": "2.0"})
    assert "it was made with torch 1.0; here torch is 2.0" in said_of(document, tmp_path, here=here)
    assert other_versions(document, {"torch": "1.0"}) == [], "what is the same, or not here, is no other version"


def test_verify_says_what_a_certificate_judged_and_which_versions_are_others(
    results: list[CaseResult], tmp_path: Path
) -> None:
    document = certificate_of([*results[:-1], passed(results[-1].case)])
    document["device"] = {"device": "a device", "versions": {"numpy": "0.9"}}
    document["sha256"] = content_hash(document)
    write_certificate(tmp_path / "certificate.json", document)
    ended = suite("--verify", "certificate.json", cwd=tmp_path)
    assert ended.returncode == 0
    assert f"float32: {len(results)} cases, in 10_detection" in ended.stdout
    assert f"it was made with numpy 0.9; here numpy is {np.__version__}" in ended.stdout
