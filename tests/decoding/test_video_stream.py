"""Streams of made-up packets: which frames count as sound, as repeated and as lost."""

from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest

from hpm_video.decoding import video_stream
from hpm_video.decoding.video_stream import VideoStream
from hpm_video.preparation.check import _sound_frames


def packet(time, *frames, error=None, is_corrupt=False, is_key=False, dts=None, size=9):
    """A packet that decodes to frames with these times; negative ones are damaged."""

    def decode():
        if error:
            raise error
        return [
            SimpleNamespace(pts=abs(shown), is_corrupt=shown < 0, height=4, width=6, side_data={})
            for shown in frames
        ]

    return SimpleNamespace(
        pts=time,
        dts=dts,
        size=size,
        decode=decode,
        is_corrupt=is_corrupt,
        is_keyframe=is_key,
        is_discard=False,
    )


@pytest.fixture
def stream_of(monkeypatch):
    def make(*packets, has_times=True, repeats=False, rate=25, header=(0, 0)):
        times = sorted(each.pts for each in packets if has_times)
        codec = SimpleNamespace(name="fake", pix_fmt="yuv420p")
        stream = SimpleNamespace(
            codec_context=codec,
            time_base=Fraction(1, 100),
            frames=header[0],
            duration=header[1],
            average_rate=rate,
            guessed_rate=None,
        )
        container = SimpleNamespace(
            streams=SimpleNamespace(video=[stream]),
            format=SimpleNamespace(name="fake"),
            duration=None,
            demux=lambda _: iter(packets),
            close=lambda: None,
        )

        class Reader:
            def __init__(self, *_):
                self.index = SimpleNamespace(times=np.array(times), repeats=repeats)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(video_stream, "PyavReader", Reader)
        monkeypatch.setattr(video_stream, "source_of", lambda place: place)
        monkeypatch.setattr(video_stream, "open_container", lambda _: (container, stream))
        made = VideoStream("a.mp4")
        list(made.survey())
        return made

    return make


INVALID = av.error.InvalidDataError(1, "Invalid data")


def sound_of(stream):
    def results():
        yield (yield from _sound_frames(stream))

    (*_, found) = results()
    return found


@pytest.mark.parametrize(
    ("packets", "sound", "why"),
    [
        ([packet(0, 0), packet(2), packet(1, 1, 2)], 3, ""),
        ([packet(0, 0), packet(2), packet(1, -1, 2)], 1, "frame 1 is damaged"),
        ([packet(0, 0), packet(2), packet(1, 2)], 1, "frame 1 does not come out of the decoder"),
        ([packet(0, 0), packet(2, 1, is_corrupt=True), packet(1, 2)], 2, "frame 2 is damaged"),
        ([packet(0, 0), packet(1, error=INVALID), packet(2, 2)], 1, "frame 1: Invalid data"),
        ([packet(0, 0), packet(1, 1), packet(2)], 2, "frame 2 does not come out of the decoder"),
        ([packet(0, 0), packet(3, 3), packet(1, 1)], 1, "the times of its frames contradict"),
        ([packet(0, 0), packet(1, error=EOFError()), packet(2, 1, 2)], 3, ""),
    ],
)
def test_frames_are_sound_until_one_is_not(stream_of, packets, sound, why):
    stream = stream_of(*packets)
    found, reason = sound_of(stream)
    assert (found, stream.num_frames) == (sound, 3)
    assert reason.startswith(why)
    assert bool(reason) == bool(why)


def test_without_times_all_frames_are_sound_that_come(stream_of):
    packets = [packet(0, 7), packet(1), packet(2, 8)]
    stream = stream_of(*packets, has_times=False)
    assert (sound_of(stream), stream.num_frames) == ((2, ""), 2)
    stream = stream_of(*packets, packet(3, error=INVALID), has_times=False)
    assert (sound_of(stream), stream.num_frames) == ((2, "frame 2: Invalid data"), 4)


def test_a_lack_of_memory_is_raised(stream_of):
    with pytest.raises(MemoryError):
        list(stream_of(packet(0, 0), packet(1, error=MemoryError())).frames())


def test_packets_without_a_frame_show_the_one_before(stream_of):
    packets = [packet(0, 0), packet(2), packet(4), packet(6, 6), packet(8)]
    timed = [*stream_of(*packets, repeats=True).frames()]
    assert [each.pts for each in timed] == [0, 2, 4, 6, 8]
    assert [each.frame.pts for each in timed] == [0, 0, 0, 6, 6]
    assert [each.time for each in timed] == [Fraction(each.pts, 100) for each in timed]
    damaged = stream_of(*packets, packet(10, error=INVALID), repeats=True)
    assert [each.pts for each in damaged.frames()] == [0, 2, 4, 6]


def test_key_frames_are_counted_in_the_order_of_display(stream_of):
    times = [0, 4, 2, 1, 3, 5]
    packets = [packet(time, is_key=time in (0, 4)) for time in times]
    assert stream_of(*packets).key_distance == 4
    packets = [packet(None, is_key=place == 1) for place in range(5)]
    assert stream_of(*packets, has_times=False).key_distance == 4


def test_the_rate_is_that_of_the_times(stream_of):
    packets = [packet(None, dts=44 * number) for number in range(5)]
    empty = [packet(None, dts=44 * number + 7, size=0) for number in range(4)]
    stream = stream_of(*packets, *empty, has_times=False, rate=15, header=(9, 176))
    assert stream.rate == Fraction(100, 44)
    assert not stream.cut_off()
    assert stream_of(packet(0), packet(4), rate=Fraction(2501, 100)).rate == Fraction(2501, 100)
    assert stream_of(packet(0), rate=None).rate is None


def test_a_header_that_promises_more_is_reported(stream_of):
    packets = [packet(4 * number) for number in range(26)]
    assert not stream_of(*packets, header=(26, 104)).cut_off()
    assert not stream_of(*packets, header=(30, 104)).cut_off(), "an edit list"
    message = "its header promises 50 frames in 2 s, and it holds 26 frames in 1 s"
    assert stream_of(*packets, header=(50, 200)).cut_off() == message
    assert not stream_of(*packets, header=(0, 200)).cut_off()
    message = "its header promises 9 s, and it holds 26 frames in 1 s"
    assert stream_of(*packets, header=(0, 900)).cut_off() == message
