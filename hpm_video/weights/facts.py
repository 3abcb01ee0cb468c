"""Facts that stand beside weights: a run's options, config.json, preprocessor_config.json.

One table holds their names in the files of other projects; it is read one way and written the
other. Every value is checked before it is used. A config that no model of this package can have is
refused: the weights alone would fit all the same, and compute something else.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpm_video.config.choices import Interpolation, TransformerSize
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.families import Family
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
"""Keys in a config.json of transformers, and the values that they may have."""
READ_OF_TIMM = re.compile(
    r"img_size|patch_size|in_chans|num_classes|embed_dim|depth|num_heads|mlp_ratio|class_token|"
    r"no_embed_class|global_pool|fc_norm|dynamic_img_(size|pad)|weight_init|fix_init|"
    r"(pos_|patch_|proj_|attn_)?drop_rate|drop_path_rate"
)
"""Keys of timm's model_args that may have any value: they are read, the weights say the same, or
they only matter in training. All others must have timm's default value."""
LABELS = "--labels FILE, with that of class i in line i"
KEYS: dict[str, tuple[str, ...]] = {
    "heads": ("num_attention_heads", "num_heads"),
    "decoder_heads": ("decoder_num_attention_heads",),
    "num_frames": ("num_frames",),
    "frame_size": ("input_size", "image_size", "img_size"),
    "frame_stride": ("sampling_rate",),
    "target": ("norm_pix_loss", "normlize_target"),
    "label_names": ("id2label", "label_names"),
    "mean": ("image_mean",),
    "std": ("image_std",),
    "interpolation": ("interpolation",),
    "short_side": ("short_side",),
}
"""Names of each fact in other projects; it is written by the first."""


@dataclass(frozen=True)
class Overrides:
    """Facts that a user gives, and what to take of a file; ``None`` where nothing is given.

    :func:`read_facts` adds those that lie beside the weights.
    """

    entry: str | None = None
    """Key of the state dict in the file."""
    encoder_only: bool = False
    """Leave out a decoder or a head: what is imported is to be pre-trained."""
    decoder: TransformerSize | None = None
    """Size of a decoder that starts fresh."""
    heads: int | None = None
    decoder_heads: int | None = None
    num_frames: int | None = None
    frame_size: tuple[int, int] | None = None
    frame_stride: int | None = None
    target: TargetKind | None = None
    label_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    short_side: int | None = None
    """To which frames are resized before a crop; 0: the largest box of their shape is cut out."""
    pool: str | None = None
    """timm's global_pool."""
    squeezed: bool = False
    """Frames of another shape were squeezed, which is not done here."""


def read_facts(source: Source, family: Family, given: Overrides) -> Overrides:
    """Return the facts that are given, and all others that lie beside the weights.

    Raises:
        CheckpointError: a config has values that no model of this package can have, or a fact is
            not of its kind.
    """
    config = source.config
    model_config, arguments, pretrained = (
        _table(config, key) for key in ("model_config", "model_args", "pretrained_cfg")
    )
    _refuse_others(config, arguments)
    labels = {key: value for key, value in pretrained.items() if key == "label_names"}
    values = source.arguments | model_config | arguments | labels | config
    size = given.frame_size or _first("frame_size", values) or (224, 224)
    values |= _pixels_of(source.preprocessor, pretrained, max(size))
    standardised: TargetKind = "joint" if family.conventions == "mae" else "per_channel"
    found: dict[str, Any] = {
        name: _first(name, values) for name in KEYS if getattr(given, name) is None
    }
    if isinstance(found.get("target"), bool):
        found["target"] = standardised if found["target"] else "raw"
    pool = arguments.get("global_pool", config.get("global_pool"))
    return replace(given, **found, pool=pool, squeezed=bool(values.get("squeezed")))


def facts_of(model: TrainedModel) -> dict[str, Any]:
    """Return the facts of a model of ours by the first of their names, in plain values."""
    config, data, pretraining = model.config, model.config.data, model.pretraining
    height, width = data.frame_size
    facts: dict[str, Any] = {
        "heads": config.model.encoder.num_heads,
        "num_frames": data.num_frames,
        "frame_size": height if height == width else [height, width],
        "frame_stride": data.frame_stride,
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": data.interpolation,
        "short_side": data.held_out_short_side,
    }
    if pretraining:
        facts["decoder_heads"] = pretraining.model.decoder.num_heads
        facts["target"] = pretraining.mining.target != "raw"
    return {KEYS[name][0]: value for name, value in facts.items()}


