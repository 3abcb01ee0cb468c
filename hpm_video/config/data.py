"""The sections that describe clips."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from hpm_video.config.checks import (
    AT_LEAST_0,
    Chance,
    ConfigError,
    Count,
    Finite,
    NotNegative,
    Positive,
    Share,
    check,
    check_fields,
    check_range,
    unrelated,
)
from hpm_video.config.choices import Crop, DecoderChoice, Interpolation
from hpm_video.tokens.grid import Size3


@dataclass(frozen=True)
class DataConfig:
    """Which videos or images, and which frames and pixels of them. An image is one frame."""

    train: str = ""
    """Manifest (CSV or list) or folder of the videos to train on."""
    validation: str | None = None
    """Manifest or folder of the validation videos; without it there is no validation."""
    root: str | None = unrelated(default=None)
    """Folder that relative paths of the manifests start from; by default the manifest's own."""
    num_frames: Count = 16
    frame_stride: Count | None = None
    """Frames of the video from one frame of the clip to the next; 4, unless ``fps`` is set."""
    max_frame_stride: int | None = None
    """Largest stride, if each training clip draws its own; frame_stride is the smallest."""
    fps: Finite | None = None
    """Frames per second of a clip, whatever the rate of the video; it replaces the stride."""
    frame_size: tuple[Count, Count] = (224, 224)
    """Height and width of a clip in pixels."""
    interpolation: Interpolation = "bilinear"
    """How frames are resized."""
    validation_short_side: int | None = None
    """Pixels of the shorter side of frames for validation and tests, of which crops are then cut
    (ImageNet: 256, then 224). By default a crop is as large as fits."""
    sampling: Literal["dense", "segments"] = "dense"
    """``dense``: frames at the stride (Kinetics). ``segments``: one frame of each of num_frames
    equal parts of the video, whatever the stride (Something-Something V2)."""
    repeats: Count = 1
    """Clips of each decoded video (of the same frames in fine-tuning). A batch counts videos."""
    clips_per_minute: Finite | None = None
    """Samples of a training video in an epoch per minute of its length, at least one; the manifest
    must state every length. By default each gives one."""
    flip: bool = False
    """Mirror half of the training clips. Not if labels depend on direction (SSv2)."""
    label_names: str | None = unrelated(default=None)
    """Text file with the name of class i in line i; by default the manifest's names."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, pixels being in [0, 1]. The default is ImageNet's."""
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    decoder: DecoderChoice = unrelated(default="auto")
    workers: Annotated[int, AT_LEAST_0] | None = unrelated(default=None)
    """Processes that decode; by default one less than there are cores, at least 1 and at most 16.
    With 0 the run itself decodes, and a file on which a decoder hangs or crashes ends it."""
    seconds_per_file: Positive = unrelated(default=60.0)
    """Seconds to decode a file; one that takes longer is bad, and its process is replaced."""
    memory_per_worker: Positive = unrelated(default=4.0)
    """GiB that a decoding process may add; a file that needs more is bad. On Linux only."""
    max_bad_share: Share = unrelated(default=0.01)
    """Share of the manifest's files that may fail to decode before the run stops."""

    def __post_init__(self) -> None:
        check_fields("data", self)
        side, size = self.validation_short_side, self.frame_size
        is_enough = f"be at least data.frame_size {size}"
        check("data.validation_short_side", side, is_enough, lambda side: side >= max(size))
        if self.fps is not None and (self.frame_stride or self.max_frame_stride):
            raise ConfigError(
                f"data.fps={self.fps:g} takes frames by time: make data.frame_stride="
                f"{self.frame_stride} and data.max_frame_stride={self.max_frame_stride} null"
            )
        if self.fps is None and self.frame_stride is None:
            object.__setattr__(self, "frame_stride", 4)
        stride = self.frame_stride or 1
        most, is_enough = self.max_frame_stride, f"be at least data.frame_stride ({stride})"
        check("data.max_frame_stride", most, is_enough, lambda most: most >= stride)
        for key in ("max_frame_stride", "fps"):
            if self.sampling == "segments" and (value := getattr(self, key)) is not None:
                raise ConfigError(
                    f"data.sampling=segments takes no data.{key}={value}; leave it out"
                )

    @property
    def pace(self) -> str:
        """How far apart the frames of a clip are, in words."""
        return f"stride {self.frame_stride}" if self.fps is None else f"{self.fps:g} frames/s"

    @property
    def channels(self) -> int:
        """Channels of a clip (C)."""
        return len(self.mean)

    @property
    def clip_size(self) -> Size3:
        """Frames, height and width of a clip."""
        return (self.num_frames, *self.frame_size)


@dataclass(frozen=True)
class PretrainDataConfig(DataConfig):
    """The data of pre-training, and how its clips are cropped at random."""

    crop: Crop = "multi_scale"
    """``multi_scale``: one of a few boxes (VideoMAE). ``random_resized``: of any area (MAE)."""
    crop_area: tuple[float, float] = (0.2, 1.0)
    """Area of a ``random_resized`` crop, as a share of the frame; its shape is 3:4 to 4:3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("data.crop_area", self.crop_area, most=1)


TIMMS_STRING = re.compile(
    r"rand(-(m\d{1,2}|n[1-9]|mstd\d+(\.\d+)?|mmax[1-9]\d?|p(0(\.\d+)?|1(\.0+)?)|inc[01]|"
    r"t(weights|3aw?)))*",
    re.ASCII,
)
"""What timm reads as RandAugment: it would pass over other parts of the string."""


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of training clips for a classifier; each is drawn once for all frames."""

    area: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop, as a share of the frame."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Width of a crop divided by its height."""
    rand_augment: str | None = "rand-m7-n4-mstd0.5-inc1"
    """RandAugment in timm's notation, or none."""
    erasing: Share = 0.25
    """Chance that a random box is erased."""
    mixup: NotNegative = 0.8
    """Parameter of the beta distribution of the shares of mixed clips; 0 turns mixup off."""
    cutmix: NotNegative = 1.0
    """The same for the area of boxes put into other clips; 0 turns CutMix off."""
    mix_probability: Share = 1.0
    """Chance that a batch is mixed at all."""
    cutmix_probability: Share = 0.5
    """Chance of CutMix where both are on; otherwise mixup."""
    label_smoothing: Chance = 0.1

    def __post_init__(self) -> None:
        check_fields("augmentation", self)
        check_range("augmentation.area", self.area, most=1)
        check_range("augmentation.ratio", self.ratio)
        is_timms = "be timm's string, such as rand-m7-n4-mstd0.5-inc1, or null for none"
        check("augmentation.rand_augment", self.rand_augment, is_timms, TIMMS_STRING.fullmatch)

    @property
    def mixes(self) -> bool:
        """Whether clips of a batch are mixed."""
        return max(self.mixup, self.cutmix) > 0 and self.mix_probability > 0
