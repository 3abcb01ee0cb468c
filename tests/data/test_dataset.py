from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hpm_video.data import dataset as dataset_module
from hpm_video.data.dataset import (
    ClipSpec,
    Failure,
    HeldOutClips,
    TooManyBadFiles,
    VideoClips,
    collate,
    tolerated,
)
from hpm_video.data.decode import DecodeError
from hpm_video.data.manifest import Manifest
from hpm_video.randomness import key_of

SPEC = ClipSpec(num_frames=4, frame_stride=2, max_frame_stride=None, frame_size=(8, 12), repeats=1)
SEED = 7


class GreyVideo:
    """Frame i of the file '<n>' is grey of level i, and its first row of level n."""

    num_frames = 30
    opened: Counter[str] = Counter()
    read_frames: list[list[int]] = []  # noqa: RUF012

    def __init__(self, path, decoder):
        self.number = int(Path(path).name.removeprefix("bad"))
        self.opened[path] += 1
        if Path(path).name.startswith("bad"):
            raise DecodeError("made up", path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read(self, indices):
        self.read_frames.append(list(indices))
        frames = np.empty((len(indices), 16, 24, 3), np.uint8)
        frames[...] = np.asarray(indices, np.uint8)[:, None, None, None]
        frames[:, 0] = self.number
        return frames


@pytest.fixture(autouse=True)
def _grey_videos(monkeypatch):
    monkeypatch.setattr(dataset_module, "open_video", GreyVideo)
    GreyVideo.opened.clear()
    GreyVideo.read_frames.clear()


def manifest_of(*names, num_frames=-1):
    n = len(names)
    return Manifest(tuple(f"/v/{name}" for name in names), tuple(range(n)), (num_frames,) * n)


def training(*names, spec=SPEC, max_bad_share=0.5, **options):
    names = names or tuple(str(n) for n in range(6))
    return VideoClips(
        manifest_of(*names, **options),
        spec,
        decoder="auto",
        seed=SEED,
        max_bad_share=max_bad_share,
    )


def frame_indices(clip):
    """(C, T, H, W) -> the frames it was made of, from rows that no file number is in"""
    return clip[0, :, -1, -1].tolist()


def order_of(epoch, clips):
    n = len(clips)
    return [clips[position].file for position in range(epoch * n, (epoch + 1) * n)]


def test_every_epoch_is_another_permutation_of_the_files():
    clips = training()
    orders = [order_of(epoch, clips) for epoch in range(5)]
    assert all(sorted(order) == sorted(clips.manifest.files) for order in orders)
    assert len(set(map(tuple, orders))) == 5
    assert order_of(1, training()) == orders[1], "another dataset has the same orders"


def test_a_sample_has_the_clips_the_label_and_the_keys_of_its_file():
    clips = training(spec=replace(SPEC, repeats=3))
    sample = clips[8]
    index = clips.manifest.files.index(sample.file)
    assert sample.clips.shape == (3, 3, 4, 8, 12)
    assert sample.clips.dtype == torch.uint8
    assert sample.label == index
    assert sample.keys == tuple(key_of(SEED, 1, index, repeat) for repeat in range(3))
    assert sample.failures == ()


def test_a_position_always_gives_the_same_sample_and_epochs_differ():
    again = training(spec=replace(SPEC, repeats=2))
    clips = training(spec=replace(SPEC, repeats=2))
    seen = {}
    for position in (17, 0, 5, 11, 6, 1):
        sample = clips[position]
        assert torch.equal(sample.clips, again[position].clips)
        seen[position] = sample
    assert len({key for sample in seen.values() for key in sample.keys}) == 12
    assert len({tuple(frame_indices(clip)) for s in seen.values() for clip in s.clips}) > 6


def test_clips_are_frames_at_the_stride_from_a_random_start():
    clips = training()
    indices = [frame_indices(clips[position].clips[0]) for position in range(600)]
    assert all(np.diff(clip).tolist() == [2, 2, 2] for clip in indices)
    assert {clip[0] for clip in indices} == set(range(30 - 8 + 1))


def test_strides_are_drawn_up_to_the_greatest():
    clips = training(spec=replace(SPEC, max_frame_stride=5, repeats=2))
    strides = {
        tuple(np.diff(frame_indices(clip)).tolist())
        for position in range(60)
        for clip in clips[position].clips
    }
    assert strides == {(stride,) * 3 for stride in (2, 3, 4, 5)}


def test_repeats_share_one_opening_of_the_file_and_each_frame_is_read_once():
    spec = replace(SPEC, repeats=8, num_frames=10)
    sample = training(spec=spec)[3]
    assert sum(GreyVideo.opened.values()) == 1
    (read,) = GreyVideo.read_frames
    assert read == sorted(set(read))
    clips = [frame_indices(clip) for clip in sample.clips]
    assert set(read) == {frame for clip in clips for frame in clip}
    assert len(set(map(tuple, clips))) > 3


def test_a_frame_count_of_the_manifest_keeps_from_promised_frames():
    for stated, most in ((12, 10), (500, 28), (-1, 28)):
        clips = training(num_frames=stated)
        last = max(frame_indices(clips[position].clips[0])[-1] for position in range(300))
        assert last == most


def test_a_bad_file_is_recorded_and_the_next_of_the_epoch_takes_its_place():
    names = ("0", "1", "bad2", "3", "bad4", "5")
    whole = training()
    clips = training(*names)
    for epoch in range(6):
        order = [Path(file).name for file in order_of(epoch, whole)]
        for slot, number in enumerate(order):
            sample = clips[epoch * 6 + slot]
            wrapped = [names[int(n)] for n in (order + order)[slot:]]
            good = next(name for name in wrapped if not name.startswith("bad"))
            passed_over = wrapped[: wrapped.index(good)]
            assert Path(sample.file).name == good
            assert sample.label == int(good)
            assert sample.failures == tuple(Failure(f"/v/{b}", "made up") for b in passed_over)
            if passed_over:
                assert sample.keys == (key_of(SEED, epoch, int(good), 0, int(number)),)
            else:
                assert sample.keys == (key_of(SEED, epoch, int(good), 0),)


def test_a_replacement_differs_from_the_turn_of_that_file_in_the_epoch():
    clips = training("0", "bad1", spec=replace(SPEC, num_frames=1, repeats=4))
    first, second = clips[0], clips[1]
    assert first.file == second.file
    assert not set(first.keys) & set(second.keys)
    assert not torch.equal(first.clips, second.clips)


def test_a_longer_row_of_bad_files_than_may_fail_in_all_is_an_error():
    names = ("bad0", "bad1", "bad2", "3", "bad4")
    starts = [training(*names, max_bad_share=1.0)[p].failures for p in range(5)]
    assert max(map(len, starts)) >= 3
    for position, failures in enumerate(starts):
        clips = training(*names, max_bad_share=0.4)
        if len(failures) <= 2:
            assert clips[position].failures == failures
        else:
            with pytest.raises(TooManyBadFiles, match=r"3 of 5 .*max_bad_share 0\.4 allows 2"):
                clips[position]


def test_no_file_left():
    with pytest.raises(TooManyBadFiles, match="2 of 2 files") as caught:
        training("bad0", "bad1", max_bad_share=1.0)[0]
    assert "/v/bad0: made up" in str(caught.value)
    with pytest.raises(TooManyBadFiles, match="1 of 2 files do not decode"):
        training("bad0", "bad1", max_bad_share=0.0)[0]
    assert GreyVideo.opened.total() == 3


def test_a_file_listed_twice_is_one_bad_file():
    clips = training("bad0", "bad0", "bad0", "3", max_bad_share=0.1)
    assert all(len(clips[position].failures) <= 1 for position in range(8))


@pytest.mark.parametrize(
    ("num_files", "share", "expected"),
    [(100, 0.01, 1), (100, 0.29, 29), (10, 0.01, 1), (250, 0.01, 2), (10, 0.0, 0), (10, 1.0, 10)],
)
def test_how_many_bad_files_are_tolerated(num_files, share, expected):
    assert tolerated(num_files, share) == expected


def test_held_out_clips_are_the_middle_of_each_file_in_order():
    clips = HeldOutClips(
        manifest_of("0", "1", "2"), replace(SPEC, repeats=4), decoder="auto", seed=SEED
    )
    samples = list(clips)
    assert [sample.file for sample in samples] == ["/v/0", "/v/1", "/v/2"]
    assert [sample.label for sample in samples] == [0, 1, 2]
    assert all(sample.clips.shape == (1, 3, 4, 8, 12) for sample in samples)
    assert frame_indices(samples[1].clips[0]) == [11, 13, 15, 17]
    assert len({sample.keys for sample in samples}) == 3
    assert torch.equal(clips[2].clips, samples[2].clips)


def test_a_held_out_file_that_does_not_decode_is_an_error():
    clips = HeldOutClips(manifest_of("0", "bad1"), SPEC, decoder="auto", seed=SEED)
    with pytest.raises(DecodeError, match="cannot decode /v/bad1: made up"):
        clips[1]


def test_a_batch_keeps_the_clips_of_a_video_together():
    clips = training("0", "1", "bad2", "3", spec=replace(SPEC, repeats=2))
    samples = [clips[position] for position in range(4)]
    batch = collate(samples)
    assert batch.clips.shape == (8, 3, 4, 8, 12)
    assert torch.equal(batch.clips[2:4], samples[1].clips)
    assert batch.keys.tolist() == [key for sample in samples for key in sample.keys]
    assert batch.keys.dtype == batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [s.label for s in samples for _ in range(2)]
    assert batch.files == tuple(s.file for s in samples for _ in range(2))
    assert batch.failures == (Failure("/v/bad2", "made up"),)


def test_a_batch_moves_with_all_its_tensors():
    batch = collate([training()[0]]).to("meta")
    assert {batch.clips.device, batch.keys.device, batch.labels.device} == {torch.device("meta")}
    assert batch.files[0].startswith("/v/")
