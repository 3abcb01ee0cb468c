"""Configs read from files, compared and written. The only user of OmegaConf."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpm_video.config.checks import ConfigError
from hpm_video.config.schema import FinetuneConfig, PretrainConfig, SourceConfig
from hpm_video.files.errors import read_text
from hpm_video.files.plugins import load_plugins

Config = TypeVar("Config")
NEW_NAMES = {"held_out_short_side": "validation_short_side", "tensorboard": "trackers"}
"""Keys that had another name in earlier runs."""
SWITCHES = {
    ("compile", False): "off",  # which is how YAML reads that word
    ("trackers", False): ["jsonl"],
    ("trackers", True): ["jsonl", "tensorboard"],
}
"""What the values of keys that are no switches mean."""
defaults_of = functools.cache(OmegaConf.structured)
"""A schema as OmegaConf sees it. To make one takes longer than all else of loading a config."""


def load_config(schema: type[Config], path: Path, overrides: Sequence[str]) -> Config:
    """Merge the schema's defaults, the YAML file and the ``section.key=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is wrong.
        PluginError: a plugin, whose names the config may have, cannot be loaded.
    """
    load_plugins()
    path = find_config(path)
    if odd := [override for override in overrides if "=" not in override]:
        raise ConfigError(f"an override must look like section.key=value, got {odd[0]!r}")
    try:
        given: Any = OmegaConf.create(_checked(OmegaConf.create(_read(path)), str(path)))
        _check_kind(schema, given, path)
        for override in overrides:
            part = _checked(OmegaConf.from_dotlist([override]), "the command line")
            given.merge_with(part)
        if open_keys := sorted(OmegaConf.missing_keys(given)):
            raise ConfigError(f"{path} has no {open_keys[0]}; give {open_keys[0]}=VALUE")
        _leave_out_usual_stride(given)
        _check_sources(given)
        config = OmegaConf.to_object(OmegaConf.merge(defaults_of(schema), given))
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = "; ".join(line for line in lines if line and "_type=" not in line)
        raise ConfigError(f"cannot use {' '.join((str(path), *overrides))}: {reason}") from error
    assert isinstance(config, schema)
    return config


def _read(path: Path) -> str:
    if not path.is_file():
        absent = f"config file {path}" if path.parent.is_dir() else f"folder {path.parent}"
        raise ConfigError(
            f"there is no {absent}; give a config, or a checkpoint folder of a run, such as "
            f"RUN/checkpoints/last"
        )
    return read_text(path, ConfigError)


def _check_kind(schema: type, given: Any, path: Path) -> None:
    """Refuse a config whose sections only the other kind of config has."""
    kinds = {PretrainConfig: "pre-training", FinetuneConfig: "fine-tuning"}
    sections = {kind: {each.name for each in dataclasses.fields(kind)} for kind in kinds}
    for other in kinds.keys() - {schema} if schema in kinds else ():
        its, own = sections[other] - sections[schema], sections[schema] - sections[other]
        if its & given.keys() and not own & given.keys():
            raise ConfigError(f"{path} is a config of {kinds[other]}; take one of {kinds[schema]}")


def _checked(value: Any, source: str, key: str = "") -> Any:
    """Return the contents of a config with today's names of keys, or refuse ``${...}``.

    OmegaConf would fill that in, such as from the environment of whoever reads the config.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{source} has {key}={value}, but ${{...}} is not resolved; write the value itself"
        )
    if isinstance(value, list):
        return [_checked(each, source, f"{key}[{number}]") for number, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    found = {}
    for old, each in value.items():
        name = NEW_NAMES.get(old, old)
        now = SWITCHES.get((name, each), each) if isinstance(each, bool) else each
        found[name] = _checked(now, source, f"{key}.{name}" if key else str(name))
    return found


def _leave_out_usual_stride(given: Any) -> None:
    """Give clips whose frames are chosen by time no stride, unless a stride is set too."""
    for value in [*given.values()] if OmegaConf.is_dict(given) else ():
        _leave_out_usual_stride(value)
        if OmegaConf.is_dict(value) and value.get("fps") is not None:
            value.setdefault("frame_stride", None)


def _check_sources(given: Any) -> None:
    """Leave out further sources that are null, and check each by itself: errors then name it."""
    mix: Any = given.get("mix") if OmegaConf.is_dict(given) else None
    if mix is None and "mix" in given:
        raise ConfigError("mix must name sources, got null; mix.NAME=null leaves one of them out")
    for name, values in [*mix.items()] if OmegaConf.is_dict(mix) else ():
        if values is None:
            del mix[name]
            continue
        with contextlib.suppress(OmegaConfBaseException):  # which names the key by itself, later
            try:
                OmegaConf.to_object(OmegaConf.merge(defaults_of(SourceConfig), values))
            except ConfigError as error:
                raise ConfigError(f"mix.{name}: {error}") from error


PACKAGE = Path(__file__).resolve().parents[1]
"""Installed, it holds the shipped configs; in the repository they lie beside it."""


def find_config(name: Path | str) -> Path:
    """The path of a config: a file, or the only one that is shipped under a name."""
    path = Path(name)
    if path.is_file() or path.suffix:
        return path
    found = sorted(
        file
        for place in (PACKAGE, PACKAGE.parent)
        for file in (place / "configs").glob(f"*/{path.name}.yaml")
    )
    if len(path.parts) > 1:
        found = [each for each in found if each.parent.name == path.parts[-2]]
    if len(found) > 1:
        names = " or ".join(f"{each.parent.name}/{each.stem}" for each in found)
        raise ConfigError(f"several configs are called {name}; take {names}")
    return found[0] if found else path


def load_any_config(path: Path, overrides: Sequence[str] = ()) -> PretrainConfig | FinetuneConfig:
    """Load a config of either kind, as :func:`load_config` does: pre-training has a masking."""
    is_pretraining = re.search(r"^masking:", _read(find_config(path)), re.MULTILINE)
    return load_config(PretrainConfig if is_pretraining else FinetuneConfig, path, overrides)


def save_config(config: object, path: Path) -> None:
    """Write every value that a run used, so that the file alone repeats it."""
    path.write_text(config_text(config))


def config_text(config: Any) -> str:
    """Return every value of a config, as :func:`save_config` writes it."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def result_differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return what changes results as ``section.key: old value -> new value``, after ``prefix``."""
    if old == new:
        return []
    if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
        fields = [f for f in dataclasses.fields(old) if f.metadata.get("changes_result", True)]
        pairs = {f.name: (getattr(old, f.name), getattr(new, f.name)) for f in fields}
    elif isinstance(old, dict) and isinstance(new, dict) and [*old] == [*new]:
        pairs = {name: (value, new[name]) for name, value in old.items()}
    else:
        if isinstance(old, dict):
            old, new = (", ".join(names) or "nothing" for names in (old, new))
        return [f"{prefix.removesuffix('.')}: {old} -> {new}"]
    found = []
    for name, (before, after) in pairs.items():
        found += result_differences(before, after, f"{prefix}{name}.")
    return found
