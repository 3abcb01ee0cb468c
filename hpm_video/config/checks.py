"""What the sections of a config share: how they refuse a value."""

from dataclasses import field
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the value, the rule and the remedy."""


def unrelated(default: Any) -> Any:
    """A field that does not change what a run computes."""
    return field(default=default, metadata={"changes_result": False})


def a_chance(section: str, **values: float) -> None:
    """Refuse what does not lie in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{section}.{name} must lie in [0, 1), got {value}")


def at_least(least: int, **values: int) -> None:
    """Refuse what is smaller."""
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
