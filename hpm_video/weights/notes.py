"""What lies beside weights says of them: a run's options, config.json, preprocessor_config.json.

Every value is checked before it is used. What a config says that no model of ours can be is
refused: the weights alone would fit all the same, and compute something else.
"""

import inspect
import math
import re
from collections.abc import Mapping
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
READ_OF_TIMM = re.compile(
    r"img_size|patch_size|in_chans|num_classes|embed_dim|depth|num_heads|mlp_ratio|class_token|"
    r"no_embed_class|global_pool|fc_norm|dynamic_img_(size|pad)|weight_init|fix_init|"
    r"(pos_|patch_|proj_|attn_)?drop_rate|drop_path_rate"
)
"""Keys of timm's model_args that may say anything: they are read, the weights say the same, or they
only matter in training. All others must say what timm takes by default."""
SQUEEZED = (
    "frames that are not of this shape were squeezed into it, and here the largest box of the "
    "shape is cut out"
)
LABELS = "--labels FILE, with that of class i in line i"


@dataclass(frozen=True)
class Pixels:
    """How frames become what a model takes; none where nothing is said."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    interpolation: Interpolation | None
    short_side: int | None
    resize: bool
    """Whether it is said how frames are resized, if only that they are not cut."""
    squeezed: bool = False


class Notes:
    """The values beside the weights of a source, by their names."""

    def __init__(self, source: Source) -> None:
        """Make sure that no config says what ours cannot be.

        Raises:
            CheckpointError: one does. All such values are named.
        """
        self.config, self.preprocessor = source.config, source.preprocessor
        model_config, model_args, self.pretrained = (
            _table(self.config, key) for key in ("model_config", "model_args", "pretrained_cfg")
        )
        self._values = source.arguments | model_config | model_args | self.config
        of_timm, wrong = "architecture" in self.config, []
        self.pool = self.config.get("global_pool")
        if of_timm:
            self.pool = model_args.get("global_pool", self.pool)
            wrong = _unlike_timm(model_args)
        elif "model_config" not in self.config:
            wrong = [
                f"{key}={self.config[key]!r}"
                for key, values in OF_TRANSFORMERS.items()
                if self.config.get(key, values[0]) not in values
            ]
        eps = self.config.get("layer_norm_eps", SMALLEST_EPS)
        if not isinstance(eps, float) or not SMALLEST_EPS <= eps <= LARGEST_EPS:
            wrong.append(f"layer_norm_eps={eps!r} (ours is 1e-6)")
        if wrong:
            raise CheckpointError(
                f"its config.json says what no model of this package can be: {', '.join(wrong)}"
            )

    def whole(self, *names: str) -> int | None:
        """Return the first whole number of at least 1 that there is by one of these names.

        Raises:
            CheckpointError: it is something else.
        """
        said = [name for name in names if self._values.get(name) is not None]
        return _whole(said[0], self._values[said[0]]) if said else None

    def size(self) -> tuple[int, int] | None:
        """Return height and width of frames, where they are said; one number stands for both.

        Raises:
            CheckpointError: they are something else.
        """
        for name in ("input_size", "image_size", "img_size"):
            value = self._values.get(name)
            if value is not None:
                two = value if isinstance(value, list | tuple) and len(value) == 2 else [value] * 2
                return _whole(name, two[0]), _whole(name, two[1])
        return None

    def flag(self, *names: str) -> bool | None:
        """Return the first of some switches that there is."""
        said = [self._values[name] for name in names if isinstance(self._values.get(name), bool)]
        return said[0] if said else None

    def label_names(self) -> tuple[str, ...] | None:
        """Return the names of the classes.

        Raises:
            CheckpointError: they are not numbered from 0 on, or are no names of one line each.
        """
        names = self.config.get("label_names", self.pretrained.get("label_names"))
        if isinstance(stored := self.config.get("id2label"), dict):
            by_number = {str(key): name for key, name in stored.items()}
            if by_number.keys() != {str(i) for i in range(len(by_number))}:
                raise CheckpointError(
                    f"id2label must number the classes from 0 on, got {', '.join(by_number)}; give "
                    f"the names: {LABELS}"
                )
            names = [by_number[str(i)] for i in range(len(by_number))]
        if not isinstance(names, list):
            return None
        for name in map(str, names):
            if not name.isprintable() or name.strip() != name or not name:
                raise CheckpointError(
                    f"names of classes must be text of one line without spaces around it, got "
                    f"{name!r}; give others: {LABELS}"
                )
        return tuple(map(str, names))

    def pixels(self, size: tuple[int, int]) -> Pixels:
        """Return how frames become those of ``size``, as its preprocessor or timm's config says.

        Raises:
            CheckpointError: mean or deviation are no numbers.
        """
        if said := self.preprocessor:
            mean, std, target = said.get("image_mean"), said.get("image_std"), said.get("size")
            if not said.get("do_normalize", True):
                channels = len(mean) if isinstance(mean, list) else 3
                mean, std = [0.0] * channels, [1.0] * channels
            side = _table(said, "size").get("shortest_edge", target)
            squeezed, told = isinstance(side, dict) and said.get("do_resize", True), bool(target)
            how = said.get("resample")
        elif said := self.pretrained:
            mean, std, how = (said.get(key) for key in ("mean", "std", "interpolation"))
            share, squeezed = said.get("crop_pct"), said.get("crop_mode", "center") != "center"
            side, told = None, isinstance(share, int | float) and share > 0
            if isinstance(share, int | float) and told and not squeezed:
                side = math.floor(max(size) / share)
        else:
            said, squeezed, told = self._values, False, "short_side" in self._values
            mean, std, how = (said.get(key) for key in ("image_mean", "image_std", "interpolation"))
            side = self.whole("short_side")
        cuts = isinstance(side, int) and (side > max(size) or said is self._values)
        return Pixels(
            _numbers("mean", mean),
            _numbers("deviation", std),
            next((name for name, number in RESAMPLE.items() if how in (name, number)), None),
            side if cuts else None,
            resize=told,
            squeezed=squeezed,
        )


def _unlike_timm(arguments: Mapping[str, Any]) -> list[str]:
    from timm.models.vision_transformer import VisionTransformer

    usual = inspect.signature(VisionTransformer).parameters
    return [
        f"{key}={value!r}"
        for key, value in arguments.items()
        if not READ_OF_TIMM.fullmatch(key)
        and (key, value) != ("act_layer", "gelu")
        and not (key in usual and value == usual[key].default)
    ]


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return dict(value) if isinstance(value, Mapping) else {}


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
    if not isinstance(value, list | tuple) or not all(isinstance(x, int | float) for x in value):
        raise CheckpointError(f"its {name} of the pixels must be a list of numbers, got {value!r}")
    return tuple(map(float, value))
