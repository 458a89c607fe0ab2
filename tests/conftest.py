"""How the tests are spread over processes."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a module's tests share is made once: they run in one process (`pytest -n 2 --dist loadgroup`)."""
    for item in items:
        assert isinstance(item, pytest.Function)
        made_for = item._fixtureinfo.name2fixturedefs.values()
        if any(definition.scope == "module" for definitions in made_for for definition in definitions):
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))
