"""Independent implementations of imported models, with the weights of the file.

Names go from the files to the other implementation by a table of its own, not through our names: a
mistake in our tables must not cancel out. Where a folder has a config.json, the other model is made
of that alone, so that a mistake in reading it does not cancel out either. The implementations are
those of transformers, which need not be installed, and of timm.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from hpm_video.config.choices import Pooling
from hpm_video.files.weights import CheckpointError
from hpm_video.models.positions import position_table
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.weights.files import Tensors
from hpm_video.weights.importing import Imported
from hpm_video.weights.trial import Said, Trial

Pairs = tuple[tuple[str, str], ...]
TIMM_POOLING: dict[Pooling | None, Any] = {None: "", "mean_norm": "avg", "class_token": "token"}


def is_installed(library: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(library) is not None


@dataclass(frozen=True)
class Peer:
    """Another implementation with the weights of the file."""

    name: str
    models: tuple[nn.Module, ...]
    say: Callable[[Trial], Said]

    def set_eps(self, eps: float) -> bool:
        """Of all layer norms. -> whether any had another"""
        norms = [
            module
            for model in self.models
            for module in model.modules()
            if isinstance(module, nn.LayerNorm) and module.eps != eps
        ]
        for norm in norms:
            norm.eps = eps
        return bool(norms)


def peer_of(imported: Imported, theirs: Tensors) -> Peer:
    """The other implementation of a model. ``theirs``: the tensors of the student or the teacher.

    Raises:
        CheckpointError: it does not take these weights.
    """
    kind = kind_of_peer(imported)
    tensors = _exact(theirs, imported)
    if kind == "timm":
        return _timm(imported, tensors)
    if kind == "timm's blocks":
        return _mae_st(imported, tensors)
    return _transformers(imported, tensors, kind)


def kind_of_peer(imported: Imported) -> str:
    """What is compared with: a class of transformers, or of timm.

    Of a file of MAE the encoder alone is timm's: where only that is taken, or where frames are not
    square, which ViTMAE needs.
    """
    kind = imported.family.peer
    if kind == "ViTModel" and imported.source.config.get("model_type") == "vit_mae":
        return "ViTMAEModel"
    if _has_config(imported):
        return kind
    if kind == "ViTMAEForPreTraining" and "_" not in imported.family.name:
        return "timm" if imported.fresh or not has_square_frames(imported) else kind
    if kind.startswith("VideoMAE") and imported.fresh:
        return "VideoMAEModel"
    return kind


def has_square_frames(imported: Imported) -> bool:
    """Whether its frames are as high as wide."""
    return imported.facts.clip_size[1] == imported.facts.clip_size[2]


def _of_transformers(imported: Imported) -> bool:
    return imported.family.name.startswith("transformers")


def _has_config(imported: Imported) -> bool:
    return bool(imported.source.config) and _of_transformers(imported)


def is_made_of_a_config(imported: Imported) -> bool:
    """Whether the other model is made of the config of a folder, and of nothing that we found."""
    return _has_config(imported) or "architecture" in imported.source.config


def _exact(tensors: Tensors, imported: Imported) -> Tensors:
    """With the computed positions in single precision, where the file has them in half."""
    found, facts = dict(tensors), imported.facts
    for table in imported.family.layout.tables:
        name = table.theirs[0]
        if facts.positions == "given" or name not in found or found[name].dtype == torch.float32:
            continue
        codes = position_table(facts.grid, found[name].shape[-1], facts.positions)
        rest = found[name].float()[:, : found[name].shape[1] - len(codes)]
        found[name] = torch.cat([rest, codes.unsqueeze(0)], dim=1)
    return found


# --- Names --------------------------------------------------------------------------------------

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


def _give(model: nn.Module, tensors: Tensors, may_leave: str = r"^$", prefix: str = "") -> None:
    """Load weights by whichever names this version of transformers has, behind ``prefix``.

    Raises:
        CheckpointError: they do not fit.
    """
    own = [f"{prefix}{name}" for name in model.state_dict()]
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
    try:
        model.load_state_dict({name.removeprefix(prefix): named[name].float() for name in own})
    except RuntimeError as error:
        raise CheckpointError(
            f"its config.json says other sizes than its weights have: {error}"
        ) from error


# --- transformers -------------------------------------------------------------------------------


def _transformers(imported: Imported, tensors: Tensors, kind: str) -> Peer:
    """A model of transformers; HPM's loss predictor is the decoder of one more."""
    if not _of_transformers(imported):
        tensors = _renamed(tensors, OF_VIDEOMAE if kind.startswith("VideoMAE") else OF_MAE)
    if imported.family.peer.startswith("VideoMAE"):
        # A bias on keys changes nothing, and transformers has none.
        tensors = {name: value for name, value in tensors.items() if not name.endswith("key.bias")}
    predictor = {name: tensors.pop(name) for name in list(tensors) if "_losspred" in name}
    model = _made(imported, tensors, kind)
    models = [model]
    if predictor:
        second = {
            name: value
            for name, value in tensors.items()
            if not re.match(r"decoder\.decoder_(layers|norm|pred)\.", name)
        }
        models.append(_made(imported, second | _as_decoder(predictor), kind))

    def say(trial: Trial) -> Said:
        said = SAY[kind](model, trial)
        if "encoder.norm.weight" in imported.fresh:
            width = said["tokens"].shape[-1:]
            said["tokens"] = F.layer_norm(said["tokens"], width, eps=LAYER_NORM_EPS)
        for other in models[1:]:
            said["difficulty"] = SAY[kind](other, trial)["hidden patches"].mean(dim=-1)
        compared = ["logits"] if imported.is_classifier else ["tokens"]
        if not imported.is_classifier and not imported.fresh:
            compared += ["hidden patches", "difficulty"]
        return {name: said[name] for name in compared if name in said}

    import transformers

    name = f"transformers {transformers.__version__}: {type(model).__name__}"
    return Peer(name, tuple(models), say)


