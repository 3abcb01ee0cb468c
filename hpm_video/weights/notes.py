"""What lies beside weights says of them: a run's arguments, config.json, preprocessor_config.json.

Every value is checked before it is used. What a config says that no model of ours can be is
refused: the weights alone would fit all the same, and compute something else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpm_video.config.choices import Interpolation
from hpm_video.files.weights import CheckpointError
from hpm_video.weights.files import Source

LARGEST_EPS, SMALLEST_EPS = 1e-5, 1e-12
"""Of layer norms, ours is 1e-6. Beyond these it shows in what a model computes."""
RESAMPLE: dict[Interpolation, int] = {"bilinear": 2, "bicubic": 3}
"""Numbers that PIL and transformers have for these."""

OF_TRANSFORMERS: dict[str, tuple[Any, ...]] = {
    "model_type": ("videomae", "vit", "vit_mae", None),
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "qv_bias": (True,),
}
"""Keys of config.json, where it is of transformers, and what they must say."""
OF_TIMM: dict[str, tuple[Any, ...]] = {
    "act_layer": (None, "gelu"),
    "attn_layer": (None,),
    "block_fn": (None,),
    "embed_layer": (None,),
    "embed_norm_layer": (None,),
    "final_norm": (True,),
    "init_values": (None,),
    "mlp_layer": (None,),
    "norm_layer": (None,),
    "pool_include_prefix": (False,),
    "pos_embed": ("learn",),
    "pre_norm": (False,),
    "proj_bias": (True,),
    "qk_norm": (False,),
    "qkv_bias": (True,),
    "reg_tokens": (0,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
}
"""Keys of timm's model_args, and what they must say."""
READ_OF_TIMM = (
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "class_token",
    "no_embed_class",
    "global_pool",
    "fc_norm",
    "dynamic_img_size",
    "dynamic_img_pad",
    "weight_init",
    "fix_init",
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
)
"""Further keys: they are read, the weights say the same, or they only matter in training."""


