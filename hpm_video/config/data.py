"""The sections that describe clips."""

import re
from dataclasses import dataclass

from hpm_video.config.checks import (
    CHANCE,
    FINITE,
    POSITIVE,
    SHARE,
    ConfigError,
    at_least,
    check,
    check_range,
    unrelated,
)
from hpm_video.config.choices import Crop, DecoderChoice, Interpolation, Sampling
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
    num_frames: int = 16
    frame_stride: int | None = None
    """Frames of the video from one frame of the clip to the next; 4, unless ``fps`` is set."""
    max_frame_stride: int | None = None
    """Largest stride, where each training clip draws its own from frame_stride on."""
    fps: float | None = None
    """Frames per second of a clip, whatever the rate of the video: in place of a stride."""
    frame_size: tuple[int, int] = (224, 224)
    """Height and width of a clip in pixels."""
    interpolation: Interpolation = "bilinear"
    """How frames are resized."""
    validation_short_side: int | None = None
    """Pixels of the shorter side that frames for validation and tests are resized to before crops
    are cut out of them (ImageNet: 256, then 224). By default a crop is as large as fits."""
    sampling: Sampling = "dense"
    """``dense``: frames at the stride (Kinetics). ``segments``: one frame of each of num_frames
    equal parts of the video, whatever the stride (Something-Something V2)."""
    repeats: int = 1
    """Clips taken from each decoded video: in pre-training of frames of their own, in fine-tuning
    augmented copies of the same frames. A batch counts videos."""
    clips_per_minute: float | None = None
    """Samples that an epoch takes of each training video per minute of its length, at least one.
    The manifest must state the length of every video. By default each gives one sample."""
    flip: bool = False
    """Whether half of the training clips are mirrored: never where labels depend on direction, as
    those of Something-Something do."""
    label_names: str | None = unrelated(default=None)
    """Text file with the name of class i in line i; by default names are those of the manifest."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, pixels being in [0, 1]. The default is ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    decoder: DecoderChoice = unrelated(default="auto")
    workers: int | None = unrelated(default=None)
    """Processes that decode; by default one less than there are cores, at least 1 and at most 16.
    With 0 the run itself decodes, and a file on which a decoder hangs or crashes ends it."""
    seconds_per_file: float = unrelated(default=60.0)
    """A file that takes longer to decode is bad, and the process that decodes it is replaced."""
    memory_per_worker: float = unrelated(default=4.0)
    """GiB that a process that decodes may take; a file that needs more is bad. On Linux only."""
    max_bad_share: float = unrelated(default=0.01)
    """Share of the manifest's files that may fail to decode before the run stops."""

    def __post_init__(self) -> None:
        check("data", self, at_least(1), "num_frames", "frame_stride", "repeats", "frame_size")
        check("data", self, at_least(0), "workers")
        check("data", self, POSITIVE, "seconds_per_file", "memory_per_worker", "std")
        check("data", self, FINITE, "fps", "clips_per_minute")
        check("data", self, SHARE, "max_bad_share")
        crop = at_least(max(self.frame_size), f"data.frame_size ({self.frame_size})")
        check("data", self, crop, "validation_short_side")
        if self.fps is not None and (self.frame_stride or self.max_frame_stride):
            raise ConfigError(
                f"data.fps={self.fps:g} takes frames by time, so no stride can be set, but "
                f"data.frame_stride is {self.frame_stride} and data.max_frame_stride is "
                f"{self.max_frame_stride}; make both null, or leave data.fps out"
            )
        if self.fps is None and self.frame_stride is None:
            object.__setattr__(self, "frame_stride", 4)
        stride = at_least(self.frame_stride or 1, f"data.frame_stride ({self.frame_stride})")
        check("data", self, stride, "max_frame_stride")
        for key in ("max_frame_stride", "fps"):
            if self.sampling == "segments" and (value := getattr(self, key)) is not None:
                raise ConfigError(
                    f"data.sampling=segments takes no stride, but data.{key} is {value}; leave it "
                    f"out"
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
        check_range("data", self, "crop_area", most=1)


SECTION = re.compile(
    r"(?P<m>m\d{1,2})|(?P<n>n[1-9])|(?P<mstd>mstd\d+(\.\d+)?)|(?P<mmax>mmax[1-9]\d?)|"
    r"(?P<p>p(0(\.\d+)?|1(\.0+)?))|(?P<inc>inc[01])|(?P<t>t(weights|3aw?))",
    re.ASCII,
)
"""What may follow ``rand`` in timm's string: a name and its value."""


def check_rand_augment(config: str) -> None:
    """Refuse a string that timm does not read as RandAugment, or of which it would skip a part."""
    first, *sections = config.split("-")
    matches = [SECTION.fullmatch(section) for section in sections]
    names = [match.lastgroup for match in matches if match]
    if first != "rand" or len(names) < len(sections) or len(set(names)) < len(names):
        raise ConfigError(
            f"augmentation.rand_augment is timm's string of 'rand' and any of -m7 (strength), -n4 "
            f"(operations), -mstd0.5 (standard deviation of the strength), -mmax10, -p0.5, -inc1 "
            f"and -tweights, each once, got '{config}'; take 'rand-m7-n4-mstd0.5-inc1', or null "
            f"for no RandAugment"
        )


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of training clips for a classifier; each is drawn once for all frames."""

    area: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop, as a share of the frame."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Width of a crop divided by its height."""
    rand_augment: str | None = "rand-m7-n4-mstd0.5-inc1"
    """RandAugment in timm's notation, or none."""
    erasing: float = 0.25
    """Chance that a random box is erased."""
    mixup: float = 0.8
    """Parameter of the beta distribution of the shares of mixed clips; 0 turns mixup off."""
    cutmix: float = 1.0
    """The same for the area of boxes put into other clips; 0 turns CutMix off."""
    mix_probability: float = 1.0
    """Chance that a batch is mixed at all."""
    cutmix_probability: float = 0.5
    """Chance of CutMix where both are on; otherwise mixup."""
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_range("augmentation", self, "area", most=1)
        check_range("augmentation", self, "ratio")
        check("augmentation", self, SHARE, "erasing", "mix_probability", "cutmix_probability")
        check("augmentation", self, at_least(0), "mixup", "cutmix")
        check("augmentation", self, CHANCE, "label_smoothing")
        if self.rand_augment is not None:
            check_rand_augment(self.rand_augment)

    @property
    def mixes(self) -> bool:
        """Whether clips of a batch are mixed."""
        return max(self.mixup, self.cutmix) > 0 and self.mix_probability > 0
