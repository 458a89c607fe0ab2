"""Kill real runs at random places, go on, and compare the end with a run that was never killed, bit for bit.

    python benchmarks/random_kills.py --backend cpu_torch --kills 300 --out docs/runs/kills_cpu_torch.jsonl

Each case takes a group of options, is killed once or several times in any phase of a run, and goes on by `resume` (or
by `train`, where nothing was saved yet). A case is a function of its number and the seed. FILE gets one line a case, as
each ends: started again with the same FILE, the command goes on after the last of them, so it can run beside other work
and be stopped whenever. `--case N` carries out one case alone and keeps its folder. The exit status is 1 when anything
was lost, differed, hung or ended otherwise than promised.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Before any tensor library is imported: one thread each, so that a fork copies the whole of a process.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ.update({"CI": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

sys.path.insert(0, str(Path(__file__).resolve().parent))

from killing.cases import Golden, drawn_kills, golden_run, killed_run, planned_kill, remove  # noqa: E402
from killing.forking import import_taught  # noqa: E402
from killing.groups import BACKENDS, groups_of, write_inputs  # noqa: E402
from killing.triggers import Kill  # noqa: E402

Line = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default="cpu_torch")
    parser.add_argument("--kills", type=int, default=300, help="how many signals are to be sent in all")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="one JSON line a case")
    parser.add_argument("--jobs", type=int, default=1, help="cases at the same time, each on one core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", nargs=2, action="append", metavar=("GROUP", "KILL"), help="a case that is not drawn")
    parser.add_argument("--case", type=int, help="carry out this case alone, and keep its folder")
    parser.add_argument(
        "--work", type=Path, help="where runs and uninterrupted runs lie, kept; default: a temporary folder"
    )
    chosen = parser.parse_args(argv)
    with ExitStack() as stack:
        work = chosen.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="random-kills-")))
        campaign = Campaign(chosen.backend, chosen.seed, work.resolve() / chosen.backend)
        if chosen.case is not None:
            print(json.dumps(campaign.case(chosen.case, keep=True), indent=1))
            return 0
        if chosen.plan:
            lines = [campaign.planned(*plan) for plan in chosen.plan]
            chosen.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
            return int(any(line["verdict"] != "equal" or not line["kills"] for line in lines))
        record = Record(chosen.out, {"backend": chosen.backend, "seed": chosen.seed})
        in_jobs(campaign, record, chosen.kills, chosen.jobs)
    return summed_up(record)


class Campaign:
    """The cases of one backend, carried out in forks of this process."""

    def __init__(self, backend: str, seed: int, work: Path) -> None:
        self._seed = seed
        self._work = work
        self._inputs = work / "inputs"
        self._groups = groups_of(backend)
        self._golden: dict[str, Golden] = {}
        write_inputs(self._inputs, backend)
        self._learn()

    def case(self, number: int, *, keep: bool = False) -> Line:
        """Carry out one case. The folder of one that went wrong is kept, as all are with `keep`."""
        name = list(self._groups)[number % len(self._groups)]
        golden = self._golden_of(name)
        folder = self._work / f"case-{number}"
        kills = drawn_kills(random.Random(f"{self._seed}/{number}"), golden)
        return {"case": number, **self._carried_out(name, kills, folder, keep=keep)}

    def planned(self, name: str, plan: str) -> Line:
        """A case with one kill, given as text."""
        kill = planned_kill(plan, self._golden_of(name))
        return {"plan": plan, **self._carried_out(name, [kill], self._work / "planned", keep=False)}

    def _carried_out(self, name: str, kills: Sequence[Kill], folder: Path, *, keep: bool) -> Line:
        remove(folder)
        outcome = killed_run(kills, self._groups[name], self._golden_of(name), self._inputs, folder)
        if not (keep or outcome.problems):
            remove(folder)
        told = {"group": name, "verdict": outcome.verdict, "seconds": round(outcome.seconds, 2)}
        return {**told, "kills": outcome.kills, **({"problems": outcome.problems} if outcome.problems else {})}

    def _learn(self) -> None:
        """Have one run tell what it imports, and import it here."""
        folder = self._work / "learning"
        remove(folder)
        name = "evaluation and samples"
        golden_run(self._groups[name], self._inputs, folder, teach=folder / "modules.json")
        import_taught(folder / "modules.json")
        remove(folder)

    def _golden_of(self, name: str) -> Golden:
        """The uninterrupted run of a group, made once, by whichever job comes first."""
        if name not in self._golden:
            folder = self._work / "golden" / "".join(c if c.isalnum() else "-" for c in name)
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / "golden.json"
            with open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not kept.exists():
                    golden_run(self._groups[name], self._inputs, folder).write(kept)
                    remove(folder / "run")
            self._golden[name] = Golden.read(kept)
        return self._golden[name]


class Record:
    """FILE: a line that says what is tried, then one for each case. Lines are appended whole, by any job."""

    def __init__(self, path: Path, head: Line) -> None:
        self.path = path
        self._cut_torn_line()
        if not path.stat().st_size:
            self.append(head)
        found = self._all()[0]
        if found != head:
            raise SystemExit(f"{path} is the record of {found}, not of {head}; name another file")

    def append(self, line: Line) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def cases(self) -> list[Line]:
        return self._all()[1:]

    def kills(self) -> int:
        return sum(len(line["kills"]) for line in self.cases())

    def _all(self) -> list[Line]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def _cut_torn_line(self) -> None:
        """Of a campaign that was killed itself."""
        with open(self.path, "ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def in_jobs(campaign: Campaign, record: Record, kills: int, jobs: int) -> None:
    """Cases that the record has not, in order, until it holds so many kills. Each job is a fork of this process."""
    done = {line["case"] for line in record.cases()}
    children = []
    for job in range(jobs):
        child = os.fork() if jobs > 1 else 0
        if child:
            children.append(child)
            continue
        number = job
        while record.kills() < kills:
            if number not in done:
                line = campaign.case(number)
                record.append(line)
                told = " ".join(
                    f"{kill['signal']}@{kill.get('phase') or kill.get('point') or 'time'}" for kill in line["kills"]
                )
                print(f"{number}: {line['verdict']} ({line['group']}; {told}; {line['seconds']} s)", flush=True)
            number += jobs
        if jobs > 1:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)


def summed_up(record: Record) -> int:
    """Print what the record holds; 1 when anything in it is not as promised."""
    cases = record.cases()
    kills = [kill for line in cases for kill in line["kills"]]
    verdicts = Counter(line["verdict"] for line in cases)
    places = Counter(kill.get("phase") or kill.get("point") or "by time" for kill in kills)
    print(f"{len(kills)} kills in {len(cases)} runs: {dict(verdicts)}")
    print(f"signals: {dict(Counter(kill['signal'] for kill in kills).most_common())}")
    print(f"places: {dict(places.most_common())}")
    print(f"groups: {dict(Counter(line['group'] for line in cases).most_common())}")
    for line in cases:
        for problem in line.get("problems", ()):
            print(f"case {line['case']} ({line['group']}): {problem}")
    return int(set(verdicts) - {"equal"} != set())


if __name__ == "__main__":
    sys.exit(main())
