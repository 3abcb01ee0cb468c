"""Checks that initial weights belong to the model that the config describes."""

import logging
from pathlib import Path

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_any_config, result_differences
from hpm_video.config.schema import PretrainConfig
from hpm_video.files.weights import OF_ANOTHER_PROJECT, CheckpointError
from hpm_video.models.from_config import AnyConfig

log = logging.getLogger(__name__)

SAME_ENCODER = ("encoder", "patch_size", "channels", "positions", "class_token", "conventions")
"""Fields of a model's config that must equal those of its weights."""


def config_beside(config: AnyConfig) -> AnyConfig | None:
    """The config of the run that initial weights are of; none where they are of no run.

    Raises:
        CheckpointError: it is a file of another kind than this package has.
        ConfigError: the run had another model.
    """
    if config.init_weights is None:
        return None
    source = Path(config.init_weights).expanduser()
    if source.is_file() and source.suffix != ".safetensors":
        raise CheckpointError(f"{source} is no file of safetensors. {OF_ANOTHER_PROJECT}")
    path = (source if source.is_dir() else source.parent) / "config.yaml"
    if not path.is_file():
        return None
    beside = load_any_config(path)
    check_same_model(config, beside)
    return beside


def check_same_model(config: AnyConfig, source: AnyConfig) -> None:
    """Make sure that the encoder of ``source``, and of pre-training the decoder, is that here.

    Weights alone do not tell how many heads there are, or where the positions are.

    Raises:
        ConfigError: it is another one. Every difference is named.
    """
    same, different = [*SAME_ENCODER], []
    if isinstance(config, PretrainConfig) and isinstance(source, PretrainConfig):
        same.append("decoder")
    for name in same:
        theirs, ours = getattr(source.model, name), getattr(config.model, name)
        different += result_differences(theirs, ours, f"model.{name}.")
    if different:
        raise ConfigError(
            f"the model of init_weights={config.init_weights} is another one (its -> here):\n  "
            + "\n  ".join(different)
            + "\nTake its values."
        )
    was, now = (f"data.mean={one.data.mean} data.std={one.data.std}" for one in (source, config))
    if was != now:
        given = config.init_weights
        log.warning("init_weights=%s was trained with %s, this run has %s", given, was, now)