def _as_decoder(predictor: Tensors) -> Tensors:
    """The loss predictor of HPM by the names of a reconstructor."""
    return _renamed(
        {name.replace("_losspred", ""): value for name, value in predictor.items()}, OF_MAE
    )


def _made(imported: Imported, tensors: Tensors, kind: str) -> nn.Module:
    import transformers

    made: Any = getattr(transformers, kind)
    if _has_config(imported):
        config = made.config_class.from_pretrained(imported.source.path, local_files_only=True)
    else:
        config = made.config_class(**_options(imported, tensors, kind))
    model: nn.Module = (
        made(config, add_pooling_layer=False) if kind == "ViTModel" else made(config)
    ).eval()
    prefix = ""
    if kind.endswith("Model"):
        prefix = "vit." if kind.startswith("ViT") else "videomae."
        bare = not any(name.startswith(prefix) for name in tensors)
        tensors = {f"{prefix}{name}": tensors[name] for name in tensors} if bare else tensors
    others = r"pooler|mask_token" + (rf"|^(?!{prefix})" if prefix else "")
    _give(model, tensors, others, prefix)
    return model


def _options(imported: Imported, tensors: Tensors, kind: str) -> dict[str, Any]:
    """Of a config of transformers, for a file that has none."""
    facts = imported.facts
    size, (frames, *frame_size) = facts.encoder, facts.clip_size
    options: dict[str, Any] = {
        "image_size": frame_size[0] if has_square_frames(imported) else frame_size,
        "patch_size": facts.cut.patch_size[1],
        "num_channels": facts.cut.channels,
        "hidden_size": size.dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.mlp_dim or 4 * size.dim,
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    if kind.startswith("VideoMAE"):
        options |= {
            "num_frames": frames,
            "tubelet_size": facts.cut.patch_size[0],
            "use_mean_pooling": "videomae.layernorm.weight" not in tensors,
        }
    if kind.endswith("Classification"):
        options["num_labels"] = max(2, len(facts.label_names))
    if kind.endswith("PreTraining"):
        assert facts.decoder is not None
        options |= {
            "decoder_hidden_size": facts.decoder.dim,
            "decoder_num_hidden_layers": facts.decoder.depth,
            "decoder_num_attention_heads": facts.decoder.num_heads,
            "decoder_intermediate_size": facts.decoder.mlp_dim or 4 * facts.decoder.dim,
        }
    return options


def _say_videomae(model: Any, trial: Trial) -> Said:
    return {"tokens": model(trial.clips.transpose(1, 2)).last_hidden_state}


def _say_videomae_decoded(model: Any, trial: Trial) -> Said:
    frames = trial.clips.transpose(1, 2)
    # Its loss, which is not asked for, takes three channels where it normalises.
    model.config.norm_pix_loss = False
    patches = model(frames, bool_masked_pos=trial.mask.masked).logits
    return _say_videomae(model.videomae, trial) | {"hidden patches": patches}


def _say_videomae_classified(model: Any, trial: Trial) -> Said:
    logits = model(trial.clips.transpose(1, 2)).logits
    return _say_videomae(model.videomae, trial) | {"logits": logits}


def _say_vitmae(model: Any, trial: Trial) -> Said:
    """Of all tokens, in order."""
    settings = model.embeddings.config
    before, settings.mask_ratio = settings.mask_ratio, 0.0
    in_order = torch.linspace(0, 1, trial.noise.shape[1]).expand(len(trial.noise), -1)
    tokens = model(trial.clips.squeeze(2), noise=in_order).last_hidden_state
    settings.mask_ratio = before
    return {"tokens": tokens}


def _say_vitmae_decoded(model: Any, trial: Trial) -> Said:
    settings = model.vit.embeddings.config
    tokens, hidden = trial.noise.shape[1], int(trial.mask.masked[0].sum())
    settings.mask_ratio = (hidden - 0.5) / tokens  # what stays is cut to whole
    predicted = model(trial.clips.squeeze(2), noise=trial.noise).logits
    return _say_vitmae(model.vit, trial) | {"hidden patches": trial.mask.take_masked(predicted)}


def _say_vit(model: Any, trial: Trial) -> Said:
    return {"tokens": model(trial.clips.squeeze(2)).last_hidden_state}


def _say_vit_classified(model: Any, trial: Trial) -> Said:
    return _say_vit(model.vit, trial) | {"logits": model(trial.clips.squeeze(2)).logits}


SAY: dict[str, Callable[[Any, Trial], Said]] = {
    "VideoMAEModel": _say_videomae,
    "VideoMAEForPreTraining": _say_videomae_decoded,
    "VideoMAEForVideoClassification": _say_videomae_classified,
    "ViTMAEModel": _say_vitmae,
    "ViTMAEForPreTraining": _say_vitmae_decoded,
    "ViTModel": _say_vit,
    "ViTForImageClassification": _say_vit_classified,
}
"""What models of transformers say of a trial."""

# --- timm ---------------------------------------------------------------------------------------


def _timm(imported: Imported, tensors: Tensors) -> Peer:
    """A vision transformer of timm."""
    import timm

    others = ("decoder_", "mask_token")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(others)}
    if imported.source.config:
        model = _timm_of_config(imported.source.config, tensors)
    else:
        model = _timm_of_facts(imported, tensors)

    def say(trial: Trial) -> Said:
        images = trial.clips.squeeze(2)
        if imported.is_classifier:
            return {"logits": model(images)}
        tokens = model.forward_features(images)
        if "encoder.norm.weight" in imported.fresh:
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=LAYER_NORM_EPS)
        return {"tokens": tokens}

    return Peer(f"timm {timm.__version__}: {type(model).__name__}", (model,), say)


