"""How a failure looks on the terminal."""

from __future__ import annotations

import pytest

from qlora_hal.cli.failures import reported
from qlora_hal.errors import ModelError


@pytest.mark.parametrize(("code", "is_known"), [("QH-D05", True), ("QH-TOY1", False)])
def test_only_codes_of_the_catalogue_can_be_explained(
    capsys: pytest.CaptureFixture[str], code: str, is_known: bool
) -> None:
    assert reported(ModelError(code, "Something is wrong.", fix="Mend it."), as_json=False) == 5
    shown = capsys.readouterr().err
    assert f"error[{code}]: Something is wrong." in shown
    assert (f"qlora-hal explain {code}" in shown) is is_known
