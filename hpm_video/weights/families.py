"""The kinds of weights that are read and written: their names, what tells them apart, licences."""

from dataclasses import dataclass, replace
from typing import Literal

from hpm_video.config.choices import Conventions
from hpm_video.tokens.grid import Size3
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.files import Tensors
from hpm_video.weights.layouts import FIRST, KERNEL, SPACE, TIME, Layout, Pairs, Renamed, read

Holds = Literal["autoencoder", "encoder", "classifier"]
"""What a file holds: encoder and decoder, an encoder alone, or an encoder with a head."""

NON_COMMERCIAL = "CC-BY-NC 4.0: no commercial use, name the authors"
LICENCES = {
    "hpm": "HPM's code is Apache-2.0 and derived from MAE, which is CC-BY-NC 4.0; of the weights "
    "its authors say nothing: take them as CC-BY-NC 4.0",
    "mae_st": f"Meta's weights of MAE for video are {NON_COMMERCIAL}",
    "mae": f"MAE's weights are {NON_COMMERCIAL}",
    "vit": "MAE's encoders and fine-tuned models have these names too, and MAE's weights are "
    f"{NON_COMMERCIAL}; of timm's models each has its own licence, see its card",
    "videomae": f"the weights of VideoMAE and VideoMAE V2 are {NON_COMMERCIAL}",
    "transformers_videomae": f"if these descend from VideoMAE: its weights are {NON_COMMERCIAL}",
    "transformers_vitmae": f"if these descend from MAE: its weights are {NON_COMMERCIAL}",
    "transformers_vit": "each model has its own licence, see its card; if these descend from MAE: "
    f"its weights are {NON_COMMERCIAL}",
    "ours": "that of what it was trained on and began with; this project's code is Apache-2.0",
}
"""What is known of the licences of weights, by how the names of families begin."""

# --- Names ----------------------------------------------------------------------------------------


def _same(*names: str) -> Pairs:
    return tuple((name, name) for name in names)


def _under(prefix: str, pairs: Pairs) -> Pairs:
    return tuple((prefix + theirs, timm) for theirs, timm in pairs)


ENCODER = _same("patch_embed.proj", "blocks", "norm")
IMAGES = _same("cls_token", "pos_embed") + ENCODER
HEAD = _same("fc_norm", "head")
MAE_DECODER = (
    *_same("mask_token", "decoder_pos_embed"),
    ("decoder_embed", "to_decoder"),
    ("decoder_blocks", "reconstructor.blocks"),
    ("decoder_norm", "reconstructor.norm"),
    ("decoder_pred", "reconstructor.head"),
)
HPM_PREDICTOR = (
    ("decoder_blocks_losspred", "difficulty_decoder.blocks"),
    ("decoder_norm_losspred", "difficulty_decoder.norm"),
    ("decoder_pred_losspred", "difficulty_decoder.head"),
)
VIDEOMAE_DECODER = (
    ("mask_token", "mask_token"),
    ("encoder_to_decoder", "to_decoder"),
    ("decoder.blocks", "reconstructor.blocks"),
    ("decoder.norm", "reconstructor.norm"),
    ("decoder.head", "reconstructor.head"),
)
TRANSFORMERS_BLOCK = (
    ("layernorm_before", "norm1"),
    ("attention.attention.query", "attn.q"),
    ("attention.attention.key", "attn.k"),
    ("attention.attention.value", "attn.v"),
    ("attention.output.dense", "attn.proj"),
    ("layernorm_after", "norm2"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    # Of models of transformers 5, where they are called otherwise.
    ("attention.q_proj", "attn.q"),
    ("attention.k_proj", "attn.k"),
    ("attention.v_proj", "attn.v"),
    ("attention.o_proj", "attn.proj"),
)
TRANSFORMERS_CLIPS = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer", "blocks"),
    ("layernorm", "norm"),
)
TRANSFORMERS_IMAGES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    *TRANSFORMERS_CLIPS,
    ("layers", "blocks"),
)
TRANSFORMERS_VIDEOMAE_DECODER = (
    ("decoder.decoder_layers", "reconstructor.blocks"),
    *(pair for pair in VIDEOMAE_DECODER if pair[0] != "decoder.blocks"),
)
TRANSFORMERS_VITMAE_DECODER = (
    ("decoder.mask_token", "mask_token"),
    ("decoder.decoder_pos_embed", "decoder_pos_embed"),
    ("decoder.decoder_embed", "to_decoder"),
    ("decoder.decoder_layers", "reconstructor.blocks"),
    ("decoder.decoder_encoder.layer", "reconstructor.blocks"),
    ("decoder.decoder_norm", "reconstructor.norm"),
    ("decoder.decoder_pred", "reconstructor.head"),
)
OURS = Layout(
    (
        ("patch_embed", "patch_embed.proj"),
        ("class_token", "cls_token"),
        ("encoder.blocks", "blocks"),
        ("encoder.norm", "norm"),
        ("pooling.norm", "fc_norm"),
        *_same("head", "mask_token", "to_decoder", "reconstructor.head", "difficulty_decoder.head"),
        ("reconstructor.transformer", "reconstructor"),
        ("difficulty_decoder.transformer", "difficulty_decoder"),
        ("encoder_positions.table", "pos_embed"),
        ("decoder_positions.table", "decoder_pos_embed"),
    ),
    2,
    (
        *((f"attn.{part}_bias", f"attn.{part}.bias") for part in "qkv"),
        ("mlp.0", "mlp.fc1"),
        ("mlp.2", "mlp.fc2"),
    ),
    split="biases",
)
VIT = Layout(IMAGES + HEAD, 4)
MAE = Layout(IMAGES + MAE_DECODER, 4)
HPM = Layout(MAE.parts + HPM_PREDICTOR, 4, score_of_values=True)
MAE_ST = Layout(
    _same("cls_token", SPACE, TIME, FIRST, "head") + ENCODER,
    5,
    split="all",
    left_out=(
        (
            r"decoder_.+|mask_token|pred_head\..+",
            "its decoder has a class token and positions of its own, which ours has not",
        ),
    ),
)


