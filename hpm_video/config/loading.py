"""Configs read from files, compared and written. The only user of OmegaConf."""

import contextlib
import dataclasses
import logging
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

Config = TypeVar("Config")
log = logging.getLogger(__name__)
NEW_NAMES = {"held_out_short_side": "validation_short_side"}
"""Of keys that had another name in the version before this one."""


def load_config(schema: type[Config], path: Path, overrides: Sequence[str]) -> Config:
    """Schema defaults, then the YAML file, then ``section.key=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value is of the wrong
            type or breaks a rule of the schema.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no config file {path}; see configs/README.md for those shipped"
        )
    read_text(path, ConfigError)
    odd = [override for override in overrides if "=" not in override]
    if odd:
        raise ConfigError(f"an override must look like section.key=value, got {odd[0]!r}")
    try:
        given: Any = OmegaConf.load(path)
        _refuse_references(OmegaConf.to_container(given), str(path))
        for override in overrides:
            part = OmegaConf.from_dotlist([override])
            _refuse_references(OmegaConf.to_container(part), "the command line")
            given = OmegaConf.merge(given, part)
            if override in ("mix={}", "mix=null"):
                given.mix = {}
        given = OmegaConf.create(_with_new_names(OmegaConf.to_container(given), path))
        open_keys = sorted(OmegaConf.missing_keys(given))
        if open_keys:
            raise ConfigError(
                f"{path} leaves {open_keys[0]} to you: give {open_keys[0]}=VALUE, or "
                f"{open_keys[0]}=null for none"
            )
        _check_sources(given)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        reason = str(error).strip().replace("\n", "; ")
        raise ConfigError(f"cannot use {path} {' '.join(overrides)}: {reason}") from error
    assert isinstance(config, schema)
    return config


def _refuse_references(value: Any, where: str, key: str = "") -> None:
    """Refuse ``${...}``, which OmegaConf would replace by what stands elsewhere.

    Such as in the environment of whoever reads a config of somebody else.
    """
    inner: dict[str, Any] = {}
    if isinstance(value, dict):
        inner = {f"{key}.{name}" if key else str(name): each for name, each in value.items()}
    elif isinstance(value, list):
        inner = {f"{key}[{number}]": each for number, each in enumerate(value)}
    for name, each in inner.items():
        _refuse_references(each, where, name)
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{where} has {key}={value}, but ${{...}} is not filled in, neither from the "
            f"environment nor from other keys; write the value itself (a shell fills in "
            f'{key}="$NAME")'
        )


def _with_new_names(given: Any, path: Path) -> Any:
    """Read keys by the names that they had one version ago."""
    if not isinstance(given, dict):
        return given
    found = {}
    for key, value in given.items():
        name = NEW_NAMES.get(key, key)
        if name != key:
            log.warning("%s: %s is called %s now", path, key, name)
        is_off = name == "compile" and value is False  # which is how YAML reads the word off
        found[name] = "off" if is_off else _with_new_names(value, path)
    return found


def _check_sources(given: Any) -> None:
    """Leave out further sources that are null, and check each by itself: errors then name it."""
    mix: Any = given.get("mix") if OmegaConf.is_dict(given) else None
    for name, values in [*mix.items()] if OmegaConf.is_dict(mix) else ():
        if values is None:
            del mix[name]
            continue
        with contextlib.suppress(OmegaConfBaseException):  # which names the key by itself, later
            try:
                OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), values))
            except ConfigError as error:
                raise ConfigError(f"mix.{name}: {error}") from error


def load_any_config(path: Path, overrides: Sequence[str] = ()) -> PretrainConfig | FinetuneConfig:
    """The config of a run, of whichever kind it is: that of pre-training has a section masking.

    Raises:
        ConfigError: there is no such file, or it is not such a config.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}; give a config, or a checkpoint folder of a run, such as "
            f"RUN/checkpoints/last"
        )
    if re.search(r"^masking:", read_text(path, ConfigError), re.MULTILINE):
        return load_config(PretrainConfig, path, overrides)
    return load_config(FinetuneConfig, path, overrides)


def save_config(config: object, path: Path) -> None:
    """Write every value that a run used, so that the file alone repeats it."""
    path.write_text(config_text(config))


def config_text(config: object) -> str:
    """Return every value of a config, as :func:`save_config` writes it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def result_differences(old: object, new: object, prefix: str = "") -> list[str]:
    """The fields in which two configs differ and that change what a run computes.

    Each as ``section.key: old value -> new value``.
    """
    found = []
    for item in dataclasses.fields(old):  # type: ignore[arg-type]
        before, after = getattr(old, item.name), getattr(new, item.name)
        if not item.metadata.get("changes_result", True) or before == after:
            continue
        if dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after):
            found += result_differences(before, after, f"{prefix}{item.name}.")
        elif isinstance(before, dict) and isinstance(after, dict):
            if [*before] != [*after]:
                names = (", ".join(each) or "nothing" for each in (before, after))
                found.append(f"{prefix}{item.name}: {' -> '.join(names)}")
                continue
            for name, value in before.items():
                found += result_differences(value, after[name], f"{prefix}{item.name}.{name}.")
        else:
            found.append(f"{prefix}{item.name}: {before} -> {after}")
    return found
