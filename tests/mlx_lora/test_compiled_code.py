"""MLX's CPU library compiles into a temporary folder and loads what it finds there: only what this process made, and
what this user's processes made before, is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import os, sys, time
from contextlib import nullcontext
from pathlib import Path
from qlora_hal_backends.mlx_lora.compiled_code import compiling_in_own_folder
import mlx.core as mx
outside = os.environ.get("TMPDIR")
with compiling_in_own_folder() if "guarded" in sys.argv else nullcontext():
    used = Path(os.environ["TMPDIR"])
    if "leave_half_a_library" in sys.argv:
        (used / "mlx" / mx.__version__ / "cpu" / "libhalf.so").write_bytes(b"ELF")
    if "wait" in sys.argv:
        print("ready", flush=True)
        sys.stdin.readline()
    value = mx.compile(lambda x: mx.sin(x) * 2 + mx.cos(x))(mx.ones(8))[0].item()
    print(used, *(path.stat().st_ino for path in used.glob("mlx/*/cpu/lib*.so")), round(value, 3))
assert os.environ.get("TMPDIR") == outside
if "die" in sys.argv:
    os.kill(os.getpid(), 9)
"""
SINE_AND_COSINE = "2.223"  # 2 sin 1 + cos 1


def start(folder: Path, *how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def ended(process: subprocess.Popen[str]) -> tuple[Path, set[int], str]:
    """(TMPDIR at work, inodes of the libraries there, what was computed)."""
    said, complained = process.communicate("go\n", timeout=600)
    assert process.returncode in (0, -9), complained
    used, *inodes, value = said.splitlines()[-1].split()
    return Path(used), set(map(int, inodes)), value


def run(folder: Path, *how: str) -> tuple[Path, set[int], str]:
    return ended(start(folder, *how))


def shared_libraries(folder: Path) -> list[Path]:
    return sorted((folder / "mlx").glob("*/cpu/lib*.so"))


def kept_libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("qlora_hal-mlx_kept-*/*/*"))


def test_a_library_that_another_process_has_half_written_is_not_loaded(tmp_path: Path) -> None:
    """What two processes that start at once do to one another in MLX's own folder."""
    run(tmp_path, "as it is")
    (library,) = shared_libraries(tmp_path)
    library.write_bytes(library.read_bytes()[:100])
    assert run(tmp_path, "guarded")[2] == SINE_AND_COSINE
    assert "Could not load C++ shared library" in start(tmp_path, "as it is").communicate(timeout=600)[1]


def test_processes_at_once_have_folders_of_their_own_that_go_with_them(tmp_path: Path) -> None:
    both = [start(tmp_path, "guarded", "wait") for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (first, _, one), (second, _, other) = map(ended, both)
    assert first != second
    assert (one, other) == (SINE_AND_COSINE, SINE_AND_COSINE)
    assert not first.exists()
    assert not second.exists()


def test_what_was_compiled_is_kept_for_the_next_process(tmp_path: Path) -> None:
    _, inodes, value = run(tmp_path, "guarded")
    (library,) = kept_libraries(tmp_path)
    assert (inodes, value) == ({library.stat().st_ino}, SINE_AND_COSINE)
    before = library.stat()
    assert run(tmp_path, "guarded")[1:] == ({before.st_ino}, SINE_AND_COSINE)  # the same file: nothing was compiled
    assert library.stat().st_mtime_ns == before.st_mtime_ns
    assert {path.stat().st_mode & 0o077 for path in tmp_path.glob("qlora_hal-mlx_kept-*")} == {0}


def test_what_a_killed_compiler_leaves_is_not_kept(tmp_path: Path) -> None:
    run(tmp_path, "guarded", "leave_half_a_library")
    assert [path.name for path in kept_libraries(tmp_path) if "half" in path.name] == []
    assert len(kept_libraries(tmp_path)) == 1


def test_the_folder_of_a_killed_process_is_removed_by_a_later_one(tmp_path: Path) -> None:
    left, _, _ = run(tmp_path, "guarded", "die")
    assert left.is_dir()
    assert kept_libraries(tmp_path) == []
    os.utime(left, (0, 0))  # as if it were an hour later
    run(tmp_path, "guarded")
    assert not left.exists()


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A temporary folder in which somebody else put a library of the name that MLX looks for, and what it does."""
    folder, canary = tmp_path / "shared", tmp_path / "canary"
    folder.mkdir()
    run(folder, "as it is")
    run(folder, "guarded")
    source = tmp_path / "hostile.cpp"
    source.write_text(
        f'#include <fstream>\n__attribute__((constructor)) static void act() {{ std::ofstream("{canary}") << 1; }}\n'
    )
    hostile = tmp_path / "hostile.so"
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", hostile], check=True)
    for library in (*shared_libraries(folder), *kept_libraries(folder)):
        library.unlink()
        library.write_bytes(hostile.read_bytes())
    return folder, canary


def opened_to_all(kept: Path) -> None:
    kept.chmod(0o777)


def opened_below(kept: Path) -> None:
    next(kept.glob("*")).chmod(0o777)


def a_link(kept: Path) -> None:
    elsewhere = kept.with_name("elsewhere")
    kept.rename(elsewhere)
    kept.symlink_to(elsewhere)


@pytest.mark.parametrize("taken", [opened_to_all, opened_below, a_link])
def test_code_that_others_can_write_is_not_used(planted: tuple[Path, Path], taken: Callable[[Path], object]) -> None:
    folder, canary = planted
    (kept,) = folder.glob("qlora_hal-mlx_kept-*")
    taken(kept)
    assert run(folder, "guarded")[2] == SINE_AND_COSINE
    assert not canary.exists()
    # Without the guard the planted library is loaded: the test would see it act.
    start(folder, "as it is").communicate(timeout=600)
    assert canary.exists()
