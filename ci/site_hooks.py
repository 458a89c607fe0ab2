"""What mkdocs.yml cannot say: pages that are made while the site is built, and where links lead that leave `docs/`.

The pages read in the repository as they stand. A link from one to a file outside `docs/` leads to the repository's own
page of that file; README.md is the first page.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FIRST_PAGE = "index.md"
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
_REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Homepage"]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.repo_url, config.repo_name = _REPOSITORY, config.site_name
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, text in {FIRST_PAGE: readme, "python_reference.md": _python(), "hooks.md": _hooks()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links that work on the site. One that leads nowhere stays, and fails `mkdocs build --strict`."""
    written_in = ROOT if page.file.src_uri == FIRST_PAGE else (DOCS / page.file.src_uri).parent
    shown_in = (DOCS / page.file.src_uri).parent

    def on_the_site(link: re.Match[str]) -> str:
        target = (written_in / link["path"]).resolve()
        if target.is_dir() and (target / "README.md").exists():
            target /= "README.md"
        if not target.exists():
            return link[0]
        inside = target.is_relative_to(DOCS) and target.is_file()
        path = os.path.relpath(target, shown_in) if inside else f"{_REPOSITORY}/blob/main/{target.relative_to(ROOT)}"
        return path + (link["anchor"] or "")

    return _LINK.sub(on_the_site, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The link to the repository without the theme's script, which asks GitHub for stars on each visit."""
    return output.replace(' data-md-component="source"', "")


def _python() -> str:
    """The public names of the package, each with its signature and docstring."""
    sys.path.insert(0, str(ROOT))
    import qlora_hal

    names = [name for name in qlora_hal.__all__ if not name.startswith("_")]
    entries = [f"::: qlora_hal.{name}" for name in sorted(names, key=lambda name: (name[0].isupper(), name))]
    return "\n\n".join(["# Python reference", "What `import qlora_hal` offers.", *entries, ""])


def _hooks() -> str:
    return "# Hooks\n\n::: qlora_hal.hooks\n    options:\n      show_root_heading: false\n"
