# ruff: noqa: NPY002 - numpy's global generator is looked at

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision.transforms import RandomResizedCrop

from hpm_video.config.data import TIMMS_STRING, AugmentationConfig
from hpm_video.data.augment import Augmentation, random_box
from hpm_video.data.transforms import Box, cut
from hpm_video.randomness import global_generators
from hpm_video.tokens.patches import normalise

RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
AREA, RATIO = (0.08, 1.0), (0.75, 1.333)
ALL = Augmentation(
    AREA, RATIO, True, RAND_AUGMENT, 0.25, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)
WHOLE = Augmentation((1.0, 1.0), (1.0, 1.0), False, None, 0.0, (0.4, 0.5, 0.6), (0.05, 0.1, 0.1))
"""It leaves square frames unchanged. Its noise is never black, and never clipped."""


def applied(transform, frames, frame_size, draw):
    height, width = frames.shape[1:3]
    box, change = transform.draw((height, width), frame_size, draw)
    return change(cut(frames, box))


def frames_of(num_frames: int = 3, height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """Different pictures with colours, edges and a little noise: (T, H, W, C) uint8"""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num_frames, height // 8 + 1, width // 8 + 1, 3))
    big = np.kron(coarse, np.ones((1, 8, 8, 1), dtype=int))[:, :height, :width]
    return np.clip(big + rng.integers(-9, 9, big.shape), 0, 255).astype(np.uint8)


def keys_of(seed: int) -> tuple[int, int, int]:
    """The keys under which the box, the operations and the erasing of a clip are drawn."""
    box, change, erase = np.random.default_rng(seed).integers(2**63, size=3)
    return int(box), int(change), int(erase)


# --- Whole clips ---------------------------------------------------------------------------------


def test_a_clip_depends_on_its_draw_alone():
    frames = frames_of()
    clips = []
    for other in range(2):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(other)
        clips.append(
            [applied(ALL, frames, (32, 24), np.random.default_rng(seed)) for seed in range(20)]
        )
    for first, second in zip(*clips, strict=True):
        assert torch.equal(first, second)
    assert len({clip.numpy().tobytes() for clip in clips[0]}) == 20


def test_a_generator_goes_on():
    draw = np.random.default_rng(0)
    assert not torch.equal(
        applied(ALL, frames_of(), (32, 32), draw), applied(ALL, frames_of(), (32, 32), draw)
    )


def test_the_global_generators_are_left_alone():
    def next_numbers() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    with global_generators(5):
        expected = next_numbers()
    with global_generators(5):
        for seed in range(4):
            applied(replace(ALL, erasing=1.0), frames_of(), (32, 32), np.random.default_rng(seed))
        assert next_numbers() == expected


@pytest.mark.parametrize("num_frames", [1, 3])
def test_the_frames_keep_their_values(num_frames):
    frames = frames_of(num_frames, 32, 32)
    for augmentation in (replace(ALL, erasing=1.0), replace(WHOLE, erasing=1.0)):
        applied(augmentation, frames, (32, 32), np.random.default_rng(0))
    assert np.array_equal(frames, frames_of(num_frames, 32, 32))


@settings(max_examples=60)
@example(num_frames=16, height=8, width=8, frame_size=(8, 8), seed=0)
@example(num_frames=1, height=1, width=1, frame_size=(1, 1), seed=0)
@given(
    num_frames=st.integers(1, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    frame_size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    seed=st.integers(0, 9999),
)
def test_every_size_gives_a_clip(num_frames, height, width, frame_size, seed):
    augmentation = replace(ALL, erasing=0.5)
    frames = frames_of(num_frames, height, width)
    clip = applied(augmentation, frames, frame_size, np.random.default_rng(seed))
    assert clip.shape == (3, num_frames, *frame_size)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()


def test_it_travels_to_another_process():
    applied(ALL, frames_of(), (32, 32), np.random.default_rng(0))
    copy = pickle.loads(pickle.dumps(ALL))
    assert copy == ALL
    clips = [applied(a, frames_of(), (32, 32), np.random.default_rng(3)) for a in (ALL, copy)]
    assert torch.equal(*clips)


@pytest.mark.parametrize("seed", range(30))
def test_frames_that_are_alike_stay_alike(seed):
    frames = np.repeat(frames_of(num_frames=1), 4, axis=0)
    clip = applied(replace(ALL, erasing=0.0), frames, (32, 32), np.random.default_rng(seed))
    assert torch.equal(clip, clip[:, :1].expand_as(clip))


def test_without_any_change_pixels_stay():
    frames = frames_of(2, 32, 32)
    clip = applied(WHOLE, frames, (32, 32), np.random.default_rng(0))
    assert np.array_equal(clip.permute(1, 2, 3, 0).numpy(), frames)


# --- Crop and flip -----------------------------------------------------------------------------


@given(height=st.integers(1, 400), width=st.integers(1, 400), key=st.integers(0, 2**63 - 1))
@example(height=8, width=8, key=0)
def test_the_box_lies_inside_the_frame(height, width, key):
    box = random_box(height, width, AREA, RATIO, key)
    assert box.top >= 0
    assert box.left >= 0
    assert 1 <= box.height <= height - box.top
    assert 1 <= box.width <= width - box.left


@given(height=st.integers(25, 400), width=st.integers(25, 400), key=st.integers(0, 2**63 - 1))
def test_its_area_and_ratio_are_in_range(height, width, key):
    """Apart from the rounding of its sides."""
    box = random_box(height, width, AREA, RATIO, key)
    assert (box.height + 0.5) * (box.width + 0.5) >= AREA[0] * height * width
    assert (box.width + 0.5) / (box.height - 0.5) >= RATIO[0]
    assert (box.width - 0.5) / (box.height + 0.5) <= RATIO[1]


def test_boxes_are_spread_over_the_range():
    boxes = [random_box(400, 400, AREA, RATIO, key) for key in range(500)]
    shares = np.array([box.height * box.width / 400**2 for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    assert shares.min() < 0.12
    assert shares.max() > 0.9
    assert ratios.min() < 0.78
    assert ratios.max() > 1.28
    assert abs(np.log(ratios).mean()) < 0.05
    rest = np.array([(400 - box.height, 400 - box.width) for box in boxes])
    places = np.array([(box.top, box.left) for box in boxes]) / np.maximum(rest, 1)
    assert np.abs(places.mean(axis=0) - 0.5).max() < 0.07


@pytest.mark.parametrize("size", [(240, 320), (8, 8), (63, 97), (11, 300)])
def test_the_box_is_that_of_torchvision(size):
    image = Image.new("RGB", size[::-1])
    for key in range(20):
        with global_generators(key):
            expected = RandomResizedCrop.get_params(image, list(AREA), list(RATIO))
        assert random_box(*size, AREA, RATIO, key) == Box(*expected)


def test_the_clip_is_the_box_resized():
    frames = frames_of()
    clip = applied(
        replace(WHOLE, area=AREA, ratio=RATIO), frames, (32, 24), np.random.default_rng(4)
    )
    box = random_box(40, 56, AREA, RATIO, keys_of(4)[0])
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    for frame, ours in zip(frames, clip.unbind(1), strict=True):
        theirs = Image.fromarray(frame).crop(corners).resize((24, 32), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(theirs).astype(int) - ours.permute(1, 2, 0).numpy()).max() <= 1


def test_half_of_the_clips_are_mirrored_and_not_otherwise_changed():
    crop = replace(WHOLE, area=AREA, ratio=RATIO)
    frames, mirrored = frames_of(2), 0
    for seed in range(600):
        plain = applied(crop, frames, (16, 16), np.random.default_rng(seed))
        clip = applied(replace(crop, flip=True), frames, (16, 16), np.random.default_rng(seed))
        if not torch.equal(clip, plain):
            assert torch.equal(clip, plain.flip(-1))
            mirrored += 1
    assert 260 < mirrored < 340


def test_left_stays_left_without_flip():
    brightening = np.tile(np.arange(0, 240, 6, dtype=np.uint8)[:, None], (2, 40, 1, 3))
    crop = replace(WHOLE, area=AREA, ratio=RATIO)
    for seed in range(100):
        clip = applied(crop, brightening, (16, 16), np.random.default_rng(seed)).int()
        assert (clip.diff(dim=-1) >= 0).all()
        assert (clip[..., -1] > clip[..., 0]).all()


# --- RandAugment -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RAND_AUGMENT, "rand-m9-mstd0.5-inc1", "rand-m9-n3-tweights"])
def test_each_frame_is_what_timm_makes_of_it(config):
    """timm is set up as in its own training, with the same key for all frames."""
    mean = ALL.mean
    stages = transforms_imagenet_train(
        (48, 32), auto_augment=config, interpolation="bicubic", mean=mean, separate=True
    )
    crop = replace(WHOLE, area=AREA, ratio=RATIO, mean=mean)
    frames, changed = frames_of(), 0
    for seed in range(40):
        plain = applied(crop, frames, (48, 32), np.random.default_rng(seed))
        clip = applied(
            replace(crop, rand_augment=config), frames, (48, 32), np.random.default_rng(seed)
        )
        changed += not torch.equal(clip, plain)
        for before, after in zip(plain.unbind(1), clip.unbind(1), strict=True):
            image = Image.fromarray(before.permute(1, 2, 0).numpy())
            with global_generators(keys_of(seed)[1]):
                expected = np.asarray(stages[1](image))
            assert np.array_equal(after.permute(1, 2, 0).numpy(), expected)
    assert changed > 20


@pytest.mark.parametrize(
    "config", [RAND_AUGMENT, "rand-m9-mstd0.5-inc1", "rand", "rand-p1.0-mmax20-m15-t3a", "rand-m0"]
)
def test_timms_strings_pass(config):
    AugmentationConfig(rand_augment=config)


@settings(max_examples=30)
@given(st.from_regex(TIMMS_STRING, fullmatch=True))
def test_what_passes_is_what_timm_takes(config):
    augmentation = replace(WHOLE, rand_augment=config)
    for seed in range(3):
        applied(augmentation, frames_of(1, 8, 8), (8, 8), np.random.default_rng(seed))


@pytest.mark.parametrize("config", ["rand-m10-n1-p1-inc1", "rand-m0-n1-p1", "rand-m30-mmax30-inc1"])
def test_without_bits_a_frame_is_black(config):
    """This is timm's strongest Posterize, which Pillow 13 refuses."""
    augmentation = replace(WHOLE, rand_augment=config)
    clips = [
        applied(augmentation, frames_of(2, 8, 8), (8, 8), np.random.default_rng(seed))
        for seed in range(60)
    ]
    assert any((clip == 0).all() for clip in clips)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "foo",
        "rand-q7",
        "rand-",
        "randm7",
        "rand-m",
        "rand-m7.5",
        "rand-m-7",
        "augmix-m5-w4-d2",
        "original-mstd0.5",
        "3a",
        "rand-tfoo",
        "rand-mstdinf",
        "rand-p2",
        "rand-inc2",
        "rand-n0",
        "rand-mmax0",
        " rand-m7",
        "rand-m7\n",
        "rand-m\u0667",
    ],
)
def test_other_strings_are_refused(config):
    with pytest.raises(ValueError, match="timm's string, such as rand-m7.*got") as raised:
        AugmentationConfig(rand_augment=config)
    assert str(raised.value).endswith(config)


# --- Erasing -----------------------------------------------------------------------------------


def boxes_of_noise(clips: list[torch.Tensor]) -> list[torch.Tensor]:
    """Where black clips are no longer black: (h, w) bool each, the same for all frames."""
    boxes = [clip[0, 0] > 0 for clip in clips]
    for clip, box in zip(clips, boxes, strict=True):
        assert torch.equal(clip > 0, box.expand_as(clip))
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)
        for side in (rows, columns):  # one unbroken run of pixels
            assert side.int().diff().abs().sum() + side[0] + side[-1] in (0, 2)
    return boxes


def erased(chance: float, count: int, num_frames: int = 2) -> list[torch.Tensor]:
    """Black clips of 32 x 32 pixels, which are erased with that chance."""
    black = np.zeros((num_frames, 32, 32, 3), dtype=np.uint8)
    augmentation = replace(WHOLE, erasing=chance)
    return [
        applied(augmentation, black, (32, 32), np.random.default_rng(seed)) for seed in range(count)
    ]


@pytest.mark.parametrize(("chance", "least", "most"), [(0, 0, 0), (0.25, 70, 130), (1, 400, 400)])
def test_erasing_has_its_chance(chance, least, most):
    boxes = boxes_of_noise(erased(chance, 400))
    assert least <= sum(bool(box.any()) for box in boxes) <= most


def test_a_box_of_plausible_size_is_erased_anywhere():
    boxes = torch.stack(boxes_of_noise(erased(1.0, 300))).float()
    shares = boxes.mean((1, 2))
    assert 0.01 < shares.min() < 0.06
    assert 0.27 < shares.max() < 0.37
    assert abs(shares.mean() - (0.02 + 1 / 3) / 2) < 0.02
    for side in (boxes.mean((0, 1)), boxes.mean((0, 2))):  # all rows and columns, edges less often
        assert 0 < side.min() < side.max() < 0.75


@pytest.mark.parametrize("num_frames", [1, 5])
def test_noise_is_standard_normal_after_normalisation(num_frames):
    values = []
    for clip in erased(1.0, 20, num_frames):
        seen = normalise(clip, WHOLE.mean, WHOLE.std, channel_axis=0)
        values.append(seen[:, :, clip[0, 0] > 0])
    noise = torch.cat(values, dim=2)
    assert noise.mean((1, 2)).abs().max() < 0.05
    assert (noise.std((1, 2)) - 1).abs().max() < 0.05
    assert ((noise.abs() > 2).float().mean() - 0.0455).abs() < 0.015


def test_each_pixel_frame_and_channel_has_noise_of_its_own():
    clip = erased(1.0, 1, num_frames=4)[0]
    noise = normalise(clip, WHOLE.mean, WHOLE.std, channel_axis=0)
    planes = noise[:, :, clip[0, 0] > 0].flatten(0, 1)
    correlation = torch.corrcoef(planes) - torch.eye(12)
    assert correlation.abs().max() < 5 / planes.shape[1] ** 0.5
    neighbours = torch.corrcoef(torch.stack([planes[:, :-1].flatten(), planes[:, 1:].flatten()]))
    assert neighbours[0, 1].abs() < 5 / planes.numel() ** 0.5


def test_erasing_is_that_of_timm_on_normalised_clips():
    """Real statistics are used, for which black and white clip the noise."""
    frames = frames_of(2, 32, 32)
    plain = replace(WHOLE, mean=ALL.mean, std=ALL.std)
    for seed in range(20):
        before = applied(plain, frames, (32, 32), np.random.default_rng(seed))
        after = applied(replace(plain, erasing=0.5), frames, (32, 32), np.random.default_rng(seed))
        seen = normalise(before, ALL.mean, ALL.std, channel_axis=0).flatten(0, 1)
        with global_generators(keys_of(seed)[2]):
            RandomErasing(0.5, mode="pixel", device="cpu")(seen)
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (ALL.mean, ALL.std))
        expected = (seen.view(after.shape) * std + mean).clamp(0, 1) * 255
        assert (after - expected).abs().max() < 0.51
