from collections import deque
from contextlib import nullcontext
from ctypes import addressof, sizeof
from dataclasses import replace

import pytest
import torch

from hpm_video.config.data import DataConfig
from hpm_video.data import loader
from hpm_video.data.batch import ClipBatch, Sample
from hpm_video.data.buffers import Buffers, Sender
from hpm_video.data.clips import VideoClips
from hpm_video.data.loader import clip_batches
from hpm_video.data.manifest import Manifest
from hpm_video.data.mixture import Place
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.decoding.reader import DecodeError
from hpm_video.workers.pool import Answer

DATA = DataConfig(num_frames=2, frame_size=(4, 4), frame_stride=1, repeats=2, max_bad_share=0.5)
SIZE = 2 * 3 * 2 * 4 * 4
"""The bytes of a sample."""
FILES = tuple(f"{number}.mp4" for number in range(40))
META = torch.device("meta")


def read(request, data=DATA):
    """Read clips of which every pixel holds the number of the file."""
    number = int(request.path.removesuffix(".mp4"))
    if number in (7, 8):
        raise DecodeError("it is no good", request.path)
    clips = torch.full((2, 3, 2, *data.frame_size), number, dtype=torch.uint8)
    return Sample(clips, (number,) * 2, -1, request.path)


class Here:
    """A pool that does each job in this process when a result is requested."""

    def __init__(self, work, *_, **__):
        self.work, self.jobs = work, deque()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def submit(self, tag, job, *, path, first, attempts):  # noqa: ARG002 - nothing is lost
        (self.jobs.appendleft if first else self.jobs.append)((tag, job))

    def next(self):
        tag, job = self.jobs.popleft()
        return Answer(tag, self.work(job), is_last=True)

    def stop(self):
        self.jobs.clear()


@pytest.fixture
def shared(monkeypatch):
    """Read batches in this process, one sample per job. -> the memory of each call"""
    made = []

    class Noted(Buffers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self.shared)

    monkeypatch.setattr(loader, "Pool", Here)
    monkeypatch.setattr(loader, "Buffers", Noted)
    monkeypatch.setattr(loader, "JOB_BYTES", 1)
    return made


def clips_of(files=FILES, reader=read):
    manifest = Manifest(files, (-1,) * len(files), (-1,) * len(files))
    stream = VideoClips(manifest, DATA, MultiScaleCrop(flip=False), seed=1)
    stream.reader = reader
    return [stream]


def batches_of(streams, batch_size=4, count=40, **options):
    places = [Place(position % len(streams), position) for position in range(count)]
    return clip_batches(streams, places, batch_size=batch_size, workers=1, **options)


def is_intact(batch):
    return bool((batch.clips.flatten(1) == batch.keys[:, None]).all())


def test_batches_are_views_of_a_few_buffers(shared):
    places, count = set(), 0
    for batch in batches_of(clips_of(FILES[:7])):
        assert is_intact(batch)
        places.add(batch.clips.data_ptr() - addressof(shared[0]))
        count += 1
    assert count == 10
    assert places == {4 * SIZE * number for number in range(len(places))}
    assert len(places) == sizeof(shared[0]) / (4 * SIZE) < 10


def test_room_is_looked_for_before_whole_batches_take_it(shared, monkeypatch):
    asked = []
    monkeypatch.setattr(loader, "check_room", lambda *_, **room: asked.append((room, len(shared))))
    batches_of(clips_of())
    assert asked == [({"shared": sizeof(shared[0]), "batches": 4 * SIZE}, 0)]


@pytest.mark.parametrize("kept", [slice(None), slice(3, 4), slice(0, 0)])
def test_a_buffer_is_written_to_again_when_no_view_of_its_batch_is_left(shared, kept):
    """This holds whatever the consumer keeps; if it keeps everything, later batches are copies."""
    held = [(batch.clips[kept], batch.keys[kept]) for batch in batches_of(clips_of(FILES[:7]))]
    assert len(held) == 10
    assert all((clips.flatten(1) == keys[:, None]).all() for clips, keys in held)


