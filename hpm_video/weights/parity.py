"""Whether imported weights compute here what they compute in an independent implementation.

Names go from the files to the other implementation by a table of its own, not through our names: a
mistake in our tables must not cancel out. The implementations are those of transformers, which need
not be installed, and of timm.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpm_video.masking import STRATEGIES, MaskRule, TokenMask, count_masked
from hpm_video.models.classifier import ClipClassifier, Pooling
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.models.pos_embed import position_table
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.training.checkpoint import CheckpointError
from hpm_video.weights.files import Tensors
from hpm_video.weights.imported import Imported

TOLERANCE = 1e-4
"""Largest difference in single precision, as a share of the largest value."""
SMALLEST = 1e-6
"""A largest value that is smaller than this counts as this."""
RATIO = 0.75
Pairs = tuple[tuple[str, str], ...]
OF_TIMM = ("vit", "vit_classifier")
"""Families that timm has."""
TIMM_POOLING: dict[Pooling | None, Any] = {None: "", "mean_norm": "avg", "class_token": "token"}


@dataclass(frozen=True)
class Difference:
    """Of what two models say about the same clip."""

    of: str
    largest: float
    largest_value: float
    """Of the other implementation."""

    @property
    def share(self) -> float:
        """The difference as a share of the largest value; scores may all be small."""
        return self.largest / max(SMALLEST, self.largest_value)


@dataclass(frozen=True)
class ParityReport:
    """What a comparison found."""

    with_what: str
    """The other implementation; empty where there was none."""
    differences: tuple[Difference, ...] = ()
    not_checked: str = ""
    """Why nothing, or not everything, was compared."""
    notes: tuple[str, ...] = ()
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether no difference is above the tolerance."""
        return all(found.share <= self.tolerance for found in self.differences)

    def lines(self) -> list[str]:
        """For the terminal."""
        told = [
            f"parity with {self.with_what}, {found.of}: largest difference {found.largest:.1e} of "
            f"values up to {found.largest_value:.2g}"
            for found in self.differences
        ]
        if self.not_checked:
            told.append(f"parity not checked: {self.not_checked}")
        return told + list(self.notes)

    def as_table(self) -> dict[str, Any]:
        """For a file."""
        return {**asdict(self), "holds": self.holds}


def compare(
    imported: Imported, tolerance: float = TOLERANCE, *, skip: bool = False
) -> ParityReport:
    """The imported model and an independent one with the same weights, on the same random clip.

    ``skip``: only say that it was not done.

    Raises:
        CheckpointError: they differ by more than the tolerance.
    """
    reason = "it was not asked for" if skip else _not_comparable(imported)
    if reason:
        return ParityReport("", not_checked=reason, tolerance=tolerance)
    model = imported.build().eval()
    _ours_ready(model, imported)
    clip = torch.randn(
        1,
        imported.facts.cut.channels,
        *imported.facts.clip_size,
        generator=torch.Generator().manual_seed(0),
    )
    noise = torch.rand(
        1, imported.facts.grid.num_tokens, generator=torch.Generator().manual_seed(1)
    )
    peer = PEERS[imported.family.name](imported)
    with torch.no_grad():
        ours = _ours(model, imported, clip, noise)
        own_eps, notes = imported.source.config.get("layer_norm_eps"), []
        if imported.positions_replaced:
            notes.append("both with the computed positions, which are not those of the file")
        if own_eps not in (None, LAYER_NORM_EPS):
            (first, *_) = _differences(ours, peer.say(clip, noise))
            notes.append(
                f"its config has layer_norm_eps {own_eps:g}, where the original and ours have "
                f"{LAYER_NORM_EPS:g}: with that one {first.of} differ by {first.largest:.1e}"
            )
        peer.set_eps(LAYER_NORM_EPS)
        found = _differences(ours, peer.say(clip, noise))
    report = ParityReport(peer.name, found, notes=tuple(notes), tolerance=tolerance)
    if not report.holds:
        raise CheckpointError(
            "the imported model computes something else than the original:\n  "
            + "\n  ".join(report.lines())
            + f"\nmore than {tolerance:g} of the largest value is too much"
        )
    return report


def _not_comparable(imported: Imported) -> str:
    name = imported.family.name
    if name not in PEERS:
        return "there is no independent implementation of this family"
    if name not in OF_TIMM and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    _, height, width = imported.facts.clip_size
    if name not in OF_TIMM and height != width:
        return "transformers has square frames only"
    return ""


