"""Rules for the values of a config, which stand in the types of its fields."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_type_hints

from hpm_video.files.errors import ExpectedError
from hpm_video.files.plugins import REGISTERED, Kind


class ConfigError(ExpectedError, ValueError):
    """A configuration that cannot be run. The message names the value, the rule and the remedy."""


@dataclass(frozen=True)
class Rule:
    """What a value must do, in words, and whether it does."""

    words: str
    holds: Callable[[Any], object]


AT_LEAST_0 = Rule("be at least 0", lambda value: value >= 0)
Count = Annotated[int, Rule("be at least 1", lambda value: value >= 1)]
NotNegative = Annotated[float, AT_LEAST_0]
Positive = Annotated[float, Rule("be positive", lambda value: value > 0)]
Finite = Annotated[float, Rule("be positive and finite", lambda value: 0 < value < math.inf)]
Share = Annotated[float, Rule("lie in [0, 1]", lambda value: 0 <= value <= 1)]
Chance = Annotated[float, Rule("lie in [0, 1)", lambda value: 0 <= value < 1)]
PositiveShare = Annotated[float, Rule("lie in (0, 1]", lambda value: 0 < value <= 1)]


def unrelated(default: Any) -> Any:
    """Declare a field that does not change what a run computes."""
    return field(default=default, metadata={"changes_result": False})


def check_fields(section: str, config: object) -> None:
    """Refuse a value that breaks a rule of its field's type."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        for rule in _rules_of(hint):
            check(f"{section}.{name}".strip("."), getattr(config, name), rule.words, rule.holds)


def _rules_of(hint: Any) -> list[Rule]:
    """Return the rules of a type and of the types that it is made of."""
    own = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Rule)]
    return own + [rule for part in get_args(hint) for rule in _rules_of(part)]


def check(key: str, value: Any, words: str, holds: Callable[[Any], object]) -> None:
    """Refuse a value, or one of several, for which a rule does not hold. None is no value."""
    values = value if isinstance(value, tuple | list) else (value,)
    if value is not None and not all(map(holds, values)):
        raise ConfigError(f"{key} must {words}, got {value}")


def check_names(section: str, config: object, name: str, kind: Kind, own: Iterable[str]) -> None:
    """Refuse a name, or one of several, that is neither in ``own`` nor registered."""
    given = getattr(config, name)
    known = dict.fromkeys([*own, *(each for of, each in REGISTERED if of == kind)])
    for each in [given] if isinstance(given, str) else given:
        if each not in known:
            raise ConfigError(
                f"{section}.{name} must be one of {', '.join(known)}, got {each}; "
                f"hpm_video.register({kind!r}, ...) adds others"
            )


def check_range(key: str, value: tuple[float, float], most: float = math.inf) -> None:
    """Refuse two numbers that are not positive, do not rise, or exceed ``most``."""
    low, high = value
    if not 0 < low <= high <= most:
        raise ConfigError(f"{key} must be two rising positive numbers up to {most}, got {value}")