def test_a_replaced_file_lies_in_the_place_of_the_bad_one(shared):
    (stream,) = streams = clips_of()
    batches = list(batches_of(streams))
    assert all(map(is_intact, batches))
    assert set(stream.bad) == {"7.mp4", "8.mp4"}
    assert {len(batch.clips) for batch in batches} == {8}


def test_sources_of_smaller_clips_share_the_buffers(shared):
    small = replace(DATA, frame_size=(2, 2))
    manifest = Manifest(FILES[:6], (-1,) * 6, (-1,) * 6)
    other = VideoClips(manifest, small, MultiScaleCrop(flip=False), seed=1)
    other.reader = lambda request: read(request, small)
    places = [Place(batch % 2, 2 * batch + n) for batch in range(10) for n in range(2)]
    streams, shapes = [*clips_of(FILES[:6]), other], []
    for batch in clip_batches(streams, places, batch_size=2, workers=1):
        assert is_intact(batch)
        shapes.append(batch.clips.shape[3:])
    assert shapes == [(4, 4), (2, 2)] * 5


class Event:
    passed = False

    def __init__(self, log):
        self.log = log

    def query(self):
        return self.passed

    def synchronize(self):
        self.passed = True
        self.log.append("waited")


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU; copies to it do nothing. -> log of events, calls of cudart"""
    done = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def record_event(self, event):  # noqa: ARG002 - a pretended one comes back
            return Event(done)

    class Runtime:
        error = 0

        def cudaHostRegister(self, start, size, flags):  # noqa: N802
            done.append(("pinned", start, size, flags))
            return self.error

        def cudaHostUnregister(self, start):  # noqa: N802
            done.append(("unpinned", start))

        def cudaGetErrorString(self, error):  # noqa: N802
            return f"error {error}"

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return done, runtime


def test_a_buffer_is_free_when_its_copy_has_passed(gpu):
    done, _ = gpu
    ring = Buffers(3, 8)
    start, size = addressof(ring.shared), sizeof(ring.shared)
    sender = Sender(META, ring.shared)
    assert done == [("pinned", start, size, 0)]

    def send():
        clips, one = torch.from_numpy(ring.take()[1]), torch.zeros(1)
        return sender.send(ClipBatch(clips, one, one, (), ()))

    copy, first = send()
    assert copy.clips.device == META
    sender.wait()
    assert list(ring.free) == [1, 2], "nothing waits for a single copy"
    send()
    sender.wait()
    assert first.passed
    assert list(ring.free) == [2, 0], "it waits for the older one"
    _, third = send()
    third.passed = True
    sender.wait()
    assert sorted(ring.free) == [0, 1, 2]
    send()
    done.clear()
    sender.close()
    assert done == ["waited", ("unpinned", start)]
    assert len(ring.free) == 3


def test_where_memory_cannot_be_pinned_the_run_goes_on_and_says_so_in_a_line(gpu, caplog):
    done, runtime = gpu
    runtime.error = 2
    with caplog.at_level("WARNING"):
        sender = Sender(META, Buffers(1, 2**20).shared)
    (line,) = caplog.messages
    assert line.startswith("1 MiB of shared memory could not be pinned (error 2): copies")
    sender.close()
    assert [kind for kind, *_ in done] == ["pinned"]


def test_batches_go_to_the_gpu_through_one_sender_which_is_closed(shared, monkeypatch):
    done = []

    class Noting:
        def __init__(self, device, memory):
            assert (device, memory) == (META, shared[-1])

        def begin(self):
            done.append("begun")

        def wait(self):
            done.append("waited")

        def send(self, batch):
            return replace(batch, clips=batch.clips.clone()), len(done)

        def receive(self, copy, event):
            assert done[event - 1] == "waited", "before a batch is read into a buffer"
            return replace(copy, source="the GPU")

        def close(self):
            done.append("closed")

    monkeypatch.setattr(loader, "Sender", Noting)
    found = list(batches_of(clips_of(), gpu=META))
    assert [batch.source for batch in found] == ["the GPU"] * 10
    assert all(map(is_intact, found))
    assert (done[0], done[-1], done.count("closed")) == ("begun", "closed", 1)
