from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from hpm_video.config.data import DataConfig
from hpm_video.data import transforms
from hpm_video.data.transforms import (
    OFFSETS,
    SCALE_PAIRS,
    Box,
    MultiScaleCrop,
    centre_box,
    cut,
    multi_scale_box,
    resize,
    view_boxes,
    view_crops,
)
from hpm_video.randomness import generator

sides = st.integers(8, 500)


def applied(transform, frames, frame_size, draw):
    height, width = frames.shape[1:3]
    box, change = transform.draw((height, width), frame_size, draw)
    return change(cut(frames, box))


@pytest.mark.parametrize(
    ("height", "width", "frame_size", "expected"),
    [
        (240, 320, (224, 224), Box(0, 40, 240, 240)),
        (320, 240, (224, 224), Box(40, 0, 240, 240)),
        (240, 320, (48, 64), Box(0, 0, 240, 320)),
        (240, 320, (64, 128), Box(40, 0, 160, 320)),
        (240, 320, (64, 32), Box(0, 100, 240, 120)),
        (63, 97, (32, 32), Box(0, 17, 63, 63)),
    ],
)
def test_the_centre_box(height, width, frame_size, expected):
    assert centre_box(height, width, frame_size) == expected


@pytest.mark.parametrize(
    ("height", "width", "frame_size", "count", "expected"),
    [
        (240, 320, (224, 224), 3, [Box(0, left, 240, 240) for left in (0, 40, 80)]),
        (320, 240, (224, 224), 3, [Box(top, 0, 240, 240) for top in (0, 40, 80)]),
        (240, 240, (224, 224), 3, [Box(0, 0, 240, 240)] * 3),
        (240, 320, (64, 128), 3, [Box(top, 0, 160, 320) for top in (0, 40, 80)]),
        (240, 320, (64, 32), 3, [Box(0, left, 240, 120) for left in (0, 100, 200)]),
        (240, 320, (48, 64), 3, [Box(0, 0, 240, 320)] * 3),
        (63, 97, (32, 32), 3, [Box(0, left, 63, 63) for left in (0, 17, 34)]),
        (63, 96, (32, 32), 3, [Box(0, left, 63, 63) for left in (0, 16, 33)]),
        (240, 320, (224, 224), 2, [Box(0, 0, 240, 240), Box(0, 80, 240, 240)]),
        (240, 320, (224, 224), 5, [Box(0, left, 240, 240) for left in (0, 20, 40, 60, 80)]),
        (240, 320, (224, 224), 1, [Box(0, 40, 240, 240)]),
    ],
)
def test_the_boxes_of_views(height, width, frame_size, count, expected):
    assert view_boxes(height, width, frame_size, count) == expected


