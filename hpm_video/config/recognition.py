"""The sections on testing, and on the probe during pre-training."""

from dataclasses import dataclass
from typing import Literal

from hpm_video.config.checks import ConfigError, at_least, positive


@dataclass(frozen=True)
class EvaluationConfig:
    """How a fine-tuned classifier is tested."""

    manifest: str | None = None
    """Manifest of the videos to test on; by default ``data.validation``."""
    clips: int = 5
    """Clips of each video, spread over it."""
    crops: int = 3
    """Crops of each clip, along its longer side."""
    checkpoint: Literal["last", "best"] = "last"
    """``best`` is best on ``data.validation``: no fair choice where that is tested on as well."""
    weights: Literal["model", "average"] = "model"
    """``average``: their moving average, see ``recipe.average_momentum``. Validation during
    training uses the same."""
    clips_per_pass: int = 32
    """Clips of one forward pass."""
    exclude_bad_files: bool = False
    """Count videos that do not decode as wrong, instead of stopping with a list of them."""

    def __post_init__(self) -> None:
        at_least(1, clips=self.clips, crops=self.crops, clips_per_pass=self.clips_per_pass)


@dataclass(frozen=True)
class KnnConfig:
    """Nearest neighbours of frozen features during pre-training: do they separate classes yet?"""

    train: str | None = None
    """Labelled manifest or folder that neighbours are looked up in; none: nothing is measured.
    Clips are taken as those of ``data``, the main source."""
    validation: str | None = None
    """Labelled manifest or folder of the videos to classify."""
    every_epochs: float = 20
    """Epochs between two measurements (one more at the end)."""
    videos: int = 2000
    """Videos of each manifest that are used at most, evenly over it."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07

    def __post_init__(self) -> None:
        at_least(1, videos=self.videos, k=self.k)
        if (self.train is None) != (self.validation is None):
            raise ConfigError(
                "knn.train and knn.validation belong together: give both, or neither, got "
                f"{self.train} and {self.validation}"
            )
        positive("knn", every_epochs=self.every_epochs, temperature=self.temperature)
