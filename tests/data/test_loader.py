import os
import re
import shutil
import signal
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import alive

from hpm_video.config.data import DataConfig
from hpm_video.data.clips import ValidationClips, VideoClips
from hpm_video.data.loader import clip_batches, end_workers
from hpm_video.data.manifest import Manifest, read_manifest
from hpm_video.data.mixture import Place
from hpm_video.data.reading import Views
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import available_decoders
from hpm_video.files.failures import BadFiles, Failure, TooManyBadFiles
from hpm_video.workers import room
from hpm_video.workers.pool import GIB, NAME, Limits
from hpm_video.workers.room import RoomError

pytestmark = pytest.mark.slow

SPEC = DataConfig(
    num_frames=4,
    frame_stride=2,
    max_frame_stride=3,
    frame_size=(24, 32),
    repeats=2,
    max_bad_share=0.5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_painted):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        write_painted(folder / f"{number}.mp4", frames=20, size=(48, 64))
    return folder


def clips_of(manifest, decoder="auto", spec=SPEC):
    data = replace(spec, decoder=decoder)
    return [VideoClips(manifest, data, MultiScaleCrop(flip=True), seed=3)]


def places(positions):
    return [Place(0, position) for position in positions]


def validation_batches(clips, positions=None, **options):
    chosen = range(len(clips)) if positions is None else positions
    return clip_batches([clips], places(chosen), **options)


def batches_of(folder, positions=range(2, 15), workers=0, **options):
    clips = clips_of(read_manifest(folder), **options)
    chosen = places(positions)
    return list(clip_batches(clips, chosen, batch_size=3, workers=workers))


@pytest.mark.parametrize("decoder", available_decoders())
def test_samples_do_not_depend_on_the_number_of_workers(folder, decoder):
    alone = batches_of(folder, decoder=decoder)
    assert [len(batch.clips) for batch in alone] == [6, 6, 6, 6, 2]
    for workers in (1, 3):
        for expected, batch in zip(
            alone, batches_of(folder, workers=workers, decoder=decoder), strict=True
        ):
            assert torch.equal(batch.clips, expected.clips)
            assert torch.equal(batch.keys, expected.keys)
            assert torch.equal(batch.labels, expected.labels)
            assert batch.files == expected.files


def test_a_stream_shows_each_file_once_per_epoch_and_can_start_anywhere(folder):
    whole = batches_of(folder, range(15))
    files = [file for batch in whole for file in batch.files[::2]]
    for epoch in range(3):
        assert len(set(files[5 * epoch : 5 * epoch + 5])) == 5
    resumed = batches_of(folder, range(6, 15))
    assert [b.keys.tolist() for b in resumed] == [b.keys.tolist() for b in whole[2:]]
    assert all(torch.equal(a.clips, b.clips) for a, b in zip(resumed, whole[2:], strict=True))


def test_validation_batches_hold_the_middle_frames_of_each_file(folder, numbers_of):
    manifest = read_manifest(folder)
    spec = DataConfig(num_frames=4, frame_stride=2, frame_size=(48, 64))
    clips = ValidationClips(manifest, spec, seed=3)
    for workers in (0, 2):
        batches = list(validation_batches(clips, batch_size=2, workers=workers))
        assert [file for batch in batches for file in batch.files] == list(manifest.files)
        for clip in torch.cat([batch.clips for batch in batches]):
            assert numbers_of(clip.permute(1, 2, 3, 0).numpy()) == [6, 8, 10, 12]


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_batches_of_views_at_chosen_places_with_a_bad_file(
    folder, bad_videos, numbers_of, workers
):
    files = (*read_manifest(folder).files, str(bad_videos["empty"]))
    clips = ValidationClips(
        Manifest(files, tuple(range(6)), (-1,) * 6),
        DataConfig(num_frames=4, frame_stride=2, frame_size=(48, 48)),
        views=Views(2, 3),
        seed=3,
        report_failures=True,
    )
    chosen = [5, 3, 1]
    first, second = validation_batches(clips, chosen, batch_size=2, workers=workers)
    assert first.failures == (Failure(files[5], "the file is empty"),)
    assert second.failures == ()
    assert (first.files, second.files) == ((files[3],) * 6, (files[1],) * 6)
    assert (first.labels.tolist(), second.labels.tolist()) == ([3] * 6, [1] * 6)
    left_crops = first.clips[::3].permute(0, 2, 3, 4, 1).numpy()
    assert [numbers_of(np.pad(clip, ((0, 0), (0, 0), (0, 16), (0, 0)))) for clip in left_crops] == [
        [0, 2, 4, 6],
        [12, 14, 16, 18],
    ]