@given(height=sides, width=sides, frame_size=st.tuples(sides, sides), count=st.integers(1, 6))
def test_boxes_of_views_touch_both_ends_and_are_as_large_as_the_central_one(
    height, width, frame_size, count
):
    boxes = view_boxes(height, width, frame_size, count)
    centre = centre_box(height, width, frame_size)
    assert len(boxes) == count
    assert {(box.height, box.width) for box in boxes} == {(centre.height, centre.width)}
    if count == 1:
        assert boxes == [centre]
    else:
        first, last = boxes[0], boxes[-1]
        assert (first.top, first.left) == (0, 0)
        assert (last.top + last.height, last.left + last.width) == (height, width)
    if count % 2:
        middle = boxes[count // 2]
        assert (middle.top, middle.left) == (centre.top, centre.left)
    for name in ("top", "left"):
        places = [getattr(box, name) for box in boxes]
        gaps = set(np.diff(places).tolist())
        assert all(gap >= 0 for gap in gaps)
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


@given(height=sides, width=sides, frame_size=st.tuples(sides, sides), seed=st.integers(0, 999))
def test_boxes_lie_inside_the_frame(height, width, frame_size, seed):
    for box in (
        centre_box(height, width, frame_size),
        multi_scale_box(height, width, frame_size, generator(seed)),
    ):
        assert box.top >= 0
        assert box.left >= 0
        assert 1 <= box.height <= height - box.top
        assert 1 <= box.width <= width - box.left


def test_scales_are_at_most_one_step_apart():
    steps = [1.0, 0.875, 0.75, 0.66]
    expected = [
        (a, b) for a, b in product(steps, steps) if abs(steps.index(a) - steps.index(b)) < 2
    ]
    assert list(SCALE_PAIRS) == expected
    assert len(SCALE_PAIRS) == 10


def test_there_are_13_places_symmetric_in_the_frame():
    assert len(set(OFFSETS)) == 13
    assert {(4 - down, right) for down, right in OFFSETS} == set(OFFSETS)
    assert {(right, down) for down, right in OFFSETS} == set(OFFSETS)


def test_every_crop_of_a_frame_is_drawn_and_no_other():
    drawn = {multi_scale_box(400, 600, (224, 224), generator("draw", i)) for i in range(2500)}
    sizes = {(int(400 * a), int(400 * b)) for a, b in SCALE_PAIRS}
    assert {(box.height, box.width) for box in drawn} == sizes
    expected = {
        Box((400 - h) * down // 4, (600 - w) * right // 4, h, w)
        for (h, w), (down, right) in product(sizes, OFFSETS)
    }
    assert drawn == expected


def test_a_rectangular_target_scales_the_largest_box_of_its_shape():
    sizes = {
        (box.height, box.width)
        for box in (multi_scale_box(240, 320, (64, 128), generator(i)) for i in range(300))
    }
    assert max(sizes) == (160, 320)
    assert {(160, 320), (140, 280), (120, 240), (105, 211)} <= sizes
    assert all(0.85 < height * 2 / width < 1.18 for height, width in sizes)


@pytest.mark.parametrize(
    ("box", "frame_size"),
    [
        (Box(0, 0, 120, 160), (48, 48)),
        (Box(5, 9, 66, 75), (48, 48)),
        (Box(3, 1, 40, 30), (64, 96)),
        (Box(119, 159, 1, 1), (8, 8)),
    ],
)
def test_resizing_agrees_with_pillow(box, frame_size):
    frames = np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), dtype=np.uint8)
    clip = resize(cut(frames, box), frame_size, "bilinear")
    assert clip.shape == (3, 2, *frame_size)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    for frame, resized in zip(frames, clip.transpose(0, 1), strict=True):
        expected = (
            Image.fromarray(frame).crop(corners).resize(frame_size[::-1], Image.Resampling.BILINEAR)
        )
        difference = np.asarray(expected).astype(int) - resized.permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= 1


def test_a_crop_of_the_right_size_keeps_its_pixels():
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    clip = resize(cut(frames, Box(2, 5, 10, 12)), (10, 12), "bilinear")
    assert np.array_equal(clip.permute(1, 2, 3, 0).numpy(), frames[:, 2:12, 5:17])


def test_a_multi_scale_crop_is_its_box_mirrored_in_about_half_of_the_clips_if_wanted():
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    flips = 0
    for seed in range(200):
        box = multi_scale_box(40, 60, (16, 24), generator("clip", seed))
        expected = resize(cut(frames, box), (16, 24), "bilinear")
        plain = applied(MultiScaleCrop(flip=False), frames, (16, 24), generator("clip", seed))
        assert torch.equal(plain, expected)
        clip = applied(MultiScaleCrop(flip=True), frames, (16, 24), generator("clip", seed))
        assert clip.shape == (3, 2, 16, 24)
        mirrored = torch.equal(clip, torch.from_numpy(expected.numpy()[..., ::-1].copy()))
        assert mirrored or torch.equal(clip, expected)
        flips += mirrored
    assert 75 < flips < 125


# --- Validation crops ----------------------------------------------------------------------------


def noise(height, width, frames=2):
    shape = (frames, height, width, 3)
    return np.random.default_rng(height * width).integers(0, 256, shape, dtype=np.uint8)


