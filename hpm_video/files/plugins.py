"""Things that other programs add to this package by name, for configs to choose."""

import re
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, get_args

from hpm_video.files.errors import ExpectedError

Kind = Literal["mask_strategy", "target", "objective", "decoder", "tracker", "optimizer"]
TABLES: dict[Kind, tuple[str, str]] = {
    "mask_strategy": ("tokens.masking", "STRATEGIES"),
    "target": ("mining.targets", "TARGETS"),
    "objective": ("mining.objective", "OBJECTIVES"),
    "decoder": ("decoding.registry", "DECODERS"),
    "tracker": ("training.trackers", "TRACKERS"),
    "optimizer": ("training.optim", "OPTIMIZERS"),
}
"""Module and name of the table of each kind, which is imported when something is added to it."""
GROUP = "hpm_video.plugins"  # of entry points: functions that call register()
REGISTERED: dict[tuple[Kind, str], Any] = {}  # what was added, by kind and name


class PluginError(ExpectedError, RuntimeError):
    """A plugin cannot be loaded. The message names it and the reason."""


def register(kind: Kind, name: str, thing: Any) -> None:
    """Add a part by a name, which configs can then choose.

    The part by its kind, and the key of the config that takes its name:

    - ``mask_strategy`` (``masking.strategy``): a ``MaskStrategy``.
    - ``target`` (``mining.target``): makes a ``Target`` of ``patch_size``, ``mean`` and ``std``.
      Its attribute ``width`` is the number of values for each token, if not that of its patch.
    - ``objective`` (``mining.objective``): a subclass of ``HardPatchesMining``.
    - ``decoder`` (``data.decoder``): a ``Decoder`` whose reader is defined in a module, which the
      processes that decode import, not in a notebook or script.
    - ``tracker`` (``logging.trackers``): makes a ``Tracker`` of the run's directory and the number
      of updates made so far.
    - ``optimizer`` (``recipe.optimizer``): makes an optimizer of parameter groups and ``betas``.

    For the shell commands, call it in a function that your package names as an entry point of the
    group ``hpm_video.plugins``.

    Raises:
        ValueError: there is no such kind, the name is taken or not a name, or the reader of a
            decoder is not defined in a module.
    """
    if kind not in TABLES:
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    module, table_name = TABLES[kind]
    table = getattr(import_module(f"hpm_video.{module}"), table_name)
    if not re.fullmatch(r"[A-Za-z]\w*", name) or name in (*table, "auto"):
        raise ValueError(
            f"a new {kind} needs a name of letters, digits and _ that is not taken "
            f"({', '.join(table)}), got {name!r}"
        )
    if kind == "decoder" and thing.reader.__module__ == "__main__":
        raise ValueError(
            f"the processes that decode cannot import {thing.reader.__qualname__} from a notebook "
            "or script; define it in a module"
        )
    table[name] = REGISTERED[kind, name] = thing


def decoders() -> list[tuple[Kind, str, Any]]:
    """Return what was registered that processes that decode need."""
    return [(kind, name, of) for (kind, name), of in REGISTERED.items() if kind == "decoder"]


@cache
def load_plugins() -> None:
    """Call the entry points of all installed packages, once in a process.

    Raises PluginError if one cannot be imported, or raises an error.
    """
    for point in entry_points(group=GROUP):
        try:
            point.load()()
        except Exception as error:  # noqa: PERF203 - a few, once
            raise PluginError(
                f"the plugin {point.name} ({point.value}) cannot be loaded; fix its package or "
                f"uninstall it. {type(error).__name__}: {error}"
            ) from error