def crop_share(size: int, short_side: int | None) -> float:
    """Return timm's crop_pct: timm divides the size by it and drops the fraction."""
    if short_side is None:
        return 1.0
    share = size / short_side
    return share if math.floor(size / share) == short_side else size / (short_side + 0.5)


def _pixels_of(
    preprocessor: Mapping[str, Any], pretrained: Mapping[str, Any], size: int
) -> dict[str, Any]:
    """Return how frames become clips, by the names of :data:`KEYS`; ``size``: longer side."""
    if preprocessor:
        mean, std = (preprocessor.get(key) for key in ("image_mean", "image_std"))
        if not preprocessor.get("do_normalize", True):
            channels = len(mean) if isinstance(mean, list) else 3
            mean, std = [0.0] * channels, [1.0] * channels
        target, how = preprocessor.get("size"), preprocessor.get("resample")
        side = _table(preprocessor, "size").get("shortest_edge", target)
        squeezed = isinstance(side, dict) and preprocessor.get("do_resize", True)
        resized = bool(target)
    elif pretrained:
        mean, std, how = (pretrained.get(key) for key in ("mean", "std", "interpolation"))
        share = pretrained.get("crop_pct")
        squeezed = pretrained.get("crop_mode", "center") != "center"
        resized = isinstance(share, int | float) and share > 0
        side = math.floor(size / share) if isinstance(share, int | float) and share > 0 else 0
    else:
        return {}
    found = {"image_mean": mean, "image_std": std, "interpolation": how, "squeezed": squeezed}
    if resized or squeezed:
        cuts = isinstance(side, int) and side > size and not squeezed
        found["short_side"] = side if cuts else None
    return found


def _first(fact: str, values: Mapping[str, Any]) -> Any:
    """Return a fact from the first of its names that has a value; None where there is none."""
    read: Callable[[str, Any], Any] = READ.get(fact, _count)
    for key in KEYS[fact]:
        if values.get(key) is not None:
            return read(key, values[key])
    return 0 if fact == "short_side" and fact in values else None


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"its {name} must be a whole number of at least 1, got {value!r}; give the right one "
            f"by an option"
        )
    return value


def _size(name: str, value: Any) -> tuple[int, int]:
    """One number stands for height and width."""
    height, width = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    return _count(name, height), _count(name, width)


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(x, int | float) for x in value):
        raise CheckpointError(f"its {name} must be a list of numbers, got {value!r}")
    return tuple(map(float, value))


def _label_names(name: str, value: Any) -> tuple[str, ...] | None:
    if isinstance(value, dict):
        by_number = {str(key): each for key, each in value.items()}
        if by_number.keys() != {str(i) for i in range(len(by_number))}:
            raise CheckpointError(
                f"{name} must number the classes from 0 on, got {', '.join(by_number)}; give the "
                f"names: {LABELS}"
            )
        value = [by_number[str(i)] for i in range(len(by_number))]
    if not isinstance(value, list):
        return None
    for each in map(str, value):
        if not each.isprintable() or each.strip() != each or not each:
            raise CheckpointError(
                f"names of classes must be text of one line without spaces around it, got "
                f"{each!r}; give others: {LABELS}"
            )
    return tuple(map(str, value))


READ: dict[str, Callable[[str, Any], Any]] = {
    "frame_size": _size,
    "target": lambda _, value: value if isinstance(value, bool) else None,
    "label_names": _label_names,
    "mean": _numbers,
    "std": _numbers,
    "interpolation": lambda _, value: next(
        (name for name, number in RESAMPLE.items() if value in (name, number)), None
    ),
}
"""Readers of the facts that are not whole numbers."""


def _refuse_others(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Make sure that a config has no values that no model of this package can have."""
    wrong: list[str] = []
    if "architecture" in config:
        wrong = _unlike_timm(arguments)
    elif "model_config" not in config:
        wrong = [
            f"{key}={config[key]!r}"
            for key, values in OF_TRANSFORMERS.items()
            if config.get(key, values[0]) not in values
        ]
    eps = config.get("layer_norm_eps", SMALLEST_EPS)
    if not isinstance(eps, float) or not SMALLEST_EPS <= eps <= LARGEST_EPS:
        wrong.append(f"layer_norm_eps={eps!r} (ours is 1e-6)")
    if wrong:
        raise CheckpointError(
            f"its config.json has values that no model of this package can have: {', '.join(wrong)}"
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
