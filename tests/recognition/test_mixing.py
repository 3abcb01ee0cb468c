# ruff: noqa: NPY002 - numpy's global generator is looked at

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import Mixup
from torch.nn import functional as F

from hpm_video.config.data import AugmentationConfig
from hpm_video.randomness import global_generators
from hpm_video.recognition.objective import Mixing

CLASSES = 7


def mixing(**options):
    return Mixing(CLASSES, AugmentationConfig(**options))


def batch(size=4, num_frames=3, height=12, width=10, seed=0):
    draw = torch.Generator().manual_seed(seed)
    clips = torch.randn((size, 3, num_frames, height, width), generator=draw)
    return clips, torch.randint(CLASSES, (size,), generator=draw)


@pytest.mark.parametrize(
    "kind", [{"cutmix": 0.0}, {"mixup": 0.0}, {}, {"mix_probability": 0.5, "label_smoothing": 0.0}]
)
def test_each_frame_is_mixed_as_timm_mixes_an_image(kind):
    settings = {"mixup": 0.8, "cutmix": 1.0, "mix_probability": 1.0, "label_smoothing": 0.1} | kind
    theirs = Mixup(
        settings["mixup"],
        settings["cutmix"],
        prob=settings["mix_probability"],
        label_smoothing=settings["label_smoothing"],
        num_classes=CLASSES,
    )
    ours = mixing(**kind)
    clips, labels = batch()
    for key in range(20):
        mixed, targets = ours(clips, labels, key)
        for before, after in zip(clips.unbind(2), mixed.unbind(2), strict=True):
            with global_generators(key):
                expected, expected_targets = theirs(before.clone(), labels)
            assert torch.equal(after, expected)
            assert torch.equal(targets, expected_targets)


def test_cutmix_pastes_one_box_of_the_partner_into_all_frames():
    clips = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 5, 12, 10)
    labels = torch.arange(4)
    ours, shares = mixing(mixup=0.0, label_smoothing=0.0), set()
    for key in range(40):
        mixed, targets = ours(clips, labels, key)
        pasted = mixed != clips
        box = pasted[0, 0, 0]
        assert torch.equal(pasted, box.expand_as(pasted))
        assert torch.equal(mixed, torch.where(box, clips.flip(0), clips))
        assert torch.equal(box, box.any(1)[:, None] & box.any(0))
        share = 1 - box.float().mean()
        assert torch.allclose(targets[labels, labels], share.expand(4))
        assert torch.allclose(targets[labels, labels.flip(0)], 1 - share.expand(4), atol=1e-6)
        shares.add(share.item())
    assert len(shares) > 15


def test_mixup_takes_the_shares_of_the_labels():
    ours = mixing(cutmix=0.0, label_smoothing=0.0)
    clips, labels = batch()[0], torch.arange(4)
    shares = set()
    for key in range(40):
        mixed, targets = ours(clips, labels, key)
        share = targets[0, 0]
        assert torch.allclose(mixed, share * clips + (1 - share) * clips.flip(0), atol=1e-6)
        shares.add(share.item())
    assert len(shares) == 40


def test_both_kinds_occur_as_often_as_asked():
    clips, labels = batch(num_frames=1)
    ours = mixing(cutmix_probability=0.25, mix_probability=0.8)
    kinds = {"mixup": 0, "cutmix": 0, "neither": 0}
    for key in range(600):
        unchanged = (ours(clips, labels, key)[0] == clips).float().mean()
        kinds["neither" if unchanged == 1 else "cutmix" if unchanged > 0 else "mixup"] += 1
    # a box may be empty, or the whole frame
    assert abs(kinds["mixup"] - 360) < 50
    assert abs(kinds["cutmix"] - 120) < 50
    assert abs(kinds["neither"] - 120) < 50


@given(
    size=st.integers(1, 4).map(lambda pairs: 2 * pairs),
    num_frames=st.integers(1, 3),
    sides=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    smoothing=st.floats(0, 0.9),
    key=st.integers(-(2**63), 2**63 - 1),
)
def test_targets_sum_to_1_and_the_arguments_stay(size, num_frames, sides, smoothing, key):
    clips, labels = batch(size, num_frames, *sides)
    mixed, targets = mixing(label_smoothing=smoothing)(clips, labels, key)
    assert mixed.shape == clips.shape
    assert mixed.dtype == targets.dtype == torch.float32
    assert targets.shape == (size, CLASSES)
    assert (targets >= 0).all()
    assert torch.allclose(targets.sum(1), torch.ones(size))
    untouched = batch(size, num_frames, *sides)
    assert torch.equal(clips, untouched[0])
    assert torch.equal(labels, untouched[1])
    assert mixed.data_ptr() != clips.data_ptr()


def test_without_mixing_the_targets_are_smoothed_labels():
    clips, labels = batch()
    mixed, targets = mixing(mix_probability=0.0)(clips, labels, 0)
    assert torch.equal(mixed, clips)
    logits = torch.randn((4, CLASSES), generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(F.cross_entropy(logits, targets), expected)


def test_a_mixed_loss_is_the_mean_of_the_losses_by_share():
    clips, labels = batch()
    logits = torch.randn((4, CLASSES), generator=torch.Generator().manual_seed(1))
    share = mixing(label_smoothing=0.0)(clips, torch.arange(4), 6)[1][0, 0]
    targets = mixing()(clips, labels, 6)[1]
    losses = [
        F.cross_entropy(logits, kind, label_smoothing=0.1) for kind in (labels, labels.flip(0))
    ]
    assert torch.allclose(
        F.cross_entropy(logits, targets), share * losses[0] + (1 - share) * losses[1]
    )


def test_a_batch_depends_on_its_key_alone():
    ours, (clips, labels) = mixing(), batch()
    first = [ours(clips, labels, key) for key in range(10)]
    np.random.seed(1)
    again = [mixing()(clips, labels, key) for key in range(10)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert len({targets.numpy().tobytes() for _, targets in first}) == 10


def test_numpys_global_generator_is_left_alone():
    with global_generators(5):
        expected = np.random.rand()
    with global_generators(5):
        mixing()(*batch(), 0)
        assert np.random.rand() == expected


def test_the_order_in_memory_does_not_matter():
    clips, labels = batch()
    other = clips.to(memory_format=torch.channels_last_3d)
    for key in range(6):
        assert torch.equal(mixing()(other, labels, key)[0], mixing()(clips, labels, key)[0])


def test_the_host_reads_nothing_back():
    """Tensors on the device `meta` have no values: reading one would fail."""
    clips, labels = (tensor.to("meta") for tensor in batch())
    for key in range(10):
        mixed, targets = mixing()(clips, labels, key)
        assert mixed.device.type == targets.device.type == "meta"
