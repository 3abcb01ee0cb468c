"""The frames of a video one after the other, with their times, and what its packets say.

In bounded memory, however long the video is. Frame i is that of :class:`PyavReader`.
"""

from bisect import bisect_left
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpm_video.decoding.locations import source_of
from hpm_video.decoding.orientation import orientation_of, upright_size
from hpm_video.decoding.pyav import UNTIMED, PyavReader, open_container

if TYPE_CHECKING:
    import av
    from av import VideoFrame as VideoFrame

USUAL_RATE = Fraction(25)  # frames per second, where the file does not state them
SIMPLEST = 1001  # largest denominator of a frame rate: that of 30000/1001


class Timed(NamedTuple):
    """A frame of a video, and when it is shown."""

    time: Fraction  # in seconds; begins with 0 and rises
    frame: "av.VideoFrame"
    pts: int | None = None  # as the container has it


class VideoStream:
    """The frames of a video in the order of presentation, one at a time.

    First comes :meth:`survey`, which goes through the file without decoding, then :meth:`frames`.
    """

    def __init__(self, place: str) -> None:
        """Open a file, or a member of a tar. Raises as :class:`PyavReader`."""
        import av

        self._file = source_of(place)
        with PyavReader(place, self._file) as reader:
            self.times, self._repeats = reader.index.times.tolist(), reader.index.repeats
        self._open()
        stream, container = self._stream, self._container
        self.codec = stream.codec_context.name
        self.pixel_format = stream.codec_context.pix_fmt or ""
        self.num_tracks = len(container.streams.video)  # of which one is read
        # Whether times tell the order of frames, or the container has none.
        self.has_order = bool(self.times) or container.format.name in UNTIMED
        self.tick = stream.time_base or Fraction(0)
        self.stated_frames = stream.frames  # frames and seconds by the header, 0 where missing
        self._promised = float((stream.duration or 0) * self.tick)
        self._promised = self._promised or (container.duration or 0) / av.time_base
        # Known after the survey:
        self.num_frames = 0  # that there should be
        self.left_out = 0  # packets of a group that begins before the file, without a frame
        self.rate: Fraction | None = None  # frames per second, on average
        self.key_distance = 0  # frames from one key frame to the next, at most
        self._span = 0.0  # seconds from the first frame to the last
        self._packets = 0
        # Known once frames have been read:
        self.num_read = 0
        self.size = (0, 0)  # upright height and width of the first
        self.rotation = 0  # degrees clockwise that set it upright
        self.damage = ""  # of the next frame, where there is any

    def _open(self) -> None:
        self._container, self._stream = open_container(self._file)

    def survey(self) -> Iterator[None]:
        """Find out rate, key frames and number of frames; yields now and then."""
        keys: list[tuple[int, bool]] = []
        moments: list[int] = []
        for packet in self._container.demux(self._stream):
            yield
            moment = packet.dts if packet.pts is None else packet.pts
            # Without data, but with a time, it shows the frame before again, as in AVI.
            self._packets += bool(packet.size) or moment is not None
            if not packet.size or packet.is_discard:
                continue
            if self.times and (packet.pts or 0) < self.times[0]:
                self.left_out += 1
                continue
            keys.append(((packet.pts or 0) if self.times else len(keys), packet.is_keyframe))
            moments += [] if moment is None else [moment]
        self.num_frames = len(keys)
        marks = [0, *np.flatnonzero([is_key for _, is_key in sorted(keys)]).tolist(), len(keys)]
        self.key_distance = int(np.diff(marks).max())
        span = (max(moments) - min(moments)) * self.tick if moments else Fraction(0)
        self._span = float(span)
        rate = self._stream.average_rate or self._stream.guessed_rate
        if span and len(moments) == len(keys):
            measured = Fraction((len(moments) - 1) / span)
            if not (rate and abs(measured / rate - 1) < 0.01):
                rate = measured.limit_denominator(SIMPLEST)
        self.rate = Fraction(rate) if rate and 0.001 <= rate <= 1000 else None
        self._container.close()
        self._open()

    def cut_off(self) -> str:
        """Say what the header promises where the file ends before that; otherwise nothing.

        Numbers of frames may differ (edit lists, repeated frames of AVI) if the duration is right.
        """
        missing = self._promised - self._span
        if self.stated_frames:
            is_cut = (
                self.rate and self.stated_frames > self._packets and abs(missing) > 2.5 / self.rate
            )
        else:
            is_cut = missing > max(2, self._promised / 10)
        if not is_cut:
            return ""
        frames = f"{self.stated_frames} frames in " if self.stated_frames else ""
        return (
            f"its header promises {frames}{self._promised:.4g} s, and it holds {self._packets} "
            f"frames in {self._span:.4g} s"
        )

    def frames(self) -> Iterator[Timed]:
        """Yield all frames, or those before the first that is damaged: ``damage`` says how.

        Times that the file does not have follow from its rate.
        """
        step = 1 / (self.rate or USUAL_RATE)
        time = -step
        for pts, frame in self._with_repeats():
            if not self.num_read:
                self.size, self.rotation = upright_size(frame), orientation_of(frame).degrees
            stated = Fraction(0)
            if self.times and pts is not None:
                stated = (pts - self.times[0]) * self.tick
            time = stated if stated > time else time + step
            self.num_read += 1
            yield Timed(time, frame, pts)
        if not self.times and not self.damage:
            self.num_frames = self.num_read

    def _with_repeats(self) -> "Iterator[tuple[int | None, av.VideoFrame]]":
        times, place = self.times if self._repeats else [], 0
        last: av.VideoFrame | None = None
        for frame in self._decoded():
            pts = frame.pts  # an encoder will change it
            until = bisect_left(times, pts or 0)
            if last is not None:
                yield from ((time, last) for time in times[place:until])
            last, place = frame, until + 1
            yield pts, frame
        if last is not None and not self.damage:
            yield from ((time, last) for time in times[place:])

    def _decoded(self) -> "Iterator[av.VideoFrame]":
        import av

        corrupt = set()
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt and self.times:
                corrupt.add(packet.pts)
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except EOFError:
                continue
            except (av.FFmpegError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                self.damage = f"frame {self.num_read}: {why}"
                return
            for frame in frames:
                if frame.is_corrupt or frame.pts in corrupt:
                    self.damage = f"frame {self.num_read} is damaged"
                    return
                yield frame

    def close(self) -> None:
        """Free what the decoder holds."""
        self._container.close()
