"""Single values of a `config.json`, checked: what is no number where a number is needed raises ValueError."""

from __future__ import annotations

from collections.abc import Mapping

Config = Mapping[str, object]


def integer(config: Config, key: str, default: int | None = None) -> int:
    """Raises ValueError unless the value, or the default where there is none, is an integer."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int):
        raise ValueError(f"config.json: {key} is {value!r}, an integer is needed")
    return value


def real(config: Config, key: str, default: float | None = None) -> float:
    """Raises ValueError unless the value, or the default where the key is missing, is a number."""
    value = config.get(key, default)
    if not isinstance(value, int | float):
        raise ValueError(f"config.json: {key} is {value!r}, a number is needed")
    return float(value)


def numbers(config: Config, key: str) -> tuple[float, ...]:
    """Raises ValueError unless the value is a list of numbers."""
    values = config.get(key)
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"config.json: {key} is {values!r}, a list of numbers is needed")
    return tuple(float(value) for value in values)


def refuse_key(config: Config, key: str) -> None:
    """Raises ValueError where the key has a value that is not empty, zero or false."""
    if config.get(key):
        raise ValueError(f"{key} is {config[key]!r}; the oracle does not compute it for this model_type")
