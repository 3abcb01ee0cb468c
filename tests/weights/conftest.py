"""Checkpoints of other projects, written with exactly their names and shapes."""

from types import SimpleNamespace

import pytest
import torch

from hpm_video.models.positions import position_table
from hpm_video.tokens.grid import TokenGrid


def affine(name, out, *into):
    return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}


def of_mae(dim):
    return affine("qkv", 3 * dim, dim)


def of_videomae(dim):
    return {"q_bias": (dim,), "v_bias": (dim,), "qkv.weight": (3 * dim, dim)}


def of_mae_st(dim):
    return {key: shape for part in "qkv" for key, shape in affine(part, dim, dim).items()}


def blocks(name, size, attention):
    """``attention``: of a width, names and shapes of the projection to queries, keys and values."""
    dim, depth = size
    block = {
        **affine("norm1", dim),
        **{f"attn.{part}": shape for part, shape in attention(dim).items()},
        **affine("attn.proj", dim, dim),
        **affine("norm2", dim),
        **affine("mlp.fc1", 4 * dim, dim),
        **affine("mlp.fc2", dim, 4 * dim),
    }
    return {f"{name}.{i}.{part}": shape for i in range(depth) for part, shape in block.items()}


def videomae(encoder, decoder, patch):
    values = 3 * patch[0] * patch[1] * patch[2]
    return {
        "mask_token": (1, 1, decoder[0]),
        **affine("encoder.patch_embed.proj", encoder[0], 3, *patch),
        **blocks("encoder.blocks", encoder, of_videomae),
        **affine("encoder.norm", encoder[0]),
        **blocks("decoder.blocks", decoder, of_videomae),
        **affine("decoder.norm", decoder[0]),
        **affine("decoder.head", values, decoder[0]),
        "encoder_to_decoder.weight": (decoder[0], encoder[0]),
    }


def videomae_classifier(encoder, patch, classes, attention=of_videomae):
    return {
        **affine("patch_embed.proj", encoder[0], 3, *patch),
        **blocks("blocks", encoder, attention),
        **affine("fc_norm", encoder[0]),
        **affine("head", classes, encoder[0]),
    }


def vit(encoder, patch, tokens):
    return {
        "cls_token": (1, 1, encoder[0]),
        "pos_embed": (1, tokens + 1, encoder[0]),
        **affine("patch_embed.proj", encoder[0], 3, patch, patch),
        **blocks("blocks", encoder, of_mae),
        **affine("norm", encoder[0]),
    }


def mae(encoder, decoder, patch, tokens):
    return {
        **vit(encoder, patch, tokens),
        "mask_token": (1, 1, decoder[0]),
        "decoder_pos_embed": (1, tokens + 1, decoder[0]),
        **affine("decoder_embed", decoder[0], encoder[0]),
        **blocks("decoder_blocks", decoder, of_mae),
        **affine("decoder_norm", decoder[0]),
        **affine("decoder_pred", 3 * patch * patch, decoder[0]),
    }


def hpm(encoder, decoder, patch, tokens):
    return {
        **mae(encoder, decoder, patch, tokens),
        **blocks("decoder_blocks_losspred", decoder, of_mae),
        **affine("decoder_norm_losspred", decoder[0]),
        **affine("decoder_pred_losspred", 3 * patch * patch, decoder[0]),
    }


def mae_st(encoder, decoder, patch, grid):
    time, tokens = grid
    dim, wide = encoder[0], decoder[0]
    return {
        "cls_token": (1, 1, dim),
        "pos_embed_spatial": (1, tokens, dim),
        "pos_embed_temporal": (1, time, dim),
        "pos_embed_class": (1, 1, dim),
        **affine("patch_embed.proj", dim, 3, *patch),
        **blocks("blocks", encoder, of_mae_st),
        **affine("norm", dim),
        "mask_token": (1, 1, wide),
        "decoder_cls_token": (1, 1, wide),
        "decoder_pos_embed_spatial": (1, tokens, wide),
        **affine("decoder_embed", wide, dim),
        **blocks("decoder_blocks", decoder, of_mae_st),
        **affine("pred_head.projections.0", 3 * patch[1] * patch[2], wide),
    }


def fill(shapes, seed=0):
    """Large random weights, and computed positions where an image model keeps them."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in found:
            _, rows, dim = found[name].shape
            side = round((rows - 1) ** 0.5)
            table = position_table(TokenGrid(1, side, side), dim, "space_time")
            found[name] = torch.cat([torch.zeros(1, dim), table]).unsqueeze(0)
    return found


@pytest.fixture(scope="session")
def layouts_of():
    """Names and shapes of the official checkpoints; ``fill`` makes weights of them."""
    functions = (videomae, videomae_classifier, vit, mae, hpm, mae_st, of_mae, fill, affine)
    return SimpleNamespace(**{function.__name__: function for function in functions})
