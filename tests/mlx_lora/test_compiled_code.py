"""MLX loads kernels that it finds in a temporary folder; only this user's own are taken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import sys
if sys.argv[1] == "guarded":
    from qlora_hal_backends.mlx_lora.device import keep_compiled_code_private
    keep_compiled_code_private()
import os
import mlx.core as mx
made = mx.compile(lambda x: mx.sin(x) * 2 + mx.cos(x))(mx.ones(8))
print(os.environ["TMPDIR"], round(made[0].item(), 3))
"""


def run(folder: Path, how: str) -> tuple[Path, str]:
    """(TMPDIR at the end, what was computed) of a process that compiles one function."""
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env={**os.environ, "TMPDIR": str(folder)}
    )
    used, _, value = done.stdout.strip().rpartition(" ")
    return Path(used), value


SINE_AND_COSINE = "2.223"  # 2 sin 1 + cos 1


def libraries(folder: Path) -> list[Path]:
    return sorted((folder / "mlx").glob("*/cpu/lib*.so"))


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A temporary folder in which somebody else put a library of the name that MLX looks for, and what it does."""
    folder, canary = tmp_path / "shared", tmp_path / "canary"
    folder.mkdir()
    run(folder, "as it is")
    (library,) = libraries(folder)
    source = tmp_path / "hostile.cpp"
    source.write_text(
        f'#include <fstream>\n__attribute__((constructor)) static void act() {{ std::ofstream("{canary}") << 1; }}\n'
    )
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    return folder, canary


Taken = Callable[[Path], object]


def opened_to_all(mlx: Path) -> None:
    mlx.chmod(0o777)


def opened_below(mlx: Path) -> None:
    next(mlx.glob("*/cpu")).chmod(0o777)


def a_link(mlx: Path) -> None:
    elsewhere = mlx.with_name("elsewhere")
    mlx.rename(elsewhere)
    mlx.symlink_to(elsewhere)


@pytest.mark.parametrize("taken", [opened_to_all, opened_below, a_link])
def test_a_folder_that_others_can_write_is_not_used(planted: tuple[Path, Path], taken: Taken) -> None:
    folder, canary = planted
    taken(folder / "mlx")
    used, value = run(folder, "guarded")
    assert value == SINE_AND_COSINE
    assert not canary.exists()
    assert used.parent == folder
    assert not used.exists()  # it went with its process
    # Without the guard the planted library is loaded: the test would see it act.
    with pytest.raises(subprocess.CalledProcessError):
        run(folder, "as it is")
    assert canary.exists()


def test_a_private_folder_is_kept_from_run_to_run(tmp_path: Path) -> None:
    assert run(tmp_path, "guarded") == (tmp_path, SINE_AND_COSINE)
    assert (tmp_path / "mlx").stat().st_mode & 0o777 == 0o700
    (library,) = libraries(tmp_path)
    made = library.stat().st_mtime_ns
    assert run(tmp_path, "guarded") == (tmp_path, SINE_AND_COSINE)
    assert library.stat().st_mtime_ns == made


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_hal_backends.mlx_lora.device import keep_compiled_code_private

    (tmp_path / "mlx").mkdir(mode=0o755)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    keep_compiled_code_private()
    own = Path(os.environ["TMPDIR"])
    assert own != tmp_path
    assert own.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(own)