def _timm_of_config(config: Mapping[str, Any], tensors: Tensors) -> Any:
    import timm

    name = config["architecture"]
    if name not in timm.list_models(module="vision_transformer"):
        raise CheckpointError(
            f"its config.json must name a vision transformer of timm {timm.__version__}, got "
            f"architecture={name!r}; where it is right, import it with --no-parity"
        )
    arguments: dict[str, Any] = dict(config.get("model_args") or {})
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    if size is not None:
        arguments.setdefault("img_size", size[1:])
    arguments["num_classes"] = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    _give(model, tensors)
    return model


def _timm_of_facts(imported: Imported, tensors: Tensors) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    facts, size = imported.facts, imported.facts.encoder
    if not imported.is_classifier:
        tensors = {
            name: value
            for name, value in tensors.items()
            if not name.startswith(("head.", "fc_norm."))
        }
    model: Any = VisionTransformer(
        img_size=facts.clip_size[1:],
        patch_size=facts.cut.patch_size[1],
        in_chans=facts.cut.channels,
        embed_dim=size.dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=((size.mlp_dim or 4 * size.dim) + 0.5) / size.dim,  # it is cut to whole
        num_classes=len(facts.label_names),
        class_token=facts.class_token,
        no_embed_class=tensors["pos_embed"].shape[1] == facts.grid.num_tokens,
        global_pool=TIMM_POOLING[facts.pooling],
        final_norm="norm.weight" in tensors or imported.is_classifier,
    ).eval()
    _give(model, tensors)
    return model


def _mae_st(imported: Imported, tensors: Tensors) -> Peer:
    """A convolution, tables of positions and timm's blocks."""
    import timm
    from timm.models.vision_transformer import Block

    facts, size = imported.facts, imported.facts.encoder
    state = {name: value.float() for name, value in tensors.items()}
    cut = nn.Conv3d(facts.cut.channels, size.dim, facts.cut.patch_size, facts.cut.patch_size)
    norm: Any = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
    ratio = ((size.mlp_dim or 4 * size.dim) + 0.5) / size.dim
    layers: Any = nn.Sequential(
        *(
            Block(size.dim, size.num_heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm)
            for _ in range(size.depth)
        ),
        norm(size.dim),
    ).eval()
    cut.load_state_dict({part: state[f"patch_embed.proj.{part}"] for part in ("weight", "bias")})
    for name, value in layers.state_dict().items():
        number, _, rest = name.partition(".")
        of_block = f"blocks.{number}." if int(number) < size.depth else "norm."
        parts = [rest.replace("qkv", part) for part in ("q", "k", "v")] if "qkv" in rest else [rest]
        value.copy_(torch.cat([state[of_block + part] for part in parts]))

    def say(trial: Trial) -> Said:
        tokens = rearrange(cut(trial.clips), "b d t h w -> b t (h w) d")
        tokens = tokens + state["pos_embed_spatial"].unsqueeze(1)
        tokens = (tokens + state["pos_embed_temporal"].unsqueeze(2)).flatten(1, 2)
        first = state["cls_token"] + state.get("pos_embed_class", torch.zeros(1))
        whole = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)
        return {"tokens": layers(whole)}

    return Peer(f"timm {timm.__version__}: Block, behind a convolution", (cut, layers), say)
