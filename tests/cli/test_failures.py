"""How a failure looks on the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qlora_hal.cli.__main__ import main
from qlora_hal.cli.conformance import conformance
from qlora_hal.cli.failures import report_interrupt, reported
from qlora_hal.errors import ConfigError, ModelError
from qlora_hal.files.strict_json import MAX_JSON_BYTES
from qlora_hal.processes.signals import EndedAtOnce
from qlora_hal.run.finish import reported_when_finished


@pytest.mark.parametrize(("code", "is_known"), [("QH-D05", True), ("QH-TOY1", False)])
def test_only_codes_of_the_catalogue_can_be_explained(
    capsys: pytest.CaptureFixture[str], code: str, is_known: bool
) -> None:
    assert reported(ModelError(code, "Something is wrong.", fix="Mend it."), as_json=False) == 5
    shown = capsys.readouterr().err
    assert f"error[{code}]: Something is wrong." in shown
    assert (f"qlora-hal explain {code}" in shown) is is_known


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such device")
def test_a_certificate_is_read_to_its_limit_and_from_files_alone(tmp_path: Path) -> None:
    large = tmp_path / "certificate.json"
    with large.open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    for path, reason in ((large, "it has more than"), (Path("/dev/zero"), "not a regular file"), (tmp_path, "")):
        with pytest.raises(ConfigError, match=f"QH-B51.*is no certificate: {reason}"):
            conformance(verify=path)


CERTIFICATE = Path(__file__).resolve().parents[2] / "docs" / "certificates" / "cpu_torch.json"


@pytest.mark.fault("U54")
@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--verify c.json --for run.yaml", "--for has no meaning beside --verify"),
        ("--verify c.json --certificate d.json", "--certificate has no meaning beside --verify"),
        ("--verify c.json --out there", "--out has"),
        ("--verify c.json --seed 0", "--seed has"),
        ("--verify c.json --timeout 5", "--timeout has"),
        ("--verify c.json --waivers w.toml", "--waivers has"),
        ("--verify c.json --trainer a:B", "--trainer has"),
        ("--verify c.json --spec a:B", "--spec has"),
        ("--verify c.json --lanes 2", "--lanes has"),
        ("--verify c.json --section 30 --level L1 --keyword x", "--keyword, --section, --level have no meaning"),
        ("--for run.yaml --section 30", "--section has no meaning beside --for"),
        ("--for run.yaml --level L1", "--level has no meaning beside --for"),
        ("--for run.yaml --waivers w.toml", "--waivers has no meaning beside --for"),
        ("--certificate c.json", "--certificate has no meaning without --for"),
        ("cpu_torch --certificate c.json", "--certificate has no meaning without --for"),
    ],
)
def test_no_option_of_conformance_is_ignored(typed: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", *typed.split()]) == 2
    said = capsys.readouterr().err
    assert "QH-U54" in said
    assert named in said


@pytest.mark.parametrize(("backend", "status"), [("cpu_torch", 0), ("mlx_lora", 20)])
def test_a_certificate_is_of_the_backend_that_is_named_beside_it(
    backend: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", backend, "--verify", str(CERTIFICATE)]) == status
    assert ("is of the backend cpu_torch, not of mlx_lora" in capsys.readouterr().out) is (status == 20)


def test_a_certificate_is_verified_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--verify", str(CERTIFICATE), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.fault("S21")
def test_a_second_signal_that_comes_while_the_first_is_told_names_what_is_safe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)

    def interrupted(fields: dict[str, object]) -> None:
        raise EndedAtOnce(signal.SIGINT)

    directory = SimpleNamespace(path=tmp_path, content={}, record=interrupted)
    with pytest.raises(EndedAtOnce) as second, reported_when_finished(cast("Any", directory)):
        raise EndedAtOnce(signal.SIGTERM, again=False)
    assert report_interrupt(second.value, as_json=False) == 130
    assert f"step 7 is safe on disk. Resume with: qlora-hal resume {tmp_path}" in capsys.readouterr().err


@pytest.mark.fault("I01")
@pytest.mark.parametrize(
    ("library", "distribution", "text"),
    [
        ("numpy", "numpy", "raise ImportError('its C part was built for another Python')"),
        ("pydantic", "pydantic", "from pydantic_core import no_such_name"),
        ("ruamel", "ruamel.yaml", "import module_that_is_not_there"),
    ],
)
def test_a_broken_library_is_named_with_its_distribution_and_is_no_defect_of_ours(
    library: str, distribution: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text(text)
    (tmp_path / "run.yaml").write_text("lora:\n  r: 4\n")
    done = subprocess.run(
        [sys.executable, "-m", "qlora_hal.cli", "train", "run.yaml", "--print-config"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error[QH-I01]" in done.stderr
    assert "is missing or broken in this installation" in done.stderr
    assert "defect of qlora-hal" not in done.stderr
    if library == "numpy":
        assert f"pip install --force-reinstall {distribution}" in done.stderr