def test_the_global_generator_is_left_alone(folder):
    before = torch.get_rng_state()
    batches_of(folder, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_come_through_with_their_reasons(folder, bad_videos, workers):
    bad = [str(bad_videos[kind]) for kind in ("missing", "empty", "text", "audio")]
    files = (*read_manifest(folder).files, *bad)
    clips = clips_of(Manifest(files, (-1,) * 9, (-1,) * 9))
    batches = clip_batches(clips, places(range(9)), batch_size=3, workers=workers)
    reasons = {failure.path: failure.reason for b in batches for failure in b.failures}
    assert sorted(reasons) == sorted(bad)
    assert reasons[bad[0]] == "there is no such file"
    assert reasons[bad[1]] == "the file is empty"


def test_errors_of_workers_keep_their_kind_and_message(bad_videos):
    bad = Manifest((str(bad_videos["empty"]),), (-1,), (-1,))
    with pytest.raises(TooManyBadFiles, match=r"1 of 1 file does not decode(.|\n)*empty\.mp4"):
        next(clip_batches(clips_of(bad), places([0]), batch_size=1, workers=1))
    validation_clips = ValidationClips(bad, SPEC, seed=0)
    with pytest.raises(DecodeError, match=r"empty\.mp4: the file is empty"):
        next(validation_batches(validation_clips, batch_size=1, workers=1))


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (8, 7), (17, 16), (64, 16)])
def test_the_default_number_of_workers(monkeypatch, cores, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert room.default_workers() == workers
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert room.default_workers() == workers


def test_memory_that_a_container_may_still_take(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    monkeypatch.setattr(room, "GROUPS", tmp_path)
    assert room.memory_left() == 500


def test_a_bad_file_whose_name_is_no_text_is_noted(tmp_path):
    bad = BadFiles(tmp_path / "bad_files.csv", num_files=10, max_bad_share=0.5)
    name = os.fsdecode(b"/v/\xff.mp4")
    bad.note([Failure(name, "broken")])
    assert [*BadFiles(tmp_path / "bad_files.csv", num_files=10, max_bad_share=0.5).failures] == [
        name
    ]


READERS = """
    import ctypes
    import os
    from dataclasses import dataclass
    from pathlib import Path
    from typing import Any

    import numpy as np

    @dataclass(frozen=True)
    class Hostile:
        # A decoder that crashes or hangs on some files, by their names.

        reader: Any

        def prepare(self):
            self.reader.prepare()

        def __call__(self, request):
            if "hangs" in request.path:
                Path(request.path).with_name(f"{os.getpid()}.hangs").touch()
                ctypes.PyDLL(None).sleep(10**6)  # with the interpreter's lock
            if "crashes" in request.path:
                os.abort()
            if "eats" in request.path:
                eaten = []
                while True:
                    eaten.append(np.ones(2**22, np.uint8))
            return self.reader(request)
"""
HOSTILE = {
    "hangs": "it took longer than 2 s",
    "crashes": "the process that decoded it ended by SIGABRT",
    "eats": "it needs more memory than a process that decodes may have",
}
LIMITS = Limits(seconds=2.0, memory=GIB // 4)


@pytest.fixture(scope="module")
def hostile_reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    (folder / "hostile_readers.py").write_text(textwrap.dedent(READERS))
    sys.path.insert(0, str(folder))
    import hostile_readers

    yield hostile_readers.Hostile
    sys.path.remove(str(folder))


@pytest.fixture
def hostile_files(folder, tmp_path):
    """Good files, and among them three bad ones that look good."""
    good = read_manifest(folder).files
    bad = [str(tmp_path / f"{name}.mp4") for name in HOSTILE]
    for path in bad:
        shutil.copy(good[0], path)
    return good, bad


@pytest.mark.parametrize("frame_size", [(24, 32), (224, 224)])
def test_training_goes_on_over_files_that_take_a_decoder_down(
    hostile_files, hostile_reader, frame_size, tmp_path, pool_clock
):
    pool_clock.run_while_one_hangs(tmp_path)
    good, bad = hostile_files
    spec = replace(SPEC, frame_size=frame_size)  # small samples share a job; large ones do not

    def stream_of(files):
        clips = clips_of(Manifest(files, (-1,) * len(files), (-1,) * len(files)), spec=spec)
        return clips, clips[0]

    files = (bad[0], *good[:3], bad[1], bad[2], *good[3:])
    clips, stream = stream_of(files)
    stream.reader = hostile_reader(stream.reader)
    options = {"batch_size": 4, "workers": 1, "limits": LIMITS}
    batches = list(clip_batches(clips, places(range(24)), **options))
    reasons = {failure.path: failure.reason for b in batches for failure in b.failures}
    assert reasons == dict(zip(bad, HOSTILE.values(), strict=True))
    assert [len(batch.clips) for batch in batches] == [8] * 6
    # The same as if the three had simply failed to decode.
    expected, stream = stream_of(files)
    stream.bad = {path: Failure(path, "bad") for path in bad}
    for batch, other in zip(
        batches,
        clip_batches(expected, places(range(24)), batch_size=4, workers=0),
        strict=True,
    ):
        assert torch.equal(batch.clips, other.clips)
        assert batch.files == other.files


def test_a_test_reports_files_that_take_a_decoder_down(
    hostile_files, hostile_reader, tmp_path, pool_clock
):
    pool_clock.run_while_one_hangs(tmp_path)
    good, bad = hostile_files
    files = (*good, *bad)
    manifest = Manifest(files, tuple(range(8)), (-1,) * 8)
    options = {"batch_size": 3, "workers": 1, "limits": LIMITS}
    clips = ValidationClips(manifest, SPEC, seed=0, report_failures=True)
    clips.reader = hostile_reader(clips.reader)
    batches = list(validation_batches(clips, **options))
    assert [file for batch in batches for file in batch.files] == list(good)
    found = [failure for batch in batches for failure in batch.failures]
    assert [failure.reason for failure in found] == list(HOSTILE.values())
    again = list(validation_batches(clips, **options))  # they are known by now, so no time is lost
    assert [failure for batch in again for failure in batch.failures] == found
    strict = ValidationClips(manifest, SPEC, seed=0)
    strict.reader = hostile_reader(strict.reader)
    with pytest.raises(DecodeError, match=r"hangs\.mp4: it took longer than 2 s"):
        list(validation_batches(strict, **options))


def test_an_error_comes_when_it_is_the_turn_of_its_batch(folder, bad_videos):
    files = (*read_manifest(folder).files, str(bad_videos["empty"]))
    clips = ValidationClips(Manifest(files, (-1,) * 6, (-1,) * 6), SPEC, seed=0)
    batches = validation_batches(clips, batch_size=2, workers=2)
    assert [len(next(batches).clips) for _ in range(2)] == [2, 2]
    with pytest.raises(DecodeError, match="the file is empty"):
        next(batches)


def test_what_is_read_ahead_must_fit(folder, monkeypatch):
    clips = clips_of(read_manifest(folder))
    options = {"batch_size": 64, "workers": 8}
    monkeypatch.setattr(room, "shared_memory", lambda: (2**40, 2**20))
    with pytest.raises(RoomError, match=r"data.workers=\d need \d+ MiB .*/dev/shm has 1 MiB"):
        clip_batches(clips, places(range(1000)), **options)
    monkeypatch.setattr(room, "shared_memory", lambda: (2**21, 2**40))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(RoomError, match=r"in each of 4 processes need \d+ MiB .* has 2 MiB"):
        clip_batches(clips, places(range(1000)), **options)
    monkeypatch.setattr(room, "shared_memory", lambda: (None, None))
    monkeypatch.setattr(room, "memory_left", lambda: 2**20)
    with pytest.raises(RoomError, match=r"need \d+ MiB of memory .* and 1 MiB are left"):
        clip_batches(clips, places(range(1000)), **options)


def test_processes_of_the_program_around_a_run_live_on(monkeypatch):
    ended = []

    class Child:
        def __init__(self, name):
            self.name = name

        def kill(self):
            ended.append(self.name)

        def join(self, timeout):
            pass

    children = [Child("Process-1"), Child(NAME)]
    monkeypatch.setattr("multiprocessing.active_children", lambda: children)
    end_workers()
    assert ended == [NAME]


RUN = """
    import signal
    import sys
    from hpm_video.config.data import DataConfig
    from hpm_video.data.clips import VideoClips
    from hpm_video.data.loader import clip_batches
    from hpm_video.data.manifest import read_manifest
    from hpm_video.data.mixture import Places, deal_out
    from hpm_video.data.transforms import MultiScaleCrop
    from multiprocessing import active_children
    from pathlib import Path

    clips = VideoClips(
        read_manifest(sys.argv[1]),
        DataConfig(num_frames=4, frame_stride=2, frame_size=(24, 32), repeats=2, max_bad_share=0),
        MultiScaleCrop(flip=False),
        seed=0,
    )
    places = Places(deal_out([1], 10**6), batch_size=2)
    batches = clip_batches([clips], places, batch_size=2, workers=2)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    next(batches)
    Path(sys.argv[2]).write_text(" ".join(str(child.pid) for child in active_children()))
    while not stop:
        next(batches)
    for _ in range(20):  # it can end in order, as the workers live on
        next(batches)
    del batches
    sys.stdout.write("stopped in order\\n")
"""


@pytest.fixture
def start_reading(folder, start_program, tmp_path):
    """Start a program that reads batches. -> the program, and its two workers"""
    started = []

    def start(**variables):
        code, pids = textwrap.dedent(RUN), tmp_path / "pids"
        started.append(start_program("-c", code, str(folder), str(pids), **variables))
        while not pids.exists() or len(pids.read_text().split()) < 2:
            assert started[0].poll() is None, started[0].communicate()[0]
            time.sleep(0.05)
        return started[0], [int(pid) for pid in pids.read_text().split()]

    yield start
    for program in started:
        if program.poll() is None:
            os.kill(program.pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_end_when_the_parent_is_killed(start_reading):
    program, workers = start_reading()
    assert all(map(alive, workers))
    os.kill(program.pid, signal.SIGKILL)
    while any(map(alive, workers)):
        time.sleep(0.05)


def ignores(pid, number):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^SigIgn:\s*(\w+)", status, re.M)[1], 16) >> (number - 1) & 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_ctrl_c_reaches_the_parent_alone(start_reading):
    program, workers = start_reading(OWN_SERVER="yes")  # its workers are in its process group
    assert [os.getpgid(pid) for pid in workers] == [program.pid] * 2
    while not all(ignores(pid, signal.SIGTERM) for pid in workers):  # they set SIGINT before it
        time.sleep(0.01)
    os.killpg(program.pid, signal.SIGINT)
    assert program.communicate()[0] == "stopped in order\n"
    assert program.returncode == 0


def failure(number):
    return Failure(f"/v/a, {number}.mp4", f"no. {number}: 'broken', \"twice\"")


def test_bad_files_are_written_once_and_read_back(tmp_path):
    path = tmp_path / "bad_files.csv"
    bad = BadFiles(path, num_files=10, max_bad_share=0.3)
    bad.note([])
    assert not path.exists()
    bad.note([failure(1), failure(1)])
    assert path.read_text().splitlines()[0] == "path,reason"
    bad.note([failure(1), failure(2)])
    assert len(path.read_text().splitlines()) == 3
    resumed = BadFiles(path, num_files=10, max_bad_share=0.3)
    assert len(resumed.failures) == 2
    resumed.note([failure(2), failure(3)])
    with pytest.raises(TooManyBadFiles, match=r"(?s)4 of 10 .*=0\.3 allows 3") as caught:
        resumed.note([failure(4)])
    assert failure(1).reason in str(caught.value)
    assert len(path.read_text().splitlines()) == 5, "the last one is recorded too"


@pytest.mark.parametrize(("share", "allowed"), [(0.01, 1), (0.0, 0)])
def test_one_bad_file_is_tolerated_unless_none_is(tmp_path, share, allowed):
    bad = BadFiles(tmp_path / "bad_files.csv", num_files=10, max_bad_share=share)
    for number in range(allowed):
        bad.note([failure(number)])
    with pytest.raises(TooManyBadFiles):
        bad.note([failure(99)])
