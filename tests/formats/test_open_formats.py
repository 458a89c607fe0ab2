"""A format of another distribution: found, judged, trained on; one that is wrong is named, and the others go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from installed_plugins import GOOD, describe, install, install_example
from small_runs import SMALL, merged

from qlora_hal.errors import BackendContractError
from qlora_hal.formats.catalogue import find_record, names, record_of, third_parties

EXAMPLE = (
    Path(__file__).resolve().parent.parent.parent / "examples" / "format_plugin" / "qlora_hal_int4_rowwise.py"
).read_text(encoding="utf-8")


def python(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh process with the folder on its path."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *(("-c", program) if program else ()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on this process's path, whose formats are looked for anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    third_parties.cache_clear()
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]
    third_parties.cache_clear()


# the example ----------------------------------------------------------------------------------------------------------
def test_the_example_is_at_most_four_files() -> None:
    folder = Path(__file__).resolve().parent.parent.parent / "examples" / "format_plugin"
    assert len([path for path in folder.iterdir() if path.is_file()]) <= 4


@pytest.mark.long
def test_the_suite_judges_a_backend_by_the_codec_of_its_own_format(tmp_path: Path) -> None:
    install_example(tmp_path, "format_plugin")
    ran = python(
        tmp_path, "", "-m", "qlora_hal_conformance", "--backend", "rowwise_numpy", "--section", "20",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    results = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    judged = {case["case"]: case for case in results["cases"]}
    assert {case["verdict"] for case in judged.values()} <= {"passed", "refused"}, ran.stdout
    own = judged["20_quantization/format_of_another_distribution_is_its_codec"]
    assert own["ran"] == ["int4_rowwise in float32"]
    assert len(own["measures"]) == 28  # seven linear layers in two blocks, quantized here and stored already


@pytest.mark.slow
def test_the_suite_catches_a_backend_that_decodes_it_wrongly(tmp_path: Path) -> None:
    """Each row with the scale of the row before it."""
    install_example(tmp_path, "format_plugin")
    backend = tmp_path / "qlora_hal_rowwise_numpy.py"
    source = backend.read_text(encoding="utf-8").replace(
        "ReferenceTrainer(spec=SPEC)",
        "ReferenceTrainer(replace(HONEST, unpack=lambda stored: np.roll(unpack(stored), 1, axis=0)), SPEC)",
    )
    rooms = "from qlora_hal_conformance.reference_backend.rooms import HONEST\n"
    storage = "from qlora_hal_conformance.reference_backend.storage import unpack\nimport numpy as np\n\n\ndef probe"
    backend.write_text(source.replace("\n\ndef probe", rooms + storage, 1), encoding="utf-8")
    python(
        tmp_path, "", "-m", "qlora_hal_conformance", "--backend", "rowwise_numpy", "-k", "another_distribution",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    ((case,),) = (json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))["cases"],)
    assert case["verdict"] == "failed"


@pytest.mark.long
def test_a_run_trains_on_it(tmp_path: Path) -> None:
    install_example(tmp_path, "format_plugin")
    settings = merged(
        SMALL,
        {
            "output_dir": str(tmp_path / "run"),
            "quantization.weight_format": "int4_rowwise",
            "backend.name": "rowwise_numpy",
            "data.max_seq_length": 48,
            "training.per_device_train_batch_size": 2,
            "training.max_steps": 2,
        },
    )
    program = (
        "import json, sys; from qlora_hal import train; result = train(json.loads(sys.argv[1]));"
        "print(json.dumps([result.weight_format, result.steps, result.tokens]))"
    )
    ran = python(tmp_path, program, json.dumps(settings))
    assert ran.returncode == 0, ran.stderr
    weight_format, steps, tokens = json.loads(ran.stdout.splitlines()[-1])
    assert (weight_format, steps) == ("int4_rowwise", 2)
    assert tokens > 0
    record = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert record["resolved"]["weight_format"] == "int4_rowwise"


def test_a_level_and_the_schema_know_it(tmp_path: Path) -> None:
    install_example(tmp_path, "format_plugin")
    program = (
        "from qlora_hal.config.schema import QuantizationConfig, RunConfig\n"
        "from qlora_hal.formats.catalogue import formats_of_level\n"
        "QuantizationConfig(weight_format='int4_rowwise')\n"
        "schema = RunConfig.model_json_schema()['$defs']['QuantizationConfig']['properties']['weight_format']\n"
        "print('int4_rowwise' in schema['enum'], 'int4_rowwise' in formats_of_level('4bit'))"
    )
    assert python(tmp_path, program).stdout.split() == ["True", "True"]


@pytest.mark.fault("E82")
def test_a_backend_whose_format_is_not_installed_is_refused_by_name(tmp_path: Path) -> None:
    source = GOOD.replace("WeightFormat.NONE", 'WeightFormat("int4_rowwise")')
    install(tmp_path, {"lonely": ("lonely", source), "works": ("good", GOOD)})
    program = "from qlora_hal import backends\nfor r in backends(): print(r.backend, r.availability.value, r.reason)"
    said = python(tmp_path, program).stdout
    assert "good ready" in said
    assert "lonely broken" in said
    assert "declares weight formats wrongly: There is no weight format 'int4_rowwise'; known are none, int8" in said


@pytest.mark.fault("E81")
def test_a_backend_that_declares_a_block_size_nobody_has_is_refused(tmp_path: Path) -> None:
    source = GOOD.replace("frozenset())", "frozenset(), {WeightFormat.NF4: (48,)})")
    install(tmp_path, {"odd": ("odd", source)})
    program = (
        "from qlora_hal.detect.discovery import find, listed, load_spec\n"
        "try: load_spec(find('odd', listed()))\nexcept Exception as error: print(error.code, error.message)"
    )
    said = python(tmp_path, program).stdout
    assert said.startswith("QH-E81")
    assert "it declares blocks of 48 for nf4" in said


# wrong ones -----------------------------------------------------------------------------------------------------------
RENAMED = EXAMPLE.replace('NAME = "int4_rowwise"', 'NAME = "OTHER"').replace("NAME", "FORMAT").replace("OTHER", "NAME")
"""The example under the name that `install` puts in."""


@pytest.mark.fault("E80")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ValueError('no such flag')", "cannot be used: ValueError: no such flag"),
        ("raise SystemExit(3)", "cannot be used: SystemExit: 3"),
        ("RECORD = 7", "is a int, not a FormatRecord"),
        (EXAMPLE, "its entry point says wrong, its record says 'int4_rowwise'"),
        (RENAMED.replace("inputs // 2 + 4", "inputs // 2"), "packed_bytes counts 512 bytes for 16 x 64 weights"),
        (RENAMED.replace("bits=4", "bits=3"), "bits is 3, but its codec packs 1024 weights into 512 bytes"),
        (RENAMED.replace("(codes - ZERO)", "codes"), "its codec's weights are outside its own error bound"),
        (RENAMED.replace("return checkpoint.quant_method == FORMAT", "return True"), "takes ordinary weights for its"),
        (RENAMED.replace("2 * octets", "octets"), "its layout reads what its codec stores as wrong with"),
        (RENAMED.replace('level="4bit"', 'level="4 bit"'), "level '4 bit' is none of none, 8bit, 4bit"),
        (RENAMED.replace("bits=4", 'bits="4"'), "bits is a str"),
    ],
)
def test_a_wrong_record_is_refused_by_name_and_the_others_go_on(site: Path, source: str, said: str) -> None:
    formats = {"broken-format": ("wrong", source), "good-format": ("right", RENAMED)}
    install(site, formats, group="qlora_hal.formats", attribute="RECORD")
    with pytest.raises(BackendContractError, match="The weight format wrong of broken-format is refused") as caught:
        find_record("wrong")
    assert caught.value.code == "QH-E80"
    assert said in caught.value.message
    assert "broken-format" in caught.value.fix
    assert record_of("right").bits == 4
    assert record_of("nf4").bits == 4
    assert "wrong" not in names()


def test_a_name_that_two_offer_is_refused_for_both(site: Path) -> None:
    formats = {"first-format": ("twice", RENAMED), "second-format": ("twice", RENAMED)}
    install(site, formats, group="qlora_hal.formats", attribute="RECORD")
    with pytest.raises(BackendContractError, match="first-format and second-format is refused: they offer the same"):
        record_of("twice")


@pytest.mark.parametrize("name", ["nf4", "auto", "4bit"])
def test_a_name_of_ours_stays_ours(site: Path, name: str) -> None:
    install(site, {"taker": (name, RENAMED)}, group="qlora_hal.formats", attribute="RECORD")
    assert "the name is one of qlora-hal's own" in third_parties().refused[name].message
    assert record_of("nf4").block_sizes[0] == 64


def test_a_refused_format_in_the_settings_says_why(tmp_path: Path) -> None:
    source = RENAMED.replace("bits=4", "bits=3")
    install(tmp_path, {"wrong-bits": ("wrong", source)}, group="qlora_hal.formats", attribute="RECORD")
    program = (
        "from qlora_hal import train\n"
        "try: train({'quantization': {'weight_format': 'wrong'}})\n"
        "except Exception as error: print(error.code, error.message)"
    )
    assert python(tmp_path, program).stdout.startswith("QH-E80 The weight format wrong of wrong-bits is refused")


def test_backends_lists_what_is_refused(tmp_path: Path) -> None:
    describe(tmp_path, "absent", {"qlora_hal.formats": {"gone": "no_such_module:RECORD"}})
    said = python(tmp_path, "", "-m", "qlora_hal.cli", "backends").stdout
    assert "The weight format gone of absent is refused" in said
    assert "cpu_torch" in said
