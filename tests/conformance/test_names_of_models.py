"""A model that one case made itself never stands in for one that another case draws under the same name."""

from __future__ import annotations

import re

from qlora_hal_conformance.catalogue import SECTIONS_FOLDER

MADE = re.compile(r'\.define\(\s*f?"([^"]+)"')
DRAWN = re.compile(r'(?:opened|drawn|plain|quantized)\(\s*"([^"]+)"')


def test_no_section_draws_a_model_under_a_name_that_another_defines() -> None:
    """Models are kept over sections: section 40 once trained section 33's mixture in place of its tied model."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in SECTIONS_FOLDER.glob("test_*.py")}
    made = {(name, section) for section, text in texts.items() for name in MADE.findall(text)}
    drawn = {(name, section) for section, text in texts.items() for name in DRAWN.findall(text)}
    assert made
    assert {name for name, _ in drawn} > {"tied"}
    names = {name for name, _ in made}
    assert [(name, section) for name, section in drawn - made if name in names] == []