def crops_of(frames, frame_size, count, short_side, interpolation):
    data = DataConfig(
        frame_size=frame_size, validation_short_side=short_side, interpolation=interpolation
    )
    return view_crops(frames, data, count)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "short_side", "frame_size"),
    [
        ((37, 53), 24, (20, 20)),
        ((53, 37), 24, (20, 20)),
        ((41, 41), 25, (24, 24)),  # odd margins
        ((40, 75), 31, (20, 20)),
        ((19, 30), 29, (28, 28)),  # enlarged
        ((37, 53), 32, (20, 32)),  # a rectangle
        ((53, 37), 33, (20, 32)),
        ((37, 53), 24, (24, 24)),
        ((50, 1), 8, (8, 8)),
        ((1, 9), 8, (7, 8)),
    ],
)
def test_a_validation_crop_by_the_short_side_is_torchvisions(
    interpolation, size, short_side, frame_size
):
    frames = noise(*size)
    (crop,) = crops_of(frames, frame_size, 1, short_side, interpolation)
    assert crop.shape == (3, 2, *frame_size)
    assert crop.dtype == torch.uint8
    resize = Resize(short_side, InterpolationMode(interpolation), antialias=True)
    for frame, ours in zip(frames, crop.permute(1, 2, 3, 0).numpy(), strict=True):
        # Compared on an image: for tensors torchvision resizes in float32 and clips to 0..255 only
        # at the end, whereas Pillow and this package clip after each axis.
        image = CenterCrop(frame_size)(resize(Image.fromarray(frame)))
        assert np.abs(np.asarray(image).astype(int) - ours).max() <= 1
    if interpolation == "bilinear":
        tensors = CenterCrop(frame_size)(resize(torch.from_numpy(frames).permute(0, 3, 1, 2)))
        assert (tensors.transpose(0, 1).int() - crop.int()).abs().max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(37, 53), (53, 37)])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_without_a_short_side_crops_are_resized_boxes(interpolation, size, count):
    frames = noise(*size)
    crops = crops_of(frames, (20, 28), count, None, interpolation)
    boxes = view_boxes(*size, (20, 28), count)
    expected = [resize(cut(frames, box), (20, 28), interpolation) for box in boxes]
    assert all(torch.equal(crop, one) for crop, one in zip(crops, expected, strict=True))


@pytest.mark.parametrize(("size", "axis"), [((37, 80), -1), ((80, 37), -2)])
def test_crops_by_the_short_side_are_spread_from_end_to_end(size, axis):
    frames = noise(*size)
    whole = resize(cut(frames, Box(0, 0, *size)), (24, 51) if axis == -1 else (51, 24), "bilinear")
    crops = crops_of(frames, (24, 24), 4, 24, "bilinear")
    for crop, start in zip(crops, (0, 9, 18, 27), strict=True):
        assert torch.equal(crop, whole.narrow(axis, start, 24))
    inside = crops_of(frames, (20, 20), 3, 24, "bilinear")
    middle = whole.narrow(-2 if axis == -1 else -1, 2, 20)  # along the shorter side
    assert torch.equal(inside[0], middle.narrow(axis, 0, 20))
    assert torch.equal(inside[2], middle.narrow(axis, 31, 20))


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 200)])
def test_frames_of_an_extreme_shape_do_not_become_huge(size, monkeypatch):
    seen = []
    resize = transforms.functional.interpolate

    def look(pixels, shape, **options):
        seen.append(shape)
        return resize(pixels, shape, **options)

    monkeypatch.setattr(transforms.functional, "interpolate", look)
    (crop,) = crops_of(noise(*size), (224, 224), 1, 256, "bicubic")
    assert crop.shape[-2:] == (224, 224)
    assert max(max(shape) for shape in seen) <= 256 * transforms.LONGEST


def test_bicubic_pixels_stay_in_their_range():
    frames = np.zeros((1, 20, 20, 3), np.uint8)
    frames[:, :, 10:] = 255
    clip = resize(cut(frames, Box(0, 0, 20, 20)), (41, 41), "bicubic")
    dark, light = clip[..., :18], clip[..., -18:]
    assert dark.max() < 30, "values below 0 do not wrap around"
    assert light.min() > 225


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_multi_scale_crop_is_resized_with_the_given_interpolation(interpolation):
    frames = noise(40, 60)
    box = multi_scale_box(40, 60, (16, 24), generator("clip", 1))
    clip = applied(
        MultiScaleCrop(flip=False, interpolation=interpolation),
        frames,
        (16, 24),
        generator("clip", 1),
    )
    assert torch.equal(clip, resize(cut(frames, box), (16, 24), interpolation))