@dataclass(frozen=True)
class Pixels:
    """How frames become what a model takes; none where nothing is told."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    short_side: int | None = None
    resize: bool = False
    """Whether it is told how frames are resized, if only that they are not cut."""
    otherwise: str = ""
    """What ours does in another way."""


class Told:
    """The values beside the weights of a source, by their names."""

    def __init__(self, source: Source) -> None:
        """Make sure that no config says what ours cannot be.

        Raises:
            CheckpointError: one does. All such values are named.
        """
        self.source = source
        config = source.config
        nested = [_table(config.get(key)) for key in ("model_config", "model_args")]
        self._values = source.arguments | nested[0] | nested[1] | config
        self.timm = nested[1] if self.of_timm else {}
        wrong = _wrong(OF_TIMM, self.timm) if self.of_timm else []
        if self.of_timm:
            known = (*OF_TIMM, *READ_OF_TIMM)
            wrong += [f"{key}={value!r}" for key, value in self.timm.items() if key not in known]
        elif "model_config" not in config:
            wrong = _wrong(OF_TRANSFORMERS, config)
        eps = config.get("layer_norm_eps", SMALLEST_EPS)
        if not isinstance(eps, float) or not SMALLEST_EPS <= eps <= LARGEST_EPS:
            wrong.append(f"layer_norm_eps={eps!r} (ours is 1e-6)")
        if wrong:
            raise CheckpointError(
                f"its config.json says what no model of this package can be: {', '.join(wrong)}"
            )

    @property
    def of_timm(self) -> bool:
        """Whether there is a config.json of timm."""
        return "architecture" in self.source.config

    def whole(self, *names: str) -> int | None:
        """The first of some values that there is, a whole number of at least 1.

        Raises:
            CheckpointError: it is something else.
        """
        for name in names:
            value = self._values.get(name)
            if value is not None:
                return _whole(name, value)
        return None

    def size(self, *names: str) -> tuple[int, int] | None:
        """The first of some heights and widths that there is; one number stands for both.

        Raises:
            CheckpointError: it is something else.
        """
        for name in names:
            value = self._values.get(name)
            if value is not None:
                two = value if isinstance(value, list | tuple) and len(value) == 2 else [value] * 2
                return _whole(name, two[0]), _whole(name, two[1])
        return None

    def flag(self, *names: str) -> bool | None:
        """The first of some switches that there is."""
        said = [self._values[name] for name in names if isinstance(self._values.get(name), bool)]
        return said[0] if said else None

    def label_names(self) -> tuple[str, ...] | None:
        """Names of the classes.

        Raises:
            CheckpointError: they are not numbered from 0 on, or are no names of one line each.
        """
        stored = self.source.config.get("id2label")
        timm = _table(self.source.config.get("pretrained_cfg")).get("label_names")
        names = self.source.config.get("label_names", timm)
        if isinstance(stored, dict):
            by_number = {str(key): str(name) for key, name in stored.items()}
            numbers = [str(i) for i in range(len(by_number))]
            if set(by_number) != set(numbers):
                raise CheckpointError(
                    f"id2label must number the classes from 0 on, got {', '.join(by_number)}; give "
                    f"the names: --labels FILE, with that of class i in line i"
                )
            names = [by_number[number] for number in numbers]
        if not isinstance(names, list):
            return None
        odd = [name for name in map(str, names) if name.strip() != name or not name.isprintable()]
        if odd or "" in names:
            raise CheckpointError(
                f"names of classes must be text of one line without spaces around it, got "
                f"{(odd or [''])[0]!r}; give others: --labels FILE, with that of class i in line i"
            )
        return tuple(map(str, names))

    def pixels(self, size: tuple[int, int]) -> Pixels:
        """How frames become those of ``size``, as its preprocessor or timm's config says.

        Raises:
            CheckpointError: mean or deviation are no numbers.
        """
        before = self.source.preprocessor
        if before:
            return _pixels_of_transformers(before, size)
        timm = _table(self.source.config.get("pretrained_cfg"))
        if timm:
            return _pixels_of_timm(timm, size)
        said = self._values
        return Pixels(
            _numbers("image_mean", said.get("image_mean")),
            _numbers("image_std", said.get("image_std")),
            _interpolation(said.get("interpolation")),
            self.whole("short_side"),
            resize="short_side" in said,
        )


def _table(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _wrong(must_be: Mapping[str, tuple[Any, ...]], said: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={said[key]!r}"
        for key, values in must_be.items()
        if key in said and not any(said[key] is each or said[key] == each for each in values)
    ]


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"its {name} must be a whole number of at least 1, got {value!r}; give what it says by "
            f"an option"
        )
    return value


def _numbers(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(each, int | float) for each in value):
        raise CheckpointError(f"its {name} must be a list of numbers, got {value!r}")
    return tuple(map(float, value))


def _interpolation(value: Any) -> Interpolation | None:
    """By its name, or the number that PIL has for it; none where ours has no such."""
    return next((name for name, number in RESAMPLE.items() if value in (name, number)), None)


def _cut(short_side: Any, size: tuple[int, int]) -> int | None:
    """A shorter side of frames that leaves something to cut off, if it is one."""
    usable = isinstance(short_side, int) and short_side > max(size)
    return short_side if usable else None


def _pixels_of_transformers(before: Mapping[str, Any], size: tuple[int, int]) -> Pixels:
    target = before.get("size")
    short_side = _table(target).get("shortest_edge", target)
    squeezed = isinstance(short_side, dict)
    normalised = before.get("do_normalize", True)
    mean, std = before.get("image_mean"), before.get("image_std")
    channels = len(mean) if isinstance(mean, list) else 3
    return Pixels(
        _numbers("image_mean", mean if normalised else [0.0] * channels),
        _numbers("image_std", std if normalised else [1.0] * channels),
        _interpolation(before.get("resample")),
        _cut(short_side, size),
        resize=target is not None,
        otherwise=SQUEEZED if squeezed and before.get("do_resize", True) else "",
    )


SQUEEZED = (
    "frames that are not of this shape were squeezed into it, and here the largest box of the "
    "shape is cut out"
)


def _pixels_of_timm(said: Mapping[str, Any], size: tuple[int, int]) -> Pixels:
    share = said.get("crop_pct")
    if not isinstance(share, int | float) or share <= 0:
        share = None
    mode = said.get("crop_mode", "center")
    return Pixels(
        _numbers("mean", said.get("mean")),
        _numbers("std", said.get("std")),
        _interpolation(said.get("interpolation")),
        _cut(math.floor(max(size) / share), size) if share and mode == "center" else None,
        resize=share is not None,
        otherwise="" if mode == "center" else SQUEEZED,
    )
