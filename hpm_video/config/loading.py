"""Configs read from files, compared and written. The only user of OmegaConf."""

import contextlib
import dataclasses
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
    left_out = [override for override in overrides if _LEFT_OUT.fullmatch(override)]
    overrides = [override for override in overrides if override not in left_out]
    try:
        file = OmegaConf.load(path)
        _refuse_references(file, str(path))
        for override in overrides:
            _refuse_references(OmegaConf.from_dotlist([override]), "the command line")
        for override in left_out:
            _leave_out(file, override.split("=")[0].split("."))
        given = OmegaConf.merge(file, OmegaConf.from_dotlist(overrides))
        open_keys = sorted(OmegaConf.missing_keys(given))
        if open_keys:
            raise ConfigError(
                f"{path} leaves {open_keys[0]} to you: give {open_keys[0]}=VALUE, or "
                f"{open_keys[0]}=null for none"
            )
        _check_sources_alone(given)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        reason = str(error).strip().replace("\n", "; ")
        raise ConfigError(f"cannot use {path} {' '.join(overrides)}: {reason}") from error
    assert isinstance(config, schema)
    return config


def _refuse_references(config: Any, where: str) -> None:
    """Make sure that nothing is to be filled in, before anything could be.

    OmegaConf would put in what stands elsewhere, such as in the environment of whoever reads a
    config of somebody else.

    Raises:
        ConfigError: a value has a ``${...}``.
    """

    def look(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                look(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                look(inner, f"{key}[{number}]")
        elif isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{where} has {key}={value}, but ${{...}} is not filled in, neither from the "
                f"environment nor from other keys; write the value itself (a shell fills in "
                f'{key}="$NAME")'
            )

    look(OmegaConf.to_container(config, resolve=False), "")


def _check_sources_alone(given: Any) -> None:
    """Make sure of each further source by itself, so that an error says which it is of.

    Raises:
        ConfigError: a value of one breaks a rule of the schema.
    """
    mix: Any = given.get("mix") if OmegaConf.is_dict(given) else None
    for name, values in mix.items() if OmegaConf.is_dict(mix) else ():
        with contextlib.suppress(OmegaConfBaseException):  # which names the key by itself, later
            try:
                OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), values))
            except ConfigError as error:
                raise ConfigError(f"mix.{name}: {error}") from error


_LEFT_OUT = re.compile(r"mix(\.[A-Za-z0-9_-]+)?=(null|\{\})")


def _leave_out(config: Any, keys: Sequence[str]) -> None:
    """Take a further source out of a config, or all of them."""
    *above, last = keys
    for key in above:
        config = config.get(key, {})
    config.pop(last, None)


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
