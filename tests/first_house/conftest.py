"""Tiny data, stopped runs, and what the first version of this project ("house") computed from them.

The script make_fixtures.py, which is in this folder at commit be0a370, made all of it from the code
of commit c18a27b.
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


BEGINNINGS = {
    "patch_embed.proj.": "patch_embed.",
    "cls_token": "class_token",
    "pos_embed": "encoder_positions.table",
    "blocks.": "encoder.blocks.",
    "norm.": "encoder.norm.",
    "decoder_embed.": "to_decoder.",
    "decoder_pos_embed": "decoder_positions.table",
    "mask_token": "mask_token",
    "reconstructor.blocks.": "reconstructor.transformer.blocks.",
    "reconstructor.norm.": "reconstructor.transformer.norm.",
    "reconstructor.head.": "reconstructor.head.",
    "difficulty_decoder.blocks.": "difficulty_decoder.transformer.blocks.",
    "difficulty_decoder.norm.": "difficulty_decoder.transformer.norm.",
    "difficulty_decoder.head.": "difficulty_decoder.head.",
    "fc_norm.": "pooling.norm.",
    "head_norm.": "pooling.norm.",
    "attn_pool.latent": "pooling.query",
    "attn_pool.": "pooling.",
    "head.": "head.",
}
"""How names of today begin, and how those of the first house began. The first match counts."""
VECTORS = ("cls_token", "mask_token", "attn_pool.latent")
"""Their shape is (1, 1, D) today, and was (D,)."""


def first_names(tensors: dict[str, Tensor], *, key_biases: bool) -> dict[str, Tensor]:
    """Weights, gradients or moments of today's models by the first house's names and shapes.

    Expanded scalars and tensors without data work too. ``key_biases``: whether blocks had them, as
    in MAE's conventions; with VideoMAE's they had none.
    """
    found = {}
    for name, value in tensors.items():
        now, before = next(each for each in BEGINNINGS.items() if name.startswith(each[0]))
        first = before + name.removeprefix(now)
        first = first.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.2.")
        if first.endswith("attn.qkv.bias"):
            for kind, part in zip("qkv", value.chunk(3), strict=True):
                if kind != "k" or key_biases:
                    found[f"{first.removesuffix('qkv.bias')}{kind}_bias"] = part
        elif name == "patch_embed.proj.weight":
            found[first] = value.permute(0, 2, 3, 4, 1).flatten(1)
        else:
            found[first] = value.flatten() if name in VECTORS else value
    return found


@pytest.fixture(name="first_names")
def _first_names():
    return first_names


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Read only."""
    return FIXTURES


@pytest.fixture
def first_house(tmp_path, monkeypatch) -> Path:
    """A copy of the fixtures as the working directory: paths in their configs are relative."""
    shutil.copytree(FIXTURES, tmp_path / "first house", symlinks=True)
    monkeypatch.chdir(tmp_path / "first house")
    threads = torch.get_num_threads()
    yield tmp_path / "first house"
    torch.set_num_threads(threads)
