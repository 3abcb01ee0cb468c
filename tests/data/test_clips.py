from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hpm_video.config.data import DataConfig
from hpm_video.data import reading
from hpm_video.data.batch import collate
from hpm_video.data.clips import ValidationClips, VideoClips
from hpm_video.data.manifest import Manifest
from hpm_video.data.reading import Views
from hpm_video.data.transforms import (
    MultiScaleCrop,
    cut,
    resize,
    view_boxes,
    view_crops,
)
from hpm_video.decoding.reader import DecodeError
from hpm_video.files.failures import Failure, TooManyBadFiles, tolerated
from hpm_video.randomness import key_of

SPEC = DataConfig(num_frames=4, frame_stride=2, frame_size=(8, 12))
SEED = 7


class GreyVideo:
    """Frame i of the file '<n>' is grey of level i, but its first row has level n.

    In the file 'wide<n>' every column of every frame has a level of its own.
    """

    num_frames = 30
    size = (16, 24)
    opened: Counter[str] = Counter()
    read_frames: list[list[int]] = []  # noqa: RUF012

    def __init__(self, path, decoder):
        self.number = int(Path(path).name.removeprefix("bad").removeprefix("wide"))
        self.wide = Path(path).name.startswith("wide")
        self.opened[path] += 1
        if Path(path).name.startswith("bad"):
            raise DecodeError("made up", path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def frames_stated(self, stated):
        return min(stated, self.num_frames) if stated > 0 else self.num_frames

    @property
    def height(self):
        return self.size[0]

    @property
    def width(self):
        return self.size[1]

    def read(self, indices):
        self.read_frames.append(list(indices))
        frames = np.empty((len(indices), *self.size, 3), np.uint8)
        frames[...] = np.asarray(indices, np.uint8)[:, None, None, None]
        if self.wide:
            frames += 5 * np.arange(self.size[1], dtype=np.uint8)[:, None]
        else:
            frames[:, 0] = self.number
        return frames


@pytest.fixture(autouse=True)
def _grey_videos(monkeypatch):
    monkeypatch.setattr(reading, "open_video", GreyVideo)
    GreyVideo.opened.clear()
    GreyVideo.read_frames.clear()


def manifest_of(*names, num_frames=-1):
    n = len(names)
    return Manifest(tuple(f"/v/{name}" for name in names), tuple(range(n)), (num_frames,) * n)


def training(
    *names, spec=SPEC, repeats=1, same_frames=False, flip=False, max_bad_share=0.5, **options
):
    names = names or tuple(str(n) for n in range(6))
    return VideoClips(
        manifest_of(*names, **options),
        replace(spec, repeats=repeats, max_bad_share=max_bad_share),
        MultiScaleCrop(flip=flip),
        seed=SEED,
        same_frames=same_frames,
    )


def validation_clips(*names, spec=SPEC, clips=1, crops=1, **options):
    return ValidationClips(
        manifest_of(*names), spec, views=Views(clips, crops), seed=SEED, **options
    )


def frame_indices(clip):
    """(C, T, H, W) -> indices of its frames, from rows that do not hold the file's number"""
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
    clips = training(repeats=3)
    sample = clips[8]
    index = clips.manifest.files.index(sample.file)
    assert sample.clips.shape == (3, 3, 4, 8, 12)
    assert sample.clips.dtype == torch.uint8
    assert sample.label == index
    assert sample.keys == tuple(key_of(SEED, 1, index, repeat) for repeat in range(3))
    assert sample.failures == ()


def test_a_position_always_gives_the_same_sample_and_epochs_differ():
    again = training(repeats=2)
    clips = training(repeats=2)
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
    clips = training(spec=replace(SPEC, max_frame_stride=5), repeats=2)
    strides = {
        tuple(np.diff(frame_indices(clip)).tolist())
        for position in range(60)
        for clip in clips[position].clips
    }
    assert strides == {(stride,) * 3 for stride in (2, 3, 4, 5)}


def test_repeats_share_one_opening_of_the_file_and_each_frame_is_read_once():
    sample = training(spec=replace(SPEC, num_frames=10), repeats=8)[3]
    assert sum(GreyVideo.opened.values()) == 1
    (read,) = GreyVideo.read_frames
    assert read == sorted(set(read))
    clips = [frame_indices(clip) for clip in sample.clips]
    assert set(read) == {frame for clip in clips for frame in clip}
    assert len(set(map(tuple, clips))) > 3


def test_copies_of_the_same_frames_differ_in_their_crops():
    sample = training("wide0", repeats=6, same_frames=True)[4]
    (read,) = GreyVideo.read_frames
    assert len(read) == 4
    assert np.diff(read).tolist() == [2, 2, 2]
    assert len({clip.numpy().tobytes() for clip in sample.clips}) > 3, "each copy has its own crop"
    assert len(set(sample.keys)) == 6
    grey = training("0", repeats=6, same_frames=True)
    starts = set()
    for position in range(40):
        clips = [frame_indices(clip) for clip in grey[position].clips]
        assert clips == clips[:1] * 6
        starts.add(clips[0][0])
    assert len(starts) > 10, "every epoch has another clip"


def test_the_first_copy_is_what_a_single_one_would_be():
    alone, copies, apart = (
        training(repeats=count, same_frames=same)[3].clips
        for count, same in ((1, True), (3, True), (3, False))
    )
    assert torch.equal(copies[0], alone[0])
    assert torch.equal(apart[0], alone[0])


def test_segments_give_one_frame_each_and_strides_play_no_part():
    spec = replace(SPEC, sampling="segments", frame_stride=9, num_frames=5)
    clips = training(spec=spec, repeats=2)
    seen = [frame_indices(clip) for position in range(120) for clip in clips[position].clips]
    for segment in range(5):
        assert {clip[segment] for clip in seen} == set(range(6 * segment, 6 * segment + 6))
    assert len(set(map(tuple, seen))) > 200, "segments draw independently"


def test_segments_of_a_video_shorter_than_the_clip_repeat_frames(monkeypatch):
    monkeypatch.setattr(GreyVideo, "num_frames", 3)
    clips = training(spec=replace(SPEC, sampling="segments", num_frames=6))
    assert all(frame_indices(clips[p].clips[0]) == [0, 0, 1, 1, 2, 2] for p in range(12))


def test_mirrored_clips_are_about_half_and_none_unless_wanted():
    plain, mirrored = training("wide0"), training("wide0", flip=True)
    flips = 0
    for position in range(200):
        here, there = plain[position].clips, mirrored[position].clips
        flips += bool(torch.equal(there, here.flip(-1)))
        assert torch.equal(there, here) or torch.equal(there, here.flip(-1))
        assert (here[..., 1:].int() >= here[..., :-1].int()).all(), "columns rise to the right"
    assert 75 < flips < 125


def test_a_frame_count_of_the_manifest_keeps_from_promised_frames():
    for stated, most in ((12, 10), (500, 28), (-1, 28)):
        clips = training(num_frames=stated)
        last = max(frame_indices(clips[position].clips[0])[-1] for position in range(300))
        assert last == most


def test_a_bad_file_is_recorded_and_the_next_of_the_epoch_takes_its_place():
    names = ("0", "1", "bad2", "3", "bad4", "5")
    whole = training()
    clips = training(*names)
    reported = set()
    for epoch in range(6):
        order = [Path(file).name for file in order_of(epoch, whole)]
        for slot, number in enumerate(order):
            sample = clips[epoch * 6 + slot]
            wrapped = [names[int(n)] for n in (order + order)[slot:]]
            good = next(name for name in wrapped if not name.startswith("bad"))
            passed_over = wrapped[: wrapped.index(good)]
            assert Path(sample.file).name == good
            assert sample.label == int(good)
            # Each is reported once; from then on it is known, and not tried again.
            new = [name for name in passed_over if name not in reported]
            assert sample.failures == tuple(Failure(f"/v/{name}", "made up") for name in new)
            reported |= set(new)
            if passed_over:
                assert sample.keys == (key_of(SEED, epoch, int(good), 0, int(number)),)
            else:
                assert sample.keys == (key_of(SEED, epoch, int(good), 0),)


def test_a_replacement_differs_from_the_turn_of_that_file_in_the_epoch():
    clips = training("0", "bad1", spec=replace(SPEC, num_frames=1), repeats=4)
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
            with pytest.raises(TooManyBadFiles, match=r"(?s)3 of 5 .*max_bad_share=0\.4 allows 2"):
                clips[position]


def test_no_file_left():
    with pytest.raises(TooManyBadFiles, match="2 of 2 files") as caught:
        training("bad0", "bad1", max_bad_share=1.0)[0]
    assert "/v/bad0: made up" in str(caught.value)
    with pytest.raises(TooManyBadFiles, match="1 of 2 files does not decode"):
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


def test_validation_clips_are_the_middle_of_each_file_in_order():
    clips = ValidationClips(manifest_of("0", "1", "2"), SPEC, seed=SEED)
    samples = list(clips)
    assert [sample.file for sample in samples] == ["/v/0", "/v/1", "/v/2"]
    assert [sample.label for sample in samples] == [0, 1, 2]
    assert all(sample.clips.shape == (1, 3, 4, 8, 12) for sample in samples)
    assert frame_indices(samples[1].clips[0]) == [11, 13, 15, 17]
    assert len({sample.keys for sample in samples}) == 3
    assert torch.equal(clips[2].clips, samples[2].clips)


def test_a_validation_file_that_does_not_decode_is_an_error():
    clips = validation_clips("0", "bad1", clips=2)
    with pytest.raises(DecodeError, match="cannot decode /v/bad1: made up"):
        clips[1]


def test_a_failure_that_is_reported_leaves_no_clips_and_replaces_nothing():
    clips = validation_clips("0", "bad1", "2", clips=2, crops=3, report_failures=True)
    samples = list(clips)
    assert [len(sample.clips) for sample in samples] == [6, 0, 6]
    assert samples[1].failures == (Failure("/v/bad1", "made up"),)
    assert samples[1].file == "/v/bad1"
    assert samples[1].keys == ()
    assert samples[0].failures == samples[2].failures == ()
    batch = collate(samples)
    assert batch.clips.shape == (12, 3, 4, 8, 12)
    assert batch.clips.dtype == torch.uint8
    assert torch.equal(batch.clips[6:], samples[2].clips)
    assert batch.labels.tolist() == [0] * 6 + [2] * 6
    assert batch.keys.dtype == batch.labels.dtype == torch.int64
    assert batch.keys.shape == (12,)
    assert batch.files == ("/v/0",) * 6 + ("/v/2",) * 6
    assert batch.failures == (Failure("/v/bad1", "made up"),)


def test_a_batch_of_failures_alone():
    batch = collate(list(validation_clips("bad0", "bad1", report_failures=True)))
    assert batch.clips.shape == (0, 3, 4, 8, 12)
    assert batch.clips.dtype == torch.uint8
    assert batch.keys.shape == batch.labels.shape == (0,)
    assert [failure.path for failure in batch.failures] == ["/v/bad0", "/v/bad1"]


def test_a_video_is_opened_once_and_each_frame_read_once_for_all_its_views():
    samples = list(validation_clips("0", "1", spec=replace(SPEC, num_frames=10), clips=5, crops=3))
    assert set(GreyVideo.opened.values()) == {1}
    assert len(GreyVideo.read_frames) == 2
    for sample, read in zip(samples, GreyVideo.read_frames, strict=True):
        assert sample.clips.shape == (15, 3, 10, 8, 12)
        assert read == sorted(set(read)), "clips overlap, but no frame is read twice"
        assert set(read) == {frame for clip in sample.clips for frame in frame_indices(clip)}
        assert len(set(sample.keys)) == 1
        assert len(sample.keys) == 15


@pytest.mark.parametrize(
    ("sampling", "of_clips"),
    [
        ("dense", [[0, 2, 4, 6], [11, 13, 15, 17], [22, 24, 26, 28]]),
        ("segments", [[0, 7, 15, 22], [2, 10, 17, 25], [5, 12, 20, 27]]),
    ],
)
@pytest.mark.parametrize("size", [(16, 40), (40, 16)])
def test_views_are_in_order_the_crops_of_a_clip_beside_each_other(
    monkeypatch, sampling, of_clips, size
):
    monkeypatch.setattr(GreyVideo, "size", size)
    spec = replace(SPEC, sampling=sampling, frame_size=(16, 16))
    (sample,) = validation_clips("wide7", spec=spec, clips=3, crops=3)
    boxes = view_boxes(*size, (16, 16), 3)
    whole = GreyVideo("/v/wide7", "auto")
    expected = [
        resize(cut(whole.read(indices), box), (16, 16), "bilinear")
        for indices in of_clips
        for box in boxes
    ]
    assert torch.equal(sample.clips, torch.stack(expected))


@pytest.mark.parametrize("short_side", [None, 14])
def test_views_are_cropped_as_the_spec_says(monkeypatch, short_side):
    monkeypatch.setattr(GreyVideo, "size", (20, 40))
    spec = replace(
        SPEC, frame_size=(12, 12), validation_short_side=short_side, interpolation="bicubic"
    )
    (sample,) = validation_clips("wide7", spec=spec, clips=2, crops=3)
    frames = GreyVideo("/v/wide7", "auto").read([0, 2, 4, 6])
    expected = view_crops(frames, spec, 3)
    assert torch.equal(sample.clips[:3], torch.stack(expected))
    other = replace(spec, validation_short_side=None if short_side else 14)
    assert not torch.equal(sample.clips[1], view_crops(frames, other, 3)[1])


def test_views_know_of_promised_frames_too():
    manifest = manifest_of("0", num_frames=12)
    clips = ValidationClips(manifest, SPEC, views=Views(2, 1), seed=SEED)
    assert [frame_indices(clip) for clip in clips[0].clips] == [[0, 2, 4, 6], [4, 6, 8, 10]]


def test_a_batch_keeps_the_clips_of_a_video_together():
    clips = training("0", "1", "bad2", "3", repeats=2)
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
