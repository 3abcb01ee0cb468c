"""The forms in which other projects hold models, and how a model of ours is brought into one."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpm_video.config.choices import Pooling, Positions
from hpm_video.files.weights import CheckpointError
from hpm_video.models.positions import position_table
from hpm_video.weights import layouts
from hpm_video.weights.files import Tensors
from hpm_video.weights.layouts import Layout, PositionTable, to_theirs
from hpm_video.weights.own import PIXELS, OwnModel

SAME_POSITIONS = 1e-5
ANY = "--to file takes every model, --to onnx every classifier"
BATCH_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Limit:
    """What a form cannot express."""

    fits: Callable[[OwnModel], bool]
    says: str
    """What the model is, and why that has no place."""
    remedy: str = ANY


@dataclass(frozen=True)
class Form:
    """A kind of model of another project."""

    name: str
    layout: Layout
    limits: tuple[Limit, ...]
    encoder_only: bool = False
    """Whether it has no decoder."""

    @property
    def as_it_is(self) -> bool:
        """Whether it takes the model of ours itself, and no tensors by other names."""
        return not self.layout.rules


@dataclass(frozen=True)
class Expressed:
    """A model of ours by the names of another project."""

    form: Form
    tensors: Tensors
    left_out: dict[str, str] = field(default_factory=dict)
    """Parts of ours that have no place there, each with the reason."""
    notes: tuple[str, ...] = ()
    """What was made otherwise, with the same result."""


# --- What can be expressed ----------------------------------------------------------------------


def _has_positions(own: OwnModel, kind: Positions) -> bool:
    """Whether its tokens have the positions that a model of this kind has of its own clips."""
    shape = own.shape
    usual = position_table(shape.grid, shape.size.dim, kind)
    return (own.positions("encoder") - usual).abs().max().item() <= SAME_POSITIONS


def _is_image(own: OwnModel) -> bool:
    return own.clip_size[0] == 1 and own.shape.patch_size[0] == 1


def _pools(*kinds: Pooling) -> Callable[[OwnModel], bool]:
    return lambda own: own.pooling in kinds


def _has_room_for_pooling(own: OwnModel) -> bool:
    """Whether its pooling is that of a vision transformer for images, or can become it."""
    return own.pooling != "attentive"


IMAGES = Limit(_is_image, "it takes clips of several frames, and this takes images")
NO_CLASS_TOKEN = Limit(
    lambda own: not own.shape.class_token, "it has a class token, which VideoMAE has not"
)
CLASS_TOKEN = Limit(lambda own: own.shape.class_token, "it has no class token, which this needs")
SEQUENCE = Limit(
    lambda own: _has_positions(own, "sequence"),
    "its tokens have other positions than VideoMAE computes: only model.positions=sequence can be "
    "expressed, of clips of the size of pre-training",
)
SPACE_TIME = Limit(
    lambda own: own.shape.positions == "given" or _has_positions(own, "space_time"),
    "its tokens have other positions than MAE computes: only model.positions=space_time can be "
    "expressed, of images of the size of pre-training, or given ones",
)
OF_PIXELS = Limit(
    lambda own: own.target in PIXELS,
    "its decoder predicts features (mining.target), and this has a decoder of pixels",
)
NO_DECODER_BIAS = Limit(
    lambda own: "to_decoder.bias" not in own.tensors,
    "its layer from encoder to decoder has a bias (model.conventions=mae), and VideoMAE's has none",
)
SQUARE_PATCHES = Limit(
    lambda own: own.shape.patch_size[1] == own.shape.patch_size[2],
    "its patches are not square, and those of this are",
)
SQUARE_FRAMES = Limit(
    lambda own: own.clip_size[1] == own.clip_size[2],
    "its frames are not square, and those of this are",
)
MEAN_NORM = Limit(
    _pools("mean_norm"),
    "its head does not stand on the normed mean of the tokens (model.pooling=mean_norm), as "
    "VideoMAE's does",
)
ON_CLASS_TOKEN = Limit(
    _pools("class_token", "batch_norm"),
    "its head does not stand on the class token (model.pooling=class_token), as this one's does",
    "--to timm takes mean_norm too",
)
CLASSIFIER = Limit(
    lambda own: own.is_classifier,
    "it is of pre-training, and this takes classifiers",
    "fine-tune it first (./run_finetune.sh CONFIG init_weights=CHECKPOINT)",
)
PREDICTOR = Limit(
    lambda own: any(name.startswith("difficulty_decoder.") for name in own.tensors),
    "it has no loss predictor, or is a classifier, and this is of hard patches mining",
    "--to mae takes the others",
)
POOLS_OF_TIMM = Limit(
    _has_room_for_pooling,
    "it pools its tokens by attention (model.pooling=attentive), which this does not",
)

# --- The forms ----------------------------------------------------------------------------------

VIDEOMAE_AUTOENCODER = (NO_CLASS_TOKEN, SEQUENCE, OF_PIXELS, NO_DECODER_BIAS)
VIDEOMAE_CLASSIFIER = (NO_CLASS_TOKEN, SEQUENCE, MEAN_NORM)
MAE_AUTOENCODER = (IMAGES, CLASS_TOKEN, SPACE_TIME, OF_PIXELS, SQUARE_PATCHES)

FORMS = {
    "videomae": Form("VideoMAE's pre-training", layouts.VIDEOMAE, VIDEOMAE_AUTOENCODER),
    "videomae_classifier": Form(
        "VideoMAE's classifier", layouts.VIDEOMAE_FINETUNED, VIDEOMAE_CLASSIFIER
    ),
    "mae": Form("MAE's pre-training", layouts.MAE, MAE_AUTOENCODER),
    "hpm": Form("official HPM", layouts.HPM, (*MAE_AUTOENCODER, PREDICTOR)),
    "mae_classifier": Form(
        "MAE's classifier",
        layouts.VIT,
        (IMAGES, CLASS_TOKEN, SPACE_TIME, POOLS_OF_TIMM, SQUARE_PATCHES),
    ),
    "timm": Form(
        "timm's vision transformer",
        layouts.VIT,
        (IMAGES, POOLS_OF_TIMM, SQUARE_PATCHES),
        encoder_only=True,
    ),
    "VideoMAEForPreTraining": Form(
        "VideoMAEForPreTraining of transformers",
        layouts.TRANSFORMERS_VIDEOMAE,
        (*VIDEOMAE_AUTOENCODER, SQUARE_PATCHES),
    ),
    "VideoMAEForVideoClassification": Form(
        "VideoMAEForVideoClassification of transformers",
        layouts.TRANSFORMERS_VIDEOMAE_CLASSIFIER,
        (*VIDEOMAE_CLASSIFIER, SQUARE_PATCHES),
    ),
    "ViTMAEForPreTraining": Form(
        "ViTMAEForPreTraining of transformers",
        layouts.TRANSFORMERS_VITMAE,
        (*MAE_AUTOENCODER, SQUARE_FRAMES),
    ),
    "ViTForImageClassification": Form(
        "ViTForImageClassification of transformers",
        layouts.TRANSFORMERS_VIT_CLASSIFIER,
        (IMAGES, CLASS_TOKEN, ON_CLASS_TOKEN, SQUARE_PATCHES),
    ),
}


ONNX = Form("a program of ONNX", Layout(()), (CLASSIFIER,))
OWN = Form("one file of this package", Layout(()), ())


def of_transformers(own: OwnModel) -> str:
    """The model of transformers that is nearest: a class token is MAE's, and none VideoMAE's."""
    if own.shape.class_token:
        return "ViTForImageClassification" if own.is_classifier else "ViTMAEForPreTraining"
    return "VideoMAEForVideoClassification" if own.is_classifier else "VideoMAEForPreTraining"


# --- Bringing a model into a form ---------------------------------------------------------------

OF_DECODER = ("mask_token", "to_decoder.", "reconstructor.", "decoder_positions.")
OF_TABLES = ("encoder_positions.table", "decoder_positions.table")
"""Given positions, which go where a layout has its tables."""
NO_PREDICTOR = "the loss predictor is of hard patches mining alone"
NO_DECODER = "it belongs to the decoder, and this is an encoder"
NO_KEY_BIAS = "a bias on keys, which this has not; the softmax ignores it, so that nothing changes"


def express(own: OwnModel, form: Form) -> Expressed:
    """A model of ours by the names of another project.

    Raises:
        CheckpointError: the form cannot express it. Every reason is given.
    """
    wrong = [f"{limit.says}; {limit.remedy}" for limit in form.limits if not limit.fits(own)]
    if wrong:
        raise CheckpointError(
            "\n  ".join([f"{own.checkpoint} cannot become {form.name}:", *dict.fromkeys(wrong)])
        )
    if form.as_it_is:
        return Expressed(form, {})
    tensors, notes = dict(own.tensors), []
    if own.pooling == "batch_norm":
        tensors = fold_batch_norm(tensors)
        notes.append("the batch norm before the head is folded into the head")
    named = {name for rule in form.layout.rules for name in rule.ours}
    reasons = {name: _no_place(name, form, named) for name in tensors}
    tensors = {name: value for name, value in tensors.items() if not reasons[name]}
    tensors = {name: value for name, value in tensors.items() if name not in OF_TABLES}
    filled = _filled(tensors, named)
    if filled:
        tensors |= filled
        notes.append(f"biases that this has and ours has not are 0 ({len(filled)} tensors)")
    theirs = to_theirs(form.layout, tensors, own.cut) | _tables(own, form)
    if own.further_sources:
        notes.append(
            f"of the clips that it was pre-trained on, this knows those of the main source alone, "
            f"not those of {', '.join(own.further_sources)}"
        )
    left_out = {name: reason for name, reason in reasons.items() if reason}
    return Expressed(form, theirs, left_out, tuple(notes))


def _tables(own: OwnModel, form: Form) -> Tensors:
    """The positions, where a checkpoint keeps them."""
    return {
        table.theirs[0]: _table(table, own)
        for table in form.layout.tables
        if table.of == "encoder" or not (form.encoder_only or own.is_classifier)
    }


def _no_place(name: str, form: Form, named: set[str]) -> str:
    """Why a tensor of ours is left out, if it is."""
    if name.startswith("difficulty_decoder.") and not _names_a_predictor(named):
        return NO_PREDICTOR
    if form.encoder_only and name.startswith(OF_DECODER):
        return NO_DECODER
    if name.endswith(".k_bias") and not any(each.endswith(".k_bias") for each in named):
        return NO_KEY_BIAS
    return ""


def _names_a_predictor(named: set[str]) -> bool:
    return any(name.startswith("difficulty_decoder.") for name in named)


def _filled(tensors: Tensors, named: set[str]) -> Tensors:
    """Biases of 0 that a layout has and the model has not."""
    found = {}
    if any(each.endswith(".k_bias") for each in named):
        for name, value in tensors.items():
            of_keys = name.replace(".q_bias", ".k_bias")
            if name.endswith(".q_bias") and of_keys not in tensors:
                found[of_keys] = torch.zeros_like(value)
    if "to_decoder.bias" in named and "to_decoder.weight" in tensors:
        bias = tensors["to_decoder.weight"].new_zeros(len(tensors["to_decoder.weight"]))
        found |= {} if "to_decoder.bias" in tensors else {"to_decoder.bias": bias}
    return found


def fold_batch_norm(tensors: Tensors) -> Tensors:
    """A head behind a batch norm as a head alone, which computes the same in use."""
    kept = {name: value for name, value in tensors.items() if not name.startswith("pooling.")}
    mean = tensors["pooling.norm.running_mean"].double()
    scale = (tensors["pooling.norm.running_var"].double() + BATCH_NORM_EPS).sqrt()
    weight = tensors["head.weight"].double() / scale
    bias = tensors["head.bias"].double() - weight @ mean
    return kept | {"head.weight": weight.float(), "head.bias": bias.float()}


def _table(table: PositionTable, own: OwnModel) -> Tensor:
    """Positions as a checkpoint keeps them: -> (1, N, D), or one more for a class token"""
    codes = own.positions(table.of)
    if own.shape.class_token:
        codes = torch.cat([torch.zeros_like(codes[:1]), codes])
    return codes.unsqueeze(0)
