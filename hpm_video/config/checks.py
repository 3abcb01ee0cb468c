"""Checks that the sections of a config share."""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from hpm_video.files.errors import ExpectedError


class ConfigError(ExpectedError, ValueError):
    """A configuration that cannot be run. The message names the value, the rule and the remedy."""


def unrelated(default: Any) -> Any:
    """A field that does not change what a run computes."""
    return field(default=default, metadata={"changes_result": False})


def at_least(least: int, **values: int | None) -> None:
    """Refuse values below ``least``."""
    _check(f"be at least {least}", lambda value: value >= least, values)


def a_chance(section: str, **values: float | None) -> None:
    """Refuse values outside of [0, 1)."""
    _check("lie in [0, 1)", lambda value: 0 <= value < 1, values, section)


def a_share(section: str, **values: float | None) -> None:
    """Refuse values outside of [0, 1]."""
    _check("lie in [0, 1]", lambda value: 0 <= value <= 1, values, section)


def positive(section: str, rule: str = "be positive", **values: float | None) -> None:
    """Refuse values that are not above 0, with a message that states ``rule``."""
    _check(rule, lambda value: value > 0, values, section)


def _check(
    rule: str, holds: Callable[[Any], bool], values: Mapping[str, Any], section: str = ""
) -> None:
    """Refuse a value, where one is given, that breaks a rule."""
    for name, value in values.items():
        if value is not None and not holds(value):
            raise ConfigError(f"{section}{section and '.'}{name} must {rule}, got {value}")
