"""Advice to install an extra names what was really installed: a checkout, a repository, or the package of an index."""

from __future__ import annotations

import json

import pytest

from qlora_hal.errors.installation import _requirement, is_from_folder, requirement

HERE = {"url": "file:///home/me/my%20work/qlora", "dir_info": {"editable": True}}
BRANCH = {
    "url": "https://git.example/q.git",
    "vcs_info": {"vcs": "git", "requested_revision": "main", "commit_id": "ab12"},
}
WHEEL = {"url": "https://example.org/qlora_hal-0.1.0-py3-none-any.whl", "archive_info": {}}


@pytest.mark.parametrize(
    ("origin", "installed"),
    [
        (None, "'qlora-hal[cuda]'"),
        ("{broken", "'qlora-hal[cuda]'"),
        ("[]", "'qlora-hal[cuda]'"),
        (json.dumps(HERE), "-e '/home/me/my work/qlora[cuda]'"),
        (json.dumps({**HERE, "dir_info": {}}), "'/home/me/my work/qlora[cuda]'"),
        (json.dumps(BRANCH), "'qlora-hal[cuda] @ git+https://git.example/q.git@ab12'"),
        (json.dumps(WHEEL), "'qlora-hal[cuda] @ https://example.org/qlora_hal-0.1.0-py3-none-any.whl'"),
    ],
)
def test_an_extra_is_asked_of_the_place_it_was_installed_from(origin: str | None, installed: str) -> None:
    assert _requirement("[cuda]", origin) == installed


def test_several_extras_are_one_requirement() -> None:
    assert "[data,gptq]" in requirement("data", "gptq")


def test_what_no_index_has_is_known_by_its_folder() -> None:
    assert not is_from_folder("pytest")
    assert not is_from_folder("no such distribution")
