"""Download the Debian packages whose text the demo model is trained on, and unpack the parts that hold text.

Nothing is installed: packages are downloaded with ``apt-get download`` and unpacked with ``dpkg-deb`` into a
folder of their own. The list of names is committed (``packages.txt``); the versions are whatever the archive
serves on the day, and the next step records them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT_FOLDERS = (
    "./usr/share/man/man",
    "./usr/share/doc/",
    "./usr/share/info/",
    "./usr/share/help/C/",
    "./usr/share/dictd/",
    "./usr/share/wordnet/",
)


def download(names: list[str], folder: Path) -> None:
    """Download every package of ``names`` that is not in ``folder`` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    present = {path.name.split("_")[0] for path in folder.glob("*.deb")}
    missing = [name for name in names if name not in present]
    for start in range(0, len(missing), 200):
        subprocess.run(["apt-get", "download", "-q", *missing[start : start + 200]], cwd=folder, check=True)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the text folders of one package; a marker file makes a repeated run skip it."""
    target = folder / archive.name.removesuffix(".deb")
    done = target / ".unpacked"
    if done.exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            if member.isfile() and member.name.startswith(TEXT_FOLDERS):
                tar.extract(member, target, filter="data")
            elif member.issym() and re.fullmatch(r"\./usr/share/doc/[^/]+", member.name):
                # The folder of a package may be a link to that of another package of the same source.
                (target / "documentation_of").write_text(Path(member.linkname).name, encoding="utf-8")
    done.touch()


def main() -> None:
    """Fetch and unpack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "build")
    work: Path = parser.parse_args().work
    names = (HERE / "packages.txt").read_text(encoding="utf-8").split()
    # mandoc renders manual pages; it is run from where it is unpacked.
    download([*names, "mandoc"], work / "packages")
    subprocess.run(["dpkg-deb", "-x", *(work / "packages").glob("mandoc_*.deb"), work / "mandoc"], check=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda deb: unpack(deb, work / "unpacked"), sorted((work / "packages").glob("*.deb"))))


if __name__ == "__main__":
    main()
