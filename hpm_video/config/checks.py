"""Checks that the sections of a config share."""

import math
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any

from hpm_video.files.errors import ExpectedError
from hpm_video.files.plugins import REGISTERED, Kind

Rule = tuple[str, Callable[[Any], bool]]
"""What a value must do, in words, and whether it does."""
SHARE: Rule = ("lie in [0, 1]", lambda value: 0 <= value <= 1)
CHANCE: Rule = ("lie in [0, 1)", lambda value: 0 <= value < 1)
POSITIVE: Rule = ("be positive", lambda value: value > 0)
FINITE: Rule = ("be positive and finite", lambda value: 0 < value < math.inf)
POSITIVE_OR_NONE: Rule = ("be positive, or null for none", lambda value: value > 0)


class ConfigError(ExpectedError, ValueError):
    """A configuration that cannot be run. The message names the value, the rule and the remedy."""


def unrelated(default: Any) -> Any:
    """Declare a field that does not change what a run computes."""
    return field(default=default, metadata={"changes_result": False})


def at_least(least: int, name: str = "") -> Rule:
    """Return the rule that a value must not be below ``least``, which messages call ``name``."""
    return f"be at least {name or least}", lambda value: value >= least


def check(section: str, config: object, rule: Rule, *names: str) -> None:
    """Refuse fields whose value, or one of their values, breaks the rule. None is no value."""
    words, holds = rule
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple | list) else (value,)
        if value is not None and not all(map(holds, values)):
            raise ConfigError(f"{section}.{name} must {words}, got {value}")


def check_names(section: str, config: object, name: str, kind: Kind, own: Iterable[str]) -> None:
    """Refuse a name, or one of several, that is neither in ``own`` nor registered."""
    value = getattr(config, name)
    known = dict.fromkeys([*own, *(each for of, each in REGISTERED if of == kind)])
    if wrong := [
        each for each in ([value] if isinstance(value, str) else value) if each not in known
    ]:
        raise ConfigError(
            f"{section}.{name} must be one of {', '.join(known)}, got {wrong[0]}; "
            f"hpm_video.register({kind!r}, ...) adds others"
        )


def check_range(section: str, config: object, name: str, most: float | None = None) -> None:
    """Refuse two numbers that are not positive, do not rise, or exceed ``most``."""
    low, high = getattr(config, name)
    if not 0 < low <= high or (most is not None and high > most):
        limit = "" if most is None else f", at most {most}"
        raise ConfigError(
            f"{section}.{name} must be two rising positive numbers{limit}, got {(low, high)}"
        )