def _differences(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> tuple[Difference, ...]:
    return tuple(
        Difference(
            name,
            (ours[name] - theirs[name]).abs().max().item(),
            theirs[name].abs().max().item(),
        )
        for name in theirs
    )


# --- Our side -----------------------------------------------------------------------------------


def _ours_ready(model: nn.Module, imported: Imported) -> None:
    left = model.load_state_dict(imported.tensors, strict=False)
    assert not left.unexpected_keys


def _mask(imported: Imported, noise: Tensor) -> TokenMask:
    grid = imported.facts.grid
    num_masked = count_masked(grid.num_tokens, RATIO, "hpm")
    return MaskRule(grid, "token", num_masked, STRATEGIES["random"]).draw(None, noise, num_picked=0)


def _ours(model: nn.Module, imported: Imported, clip: Tensor, noise: Tensor) -> dict[str, Tensor]:
    if isinstance(model, ClipClassifier):
        return {"logits": model(clip)}
    assert isinstance(model, MaskedAutoencoder)
    said = {"tokens": model.encode(clip)}
    if "reconstructor.head.weight" in imported.tensors:
        predicted = model(clip, _mask(imported, noise))
        said["hidden patches"] = predicted.content
        if predicted.difficulty is not None:
            said["difficulty"] = predicted.difficulty
    return said


# --- The other side -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """Another implementation with the weights of the file."""

    name: str
    models: tuple[nn.Module, ...]
    say: Callable[[Tensor, Tensor], dict[str, Tensor]]
    """(1, C, T, H, W) a clip, (1, N) noise that decides which tokens are hidden"""

    def set_eps(self, eps: float) -> None:
        """Of all layer norms."""
        for model in self.models:
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = eps


WITHIN_BLOCKS: Pairs = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.q_bias$", ".attention.attention.query.bias"),
    (r"\.attn\.v_bias$", ".attention.attention.value.bias"),
)
"""Names of the original projects, as regular expressions, and of transformers."""
OF_VIDEOMAE: Pairs = (
    (r"^(encoder\.)?patch_embed\.proj\.", "videomae.embeddings.patch_embeddings.projection."),
    (r"^decoder\.blocks\.", "decoder.decoder_layers."),
    (r"^(encoder\.)?blocks\.", "videomae.encoder.layer."),
    (r"^(encoder\.)?norm\.", "videomae.layernorm."),
    (r"^head\.", "classifier."),
    *WITHIN_BLOCKS,
)
OF_MAE: Pairs = (
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^norm\.", "vit.layernorm."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^decoder_(embed|norm|pred|pos_embed)(\.|$)", r"decoder.decoder_\1\2"),
    *WITHIN_BLOCKS,
)
OLDER_AND_NEWER: Pairs = (
    ("vit.encoder.layer.", "vit.layers."),
    ("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("attention.attention.q_bias", "attention.attention.query.bias"),
    ("attention.attention.v_bias", "attention.attention.value.bias"),
)
"""Names of older and of newer versions of transformers. A model has either."""


def _renamed(tensors: Mapping[str, Tensor], pairs: Pairs) -> Tensors:
    """Names of the original projects in those of transformers."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        at, dot, ending = name.partition("attn.qkv.")
        if not dot:
            found[name] = tensor
            continue
        for part, share in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            found[f"{at}attention.attention.{part}.{ending}"] = share
    return found


def _give(model: nn.Module, tensors: Tensors, may_leave: str = r"^$") -> None:
    """Load weights by whichever names this version of transformers has.

    Raises:
        CheckpointError: they do not fit.
    """
    own = model.state_dict()
    named: Tensors = {}
    for name, tensor in tensors.items():
        newer = older = name
        for old, new in OLDER_AND_NEWER:
            newer, older = newer.replace(old, new), older.replace(new, old)
        named[next((each for each in (name, newer, older) if each in own), name)] = tensor
    left = [name for name in named if name not in own and not re.search(may_leave, name)]
    missing = [name for name in own if name not in named]
    if left or missing:
        raise CheckpointError(
            f"the other implementation has {missing or 'nothing'} that the file lacks, and lacks "
            f"{left or 'nothing'}: its version may be too new; parity cannot be checked"
        )
    model.load_state_dict({name: value.float() for name, value in named.items() if name in own})


def _norm_of_ones(tensors: Tensors, name: str, dim: int) -> None:
    """Where there is no norm: that of a fresh one."""
    tensors.setdefault(f"{name}.weight", torch.ones(dim))
    tensors.setdefault(f"{name}.bias", torch.zeros(dim))


def _with_table(tensors: Tensors, name: str, imported: Imported, dim: int) -> None:
    """Computed positions, where the file has none, or where they give way to computed ones."""
    if name in tensors and not imported.positions_replaced:
        return
    facts = imported.facts
    table = position_table(facts.grid, dim, facts.positions).unsqueeze(0)
    if facts.class_token:
        stored = tensors.get(name)
        has_row = stored is not None and stored.shape[1] > table.shape[1]
        first = stored[:, :1].float() if stored is not None and has_row else table[:, :1] * 0
        table = torch.cat([first, table], dim=1)
    tensors[name] = table


def _transformers() -> Any:
    import transformers

    return transformers


def _encoder_options(imported: Imported) -> dict[str, Any]:
    facts = imported.facts
    size = facts.encoder
    return {
        "image_size": facts.clip_size[1],
        "patch_size": facts.cut.patch_size[1],
        "num_channels": facts.cut.channels,
        "hidden_size": size.dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.mlp_dim or 4 * size.dim,
        "layer_norm_eps": imported.source.config.get("layer_norm_eps", LAYER_NORM_EPS),
    }


def _decoder_options(imported: Imported) -> dict[str, Any]:
    size = imported.facts.decoder
    assert size is not None
    return {
        "decoder_hidden_size": size.dim,
        "decoder_num_hidden_layers": size.depth,
        "decoder_num_attention_heads": size.num_heads,
        "decoder_intermediate_size": size.mlp_dim or 4 * size.dim,
    }


def _videomae(imported: Imported) -> Peer:
    """VideoMAE of transformers."""
    library, facts = _transformers(), imported.facts
    from_project = imported.family.layout.rules[0].theirs[0].find("projection") < 0
    tensors = dict(imported.recognised.tensors)
    if from_project:
        tensors = _renamed(tensors, OF_VIDEOMAE)
        tensors = {name: value for name, value in tensors.items() if not name.endswith(".key.bias")}
    elif imported.family.holds == "encoder":
        tensors = {f"videomae.{name}": value for name, value in tensors.items()}
    options = _encoder_options(imported) | {
        "num_frames": facts.clip_size[0],
        "tubelet_size": facts.cut.patch_size[0],
        "use_mean_pooling": imported.is_classifier,
        "num_labels": max(2, len(facts.label_names)),
    }
    if imported.is_classifier:
        model = library.VideoMAEForVideoClassification(library.VideoMAEConfig(**options)).eval()
        _give(model, tensors)
        return Peer(
            _name(library, model),
            (model,),
            lambda clip, _: {"logits": model(clip.transpose(1, 2)).logits},
        )
    _norm_of_ones(tensors, "videomae.layernorm", facts.encoder.dim)
    if imported.fresh:
        encoder = library.VideoMAEModel(library.VideoMAEConfig(**options)).eval()
        beginning = "videomae."
        own = {
            name.removeprefix(beginning): value
            for name, value in tensors.items()
            if name.startswith(beginning)
        }
        _give(encoder, own)
        return Peer(
            _name(library, encoder),
            (encoder,),
            lambda clip, _: {"tokens": encoder(clip.transpose(1, 2)).last_hidden_state},
        )
    config = library.VideoMAEConfig(**options, **_decoder_options(imported))
    model = library.VideoMAEForPreTraining(config).eval()
    _give(model, tensors)

    def say(clip: Tensor, noise: Tensor) -> dict[str, Tensor]:
        masked, frames = _mask(imported, noise).masked, clip.transpose(1, 2)
        return {
            "tokens": model.videomae(frames).last_hidden_state,
            "hidden patches": _without_loss(model)(frames, bool_masked_pos=masked).logits,
        }

    return Peer(_name(library, model), (model,), say)


def _without_loss(model: Any) -> Any:
    """Whatever the clip is: its loss expects pixels of three channels, and normalises them."""
    model.config.norm_pix_loss = False
    return model


def _vitmae(imported: Imported) -> Peer:
    """ViTMAE of transformers; the loss predictor is one more of its decoders."""
    if imported.fresh:
        return _timm(imported) if imported.family.name in ("mae", "hpm") else _vit(imported)
    library, facts = _transformers(), imported.facts
    tensors = dict(imported.recognised.tensors)
    from_project = imported.family.name in ("mae", "hpm")
    predictor = {name: tensors.pop(name) for name in list(tensors) if "_losspred" in name}
    models = [_make_vitmae(library, imported, tensors, from_project=from_project)]
    if predictor:
        second = {name: value for name, value in tensors.items() if not _of_one_decoder(name)}
        second |= {name.replace("_losspred", ""): value for name, value in predictor.items()}
        models.append(_make_vitmae(library, imported, second, from_project=from_project))

    def say(clip: Tensor, noise: Tensor) -> dict[str, Tensor]:
        image, mask = clip.squeeze(2), _mask(imported, noise)
        said = {
            "hidden patches": mask.take_masked(models[0](image, noise=noise).logits),
            "tokens": _tokens_in_order(models[0], image, facts.grid.num_tokens),
        }
        for model in models[1:]:
            scores = model(image, noise=noise).logits.mean(dim=-1, keepdim=True)
            said["difficulty"] = mask.take_masked(scores).squeeze(-1)
        return said

    return Peer(_name(library, models[0]), tuple(models), say)


def _of_one_decoder(name: str) -> bool:
    return name.startswith(("decoder_blocks.", "decoder_norm.", "decoder_pred."))


def _tokens_in_order(model: Any, image: Tensor, num_tokens: int) -> Tensor:
    in_order = torch.linspace(0, 1, num_tokens).expand(1, -1)
    before = model.vit.embeddings.config.mask_ratio
    model.vit.embeddings.config.mask_ratio = 0.0
    tokens: Tensor = model.vit(image, noise=in_order).last_hidden_state
    model.vit.embeddings.config.mask_ratio = before
    return tokens


def _make_vitmae(
    library: Any, imported: Imported, tensors: Tensors, *, from_project: bool
) -> nn.Module:
    options = _encoder_options(imported) | _decoder_options(imported) | {"mask_ratio": RATIO}
    model: nn.Module = library.ViTMAEForPreTraining(library.ViTMAEConfig(**options)).eval()
    named = _renamed(tensors, OF_MAE) if from_project else dict(tensors)
    size = imported.facts.decoder
    assert size is not None
    _with_table(named, "vit.embeddings.position_embeddings", imported, imported.facts.encoder.dim)
    _with_table(named, "decoder.decoder_pos_embed", imported, size.dim)
    _give(model, named)
    return model


def _vit(imported: Imported) -> Peer:
    """ViT of transformers."""
    library, facts = _transformers(), imported.facts
    bare = imported.family.holds == "encoder"
    tensors = {
        f"vit.{name}" if bare else name: value
        for name, value in imported.recognised.tensors.items()
    }
    _with_table(tensors, "vit.embeddings.position_embeddings", imported, facts.encoder.dim)
    options = _encoder_options(imported) | {"num_labels": max(2, len(facts.label_names))}
    model = library.ViTForImageClassification(library.ViTConfig(**options)).eval()
    if not imported.is_classifier:
        tensors = {name: value for name, value in tensors.items() if name.startswith("vit.")}
        tensors |= {
            f"classifier.{name}": value for name, value in model.classifier.state_dict().items()
        }
    _give(model, tensors, may_leave=r"pooler|mask_token")

    def say(clip: Tensor, _noise: Tensor) -> dict[str, Tensor]:
        image = clip.squeeze(2)
        if imported.is_classifier:
            return {"logits": model(image).logits}
        return {"tokens": model.vit(image).last_hidden_state}

    return Peer(_name(library, model), (model,), say)


def _timm(imported: Imported) -> Peer:
    """Timm's vision transformer."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    facts, size = imported.facts, imported.facts.encoder
    tensors = dict(imported.recognised.tensors)
    _with_table(tensors, "pos_embed", imported, size.dim)
    classes = len(facts.label_names)
    if not imported.is_classifier:
        _norm_of_ones(tensors, "norm", size.dim)
        others = ("head.", "fc_norm.", "decoder_", "mask_token")
        tensors = {name: value for name, value in tensors.items() if not name.startswith(others)}
    model: Any = VisionTransformer(
        img_size=facts.clip_size[1:],
        patch_size=facts.cut.patch_size[1],
        in_chans=facts.cut.channels,
        embed_dim=size.dim,
        depth=size.depth,
        num_heads=size.num_heads,
        num_classes=classes,
        class_token=facts.class_token,
        no_embed_class=tensors["pos_embed"].shape[1] == facts.grid.num_tokens,
        global_pool=TIMM_POOLING[facts.pooling],
    ).eval()
    _give(model, tensors)

    def say(clip: Tensor, _noise: Tensor) -> dict[str, Tensor]:
        image = clip.squeeze(2)
        if imported.is_classifier:
            return {"logits": model(image)}
        return {"tokens": model.forward_features(image)}

    return Peer(f"timm {timm.__version__}: VisionTransformer", (model,), say)


def _name(library: Any, model: nn.Module) -> str:
    return f"transformers {library.__version__}: {type(model).__name__}"


PEERS: dict[str, Callable[[Imported], Peer]] = {
    **dict.fromkeys(OF_TIMM, _timm),
    **dict.fromkeys(
        (
            *("videomae", "videomae_encoder", "videomae_classifier"),
            *("transformers_videomae", "transformers_videomae_classifier"),
            "transformers_videomae_encoder",
        ),
        _videomae,
    ),
    **dict.fromkeys(("mae", "hpm", "transformers_vitmae"), _vitmae),
    **dict.fromkeys(("transformers_vit_classifier", "transformers_vit_encoder"), _vit),
}
"""Other implementations, by the name of the family."""
