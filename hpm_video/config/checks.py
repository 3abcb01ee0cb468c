"""Checks that the sections of a config share."""

from collections.abc import Callable
from dataclasses import field
from typing import Any

from hpm_video.files.errors import ExpectedError


class ConfigError(ExpectedError, ValueError):
    """A configuration that cannot be run. The message names the value, the rule and the remedy."""


def unrelated(default: Any) -> Any:
    """A field that does not change what a run computes."""
    return field(default=default, metadata={"changes_result": False})


def check(
    section: str, config: object, rule: str, holds: Callable[[Any], bool], *names: str
) -> None:
    """Refuse a field of which the value, or one of several, breaks a rule; none is no value."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple | list) else (value,)
        if value is not None and not all(map(holds, values)):
            raise ConfigError(f"{section}.{name} must {rule}, got {value}")


def at_least(least: int, section: str, config: object, *names: str) -> None:
    """Refuse values below ``least``."""
    check(section, config, f"be at least {least}", lambda value: value >= least, *names)


def a_chance(section: str, config: object, *names: str) -> None:
    """Refuse values outside of [0, 1)."""
    check(section, config, "lie in [0, 1)", lambda value: 0 <= value < 1, *names)


def a_share(section: str, config: object, *names: str) -> None:
    """Refuse values outside of [0, 1]."""
    check(section, config, "lie in [0, 1]", lambda value: 0 <= value <= 1, *names)


def positive(section: str, config: object, *names: str, rule: str = "be positive") -> None:
    """Refuse values that are not above 0, with a message that states ``rule``."""
    check(section, config, rule, lambda value: value > 0, *names)


def a_range(section: str, config: object, name: str, most: float | None = None) -> None:
    """Refuse two numbers that are not positive, do not rise, or go beyond ``most``."""
    low, high = getattr(config, name)
    if not 0 < low <= high or (most is not None and high > most):
        limit = "" if most is None else f", at most {most}"
        raise ConfigError(
            f"{section}.{name} must be two rising positive numbers{limit}, got {(low, high)}"
        )
