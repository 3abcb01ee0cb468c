import pytest
import torch
from torch.nn import functional as F

from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.patches import (
    normalise,
    patch_mean_errors,
    patch_statistics,
    patchify,
    standardise,
    unpatchify,
)

PATCH = (2, 4, 8)
CLIP = (4, 8, 24)  # rectangular


@pytest.fixture
def clips():
    return torch.rand(2, 3, *CLIP, generator=torch.Generator().manual_seed(0))


def test_patches_are_cut_in_grid_order_with_channels_last(clips):
    patches = patchify(clips, PATCH)
    assert patches.shape == (2, 2 * 2 * 3, 2 * 4 * 8 * 3)
    second_time_second_row_last_column = clips[1, :, 2:4, 4:8, 16:24]
    expected = second_time_second_row_last_column.permute(1, 2, 3, 0).flatten()
    assert torch.equal(patches[1, 1 * 6 + 1 * 3 + 2], expected)


def test_unpatchify_is_the_inverse(clips):
    grid = TokenGrid.of_clip(CLIP, PATCH)
    assert torch.equal(unpatchify(patchify(clips, PATCH), PATCH, grid), clips)


def test_an_image_is_cut_as_unfold_cuts_it():
    image = torch.rand(1, 3, 32, 48)
    expected = F.unfold(image, 16, stride=16).unflatten(1, (3, 256)).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(patchify(image.unsqueeze(2), (1, 16, 16)), expected)


def test_joint_standardisation_is_maes(clips):
    patches = patchify(clips, PATCH)
    expected = (patches - patches.mean(-1, keepdim=True)) / (
        patches.var(-1, keepdim=True, unbiased=True) + 1e-6
    ) ** 0.5
    torch.testing.assert_close(standardise(patches, "joint", 3), expected)


def test_channels_are_standardised_apart_as_in_videomae(clips):
    patches = patchify(clips, PATCH)
    pixels = patches.unflatten(-1, (64, 3))
    expected = (pixels - pixels.mean(-2, keepdim=True)) / (
        pixels.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6
    )
    torch.testing.assert_close(standardise(patches, "per_channel", 3), expected.flatten(-2))


@pytest.mark.parametrize("kind", ["raw", "joint", "per_channel"])
def test_statistics_turn_targets_back_into_pixels(clips, kind):
    patches = patchify(clips, PATCH)
    mean, scale = patch_statistics(patches, kind, 3)
    torch.testing.assert_close(standardise(patches, kind, 3) * scale + mean, patches)


@pytest.mark.parametrize("kind", ["raw", "joint", "per_channel"])
def test_mean_of_each_channel_is_the_mark_to_beat(clips, kind):
    target = standardise(patchify(clips, PATCH), kind, 3)
    mean = target.unflatten(-1, (64, 3)).mean(-2, keepdim=True).expand(-1, -1, 64, -1).flatten(-2)
    expected = (target - mean).square().mean(-1)
    torch.testing.assert_close(patch_mean_errors(target, 3), expected)


@pytest.mark.parametrize("kind", ["raw", "joint", "per_channel"])
def test_a_patch_of_one_colour_has_a_finite_target(kind):
    flat = torch.full((1, 1, 3 * 64), 0.3)
    assert standardise(flat, kind, 3).isfinite().all()


def test_pixels_of_another_type_are_refused():
    """Pixels from 0 to 1 would silently give wrong features."""
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    with pytest.raises(TypeError, match=r"must be uint8, from 0 to 255, got torch.float32; where"):
        normalise(torch.rand(1, 3, 2, 8, 8), mean, std)