def _videomae(parts: Pairs) -> Layout:
    inner = (("attn.q_bias", "attn.q.bias"), ("attn.v_bias", "attn.v.bias"))
    return Layout(parts, 5, inner, split="biases", key_bias=False)


def _transformers_videomae(parts: Pairs) -> Layout:
    of_biases = tuple((f"attention.attention.{part}_bias", f"attn.{part}.bias") for part in "qv")
    return Layout(parts, 5, of_biases + TRANSFORMERS_BLOCK, split="all", key_bias=False)


def _transformers_vit(parts: Pairs) -> Layout:
    left_out = (
        (r"(vit\.)?pooler\..+", "our encoder ends with its norm"),
        (r"(vit\.)?embeddings\.mask_token", "our encoder sees no hidden patches"),
    )
    return Layout(parts, 4, TRANSFORMERS_BLOCK, split="all", left_out=left_out)


def read_ours(tensors: Tensors, patch_size: Size3) -> Renamed:
    """Return the tensors of a model of ours by timm's names, with biases of 0 on keys if none."""
    key_bias = any(name.endswith(".k_bias") for name in tensors)
    return read(replace(OURS, key_bias=key_bias), tensors, patch_size)


# --- Families -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind of one project."""

    name: str
    says: str
    """What they are."""
    layout: Layout
    has: tuple[str, ...]
    """Tensors that all of them have, beside the patch embedding."""

    @property
    def kernel(self) -> str:
        """The weight of the patch embedding."""
        return self.layout.theirs(KERNEL)

    @property
    def holds(self) -> Holds:
        """What of a model it has."""
        decodes = self.layout.theirs("reconstructor.head") and self.name != "ours_classifier"
        classifies = self.name.endswith("classifier")
        return "autoencoder" if decodes else "classifier" if classifies else "encoder"

    @property
    def licence(self) -> str:
        """What is known of their licence."""
        return next(text for kind, text in LICENCES.items() if self.name.startswith(kind))

    @property
    def transformers_class(self) -> str:
        """Its class there, where it is of transformers."""
        return self.says.partition(" ")[0] if self.name.startswith("transformers") else ""

    @property
    def ours(self) -> bool:
        """Whether this package wrote it."""
        return self.layout is OURS

    @property
    def conventions(self) -> Conventions:
        """Which paper's models they are."""
        return "videomae" if "videomae" in self.name or self.ours else "mae"

    @property
    def needs_class_token(self) -> bool:
        """Whether all of them have one."""
        return self.name in ("hpm", "mae", "mae_st", "mae_st_classifier")

    @property
    def target(self) -> TargetKind:
        """What pre-training predicts, unless the file says otherwise."""
        if self.name in ("hpm", "transformers_vitmae"):
            return "raw"
        return "joint" if self.conventions == "mae" else "per_channel"

    @property
    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return those of the pixels, unless the file says otherwise."""
        if self.name == "transformers_vit_classifier":
            return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        if self.name.startswith("mae_st"):
            return (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def fits(self, tensors: Tensors) -> bool:
        """Whether tensors with these names may be of this family."""
        kernel = tensors.get(self.kernel)
        axes = self.layout.kernel_axes
        return kernel is not None and kernel.ndim == axes and all(n in tensors for n in self.has)


FUSED, SEPARATE = "blocks.0.attn.qkv.weight", "blocks.0.attn.q.weight"
SCORES = "decoder_pred_losspred.weight"
CLIPS_OF_TRANSFORMERS = _under("videomae.", TRANSFORMERS_CLIPS)
IMAGES_OF_TRANSFORMERS = _under("vit.", TRANSFORMERS_IMAGES)
CLASSIFIER = (("classifier", "head"),)
_FAMILIES = (
    ("hpm", "official HPM of images", HPM, (FUSED, "decoder_pred.weight", SCORES)),
    ("mae", "MAE pre-training", MAE, (FUSED, "decoder_pred.weight")),
    ("vit", "encoder of MAE or timm's ViT", VIT, (FUSED,)),
    (
        "vit_classifier",
        "classifier of images: MAE fine-tuned, or timm's ViT",
        VIT,
        (FUSED, "head.weight"),
    ),
    ("mae_st", "encoder of Meta's MAE for video", MAE_ST, (SEPARATE,)),
    (
        "mae_st_classifier",
        "classifier of clips: Meta's MAE for video, fine-tuned",
        MAE_ST,
        (SEPARATE, "head.weight"),
    ),
    (
        "videomae",
        "VideoMAE pre-training, first or second version",
        _videomae(_under("encoder.", ENCODER) + VIDEOMAE_DECODER),
        (f"encoder.{FUSED}", "encoder_to_decoder.weight"),
    ),
    (
        "videomae_encoder",
        "encoder of VideoMAE, first or second version",
        _videomae(ENCODER + HEAD),
        (FUSED,),
    ),
    (
        "videomae_classifier",
        "VideoMAE fine-tuned or distilled, first or second version",
        _videomae(ENCODER + HEAD),
        (FUSED, "head.weight"),
    ),
    (
        "transformers_videomae",
        "VideoMAEForPreTraining of transformers",
        _transformers_videomae(CLIPS_OF_TRANSFORMERS + TRANSFORMERS_VIDEOMAE_DECODER),
        ("encoder_to_decoder.weight",),
    ),
    (
        "transformers_videomae_classifier",
        "VideoMAEForVideoClassification of transformers",
        _transformers_videomae(CLIPS_OF_TRANSFORMERS + _same("fc_norm") + CLASSIFIER),
        ("classifier.weight",),
    ),
    (
        "transformers_videomae_encoder",
        "VideoMAEModel of transformers",
        _transformers_videomae(TRANSFORMERS_CLIPS),
        (),
    ),
    (
        "transformers_vitmae",
        "ViTMAEForPreTraining of transformers",
        _transformers_vit(IMAGES_OF_TRANSFORMERS + TRANSFORMERS_VITMAE_DECODER),
        ("decoder.decoder_pred.weight",),
    ),
    (
        "transformers_vit_classifier",
        "ViTForImageClassification of transformers",
        _transformers_vit(IMAGES_OF_TRANSFORMERS + CLASSIFIER),
        ("classifier.weight",),
    ),
    (
        "transformers_vit_encoder",
        "ViTModel or ViTMAEModel of transformers",
        _transformers_vit(TRANSFORMERS_IMAGES),
        (),
    ),
    ("ours", "pre-training with this package", OURS, ("to_decoder.weight",)),
    ("ours_classifier", "classifier of this package", OURS, ("head.weight",)),
)
FAMILIES = {row[0]: Family(*row) for row in _FAMILIES}
