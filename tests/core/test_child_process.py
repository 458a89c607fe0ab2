"""No child outlives its parent, however that went; and a scheduler's warning to all processes of a job ends none."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from qlora_hal.processes import child_process
from qlora_hal.processes.subprocess_call import ask

pytestmark = pytest.mark.usefixtures("usual_signals")

ASKING = """
import os, sys
from qlora_hal.processes.subprocess_call import ask
print("parent", flush=True)
ask("sleeping_child", seconds=600)
"""
SLEEPING = """
import os, sys, time
from pathlib import Path
from qlora_hal.processes.subprocess_call import answer_stream
with answer_stream() as stream:
    Path(os.environ["TOLD"]).write_text(str(os.getpid()))
    time.sleep(600)
"""
QUANTIZING = """
import sys, os
from pathlib import Path
from qlora_hal.processes import child_process
child = child_process.start([sys.executable, "-m", "qlora_hal_backends.gptq_int4.quantizing_child", sys.argv[1]])
Path(os.environ["TOLD"]).write_text(str(child.pid))
child.wait()
"""


def is_alive(process: int) -> bool:
    """A zombie that nobody has waited for is not alive."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def awaited(file: Path) -> int:
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
    return int(file.read_text())


def gone(process: int, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(process)


def started(folder: Path, code: str, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """A parent that starts a child; the child's number."""
    (folder / "sleeping_child.py").write_text(SLEEPING)
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "TOLD": str(folder / "told")}
    parent = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, start_new_session=True)
    return parent, awaited(folder / "told")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_that_is_asked_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    parent, child = started(tmp_path, ASKING)
    parent.send_signal(number)
    parent.wait()
    assert gone(child)


def test_a_warning_to_the_whole_job_ends_no_child(tmp_path: Path) -> None:
    """SLURM sends SIGUSR1 to every process of a step; the parent here does not listen, and is not asked."""
    parent, child = started(tmp_path, ASKING)
    os.kill(child, signal.SIGUSR1)
    os.kill(child, 0)
    assert not gone(child, seconds=0.3)
    parent.kill()
    parent.wait()
    assert gone(child)


def test_the_child_that_quantizes_ends_with_its_parent(tmp_path: Path) -> None:
    """The real one, waiting for a job that never comes."""
    os.mkfifo(tmp_path / "job.json")
    parent, child = started(tmp_path, QUANTIZING, str(tmp_path / "job.json"))
    assert is_alive(child)
    parent.kill()
    parent.wait()
    assert gone(child)


def test_the_child_that_opens_pickles_ends_with_its_parent(tmp_path: Path) -> None:
    code = QUANTIZING.replace("gptq_int4.quantizing_child", "unpickling_child").replace(", sys.argv[1]", "")
    parent, child = started(tmp_path, code)
    parent.kill()
    parent.wait()
    assert gone(child)


def test_a_child_that_is_ended_leaves_no_zombie_and_may_be_ended_twice() -> None:
    child = child_process.start([sys.executable, "-c", "import sys; sys.stdin.read()"])
    child_process.ended(child)
    assert child.returncode == -signal.SIGKILL
    child_process.ended(child)


def test_what_a_child_reads_from_its_standard_input_ends(tmp_path: Path) -> None:
    code = (
        "from qlora_hal.processes.child_process import end_with_parent; import sys; end_with_parent(); "
        "print('read', len(sys.stdin.read()))"
    )
    child = child_process.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.read() == "read 0\n"
    child.stdout.close()
    child_process.ended(child)


def test_a_module_that_is_started_by_hand_does_not_end_for_want_of_a_parent() -> None:
    code = (
        "from qlora_hal.processes.child_process import end_with_parent; import time; "
        "end_with_parent(); time.sleep(0.3); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert done.stdout == b"done\n"


def test_no_child_takes_what_lies_in_the_working_folder_for_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the folder of a stranger's model, with a json.py in it."""
    (tmp_path / "json.py").write_text("raise SystemExit('code of the working folder ran')")
    monkeypatch.chdir(tmp_path)
    answer = ask("qlora_hal.detect.discovery", "cpu_torch", seconds=600)
    assert answer["availability"] == "ready"
    started = [*_starts_in("qlora_hal"), *_starts_in("qlora_hal_backends")]
    assert started == ["qlora_hal/processes/child_process.py"], "every module is started by module_command"


def _starts_in(package: str) -> list[str]:
    """The files that name this interpreter beside -m."""
    root = Path(str(import_module(package).__file__)).parent
    pattern = re.compile(r'sys\.executable[^\n]*"-m"')
    return [str(file.relative_to(root.parent)) for file in root.rglob("*.py") if pattern.search(file.read_text())]
