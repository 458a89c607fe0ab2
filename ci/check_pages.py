"""Look at the pages that this project writes as a browser does: `python ci/check_pages.py --out docs/runs/pages.json`.

The report of a run, the comparison of two and the page of a certificate are opened in headless Chromium, on a phone and
on a desktop, light and dark, with everything unfolded. axe-core must find nothing, nothing may stand out of the screen,
and no page be heavier than 150 kB. It takes a kept run, the same run in progress, 20,000 steps of it, the comparison
with another kept run, and the certificates of docs/certificates; files named as arguments are looked at besides.

Needs `pip install playwright axe-playwright-python` and a Chromium (CHROMIUM names it, or it is on PATH).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_hal.report.html import write_report
from qlora_hal_conformance.journal import result_from_json
from qlora_hal_conformance.report.html import html_text

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "docs" / "runs" / "cpu_demo"
OTHER_RUN = ROOT / "docs" / "runs" / "h200_demo"
SCREENS = {"phone": (390, 844), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
LONG_RUN = 20_000
HEAVIEST_BYTES = 150_000


@dataclass(frozen=True)
class Look:
    """One page on one screen. `violations` are axe-core's rules; `too_wide` how many pixels stand out."""

    page: str
    screen: str
    scheme: str
    bytes: int
    violations: tuple[str, ...]
    too_wide: int

    @property
    def wrong(self) -> list[str]:
        """What is wrong with it, in words; nothing where it is right."""
        found = list(self.violations)
        if self.too_wide > 0:
            found.append(f"{self.too_wide} px too wide")
        if self.bytes >= HEAVIEST_BYTES:
            found.append(f"as heavy as {HEAVIEST_BYTES} bytes or more")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages = {
            **dict(pages_of_runs(Path(folder))),
            **dict(pages_of_certificates(Path(folder))),
            **{f"{p.parent.name}/{p.name}": p.resolve() for p in given.pages},
        }
        looks, browser = looked_at(pages)
    for look in looks:
        state = f"WRONG: {', '.join(look.wrong)}" if look.wrong else "right"
        print(f"{look.page}, {look.screen}, {look.scheme}: {look.bytes} bytes, {state}")
    if given.out:
        command = " ".join(["python ci/check_pages.py", *(f"{p.parent.name}/{p.name}" for p in given.pages)])
        record = {"command": command, "browser": browser, "axe-playwright-python": version("axe-playwright-python")}
        given.out.write_text(json.dumps({**record, "looks": [asdict(look) for look in looks]}, indent=1) + "\n")
    return 1 if any(look.wrong for look in looks) else 0


def pages_of_runs(folder: Path) -> Iterator[tuple[str, Path]]:
    for name, in_progress, steps in (("run", False, None), ("in progress", True, None), ("long", False, LONG_RUN)):
        run = shutil.copytree(RUN, folder / name)
        if steps is not None:
            lengthen(run / "metrics.jsonl", steps)
        yield f"report of a run ({name})", write_report(run, in_progress=in_progress)
    comparison = folder / "comparison.html"
    command = [sys.executable, "-m", "qlora_hal", "compare", str(RUN), str(OTHER_RUN), "--page", str(comparison)]
    subprocess.run(command, check=True, capture_output=True)
    yield "comparison of two runs", comparison


def pages_of_certificates(folder: Path) -> Iterator[tuple[str, Path]]:
    for certificate in sorted((ROOT / "docs" / "certificates").glob("*.json")):
        document = json.loads(certificate.read_text(encoding="utf-8"))
        page = folder / f"{certificate.stem}.html"
        page.write_text(html_text(document, [result_from_json(case) for case in document["cases"]]), encoding="utf-8")
        yield f"certificate {certificate.stem}", page


def lengthen(log: Path, steps: int) -> None:
    """The steps of a log over and over, under numbers of their own."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    taken = [line for line in lines if "loss" in line]
    repeated = ({**taken[number % len(taken)], "step": number + 1} for number in range(steps))
    log.write_text("".join(json.dumps(line) + "\n" for line in repeated), encoding="utf-8")


def looked_at(pages: dict[str, Path]) -> tuple[list[Look], str]:
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        looks = [
            look_at(browser, name, path, screen, scheme)
            for name, path in pages.items()
            for screen in SCREENS
            for scheme in SCHEMES
        ]
        return looks, f"Chromium {browser.version}"


def look_at(browser: Any, name: str, path: Path, screen: str, scheme: str) -> Look:
    from axe_playwright_python.sync_playwright import Axe

    width, height = SCREENS[screen]
    # The page's own policy would keep axe out.
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(path.as_uri())
    page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
    # The page of a run in progress would load itself anew under axe's hands.
    page.evaluate("for (const box of document.querySelectorAll('#reloading')) box.checked = false")
    found = Axe().run(page).response["violations"]
    wide = page.evaluate("document.documentElement.scrollWidth")
    context.close()
    return Look(name, screen, scheme, path.stat().st_size, tuple(rule["id"] for rule in found), wide - width)


if __name__ == "__main__":
    sys.exit(main())
