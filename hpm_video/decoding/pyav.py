"""Videos with PyAV: exact on every container tried, and the first choice."""

import io
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from hpm_video.decoding.mp4 import read_listing
from hpm_video.decoding.orientation import orientation_of
from hpm_video.decoding.reader import TRANSCODE, DecodeError, Frames, NoSuchFrame, VideoReader

if TYPE_CHECKING:
    import av

    Packets = Iterator[av.Packet[av.VideoStream]]
    Numbered = Iterator[tuple[int | None, av.VideoFrame]]

FORMATS = "mov,matroska,avi,flv,asf,ogg,mpeg,mpegvideo,mpegts,gif,yuv4mpegpipe"
"""Formats of FFmpeg that a video may have, whatever its suffix. Others open further files."""
UNTIMED = ("avi", "mpeg", "mpegvideo")
"""Containers whose presentation times are made up by the demuxer, or missing."""
_TRIED = 24  # frames that are decoded at once where packets leave doubts about the first ones
_SEEK_SAVES = 8  # frames that must not need decoding to make a seek worth while
_UNPROBED = {"probesize": "32", "fpsprobesize": "0", "skip_frame": "all"}
_MARKS_UNUSED = ("h264", "mpeg4")
"""Codecs that mark the frames to which no other one refers. In HEVC such a mark is void where there
are temporal layers; the decoders of the others do not skip frames at a word."""
INDICES_HELD = 64


@dataclass(frozen=True)
class Index:
    """The frames of a video and how to reach them, as far as its packets say."""

    times: NDArray[np.int64]  # of presentation, rising; none where they do not tell the order
    keys: list[tuple[int, int | None]]  # times of presentation and decoding that may be sought
    repeats: bool  # whether a packet without a frame shows the one before again
    may_skip: bool  # whether frames to which no other one refers may be left out


_INDICES: dict[tuple[str, int, int], Index] = {}
"""The last ones found, by path, size and time of the last change: to index a video means to read
all of it, and further clips of a long one need not wait for that again."""


def open_container(
    source: str | bytes, *, probes: bool = True
) -> "tuple[av.container.InputContainer, av.VideoStream]":
    """Open the path of a video, or its bytes, and find the stream that FFmpeg ranks best.

    FFmpeg can open nothing else on its behalf, and decodes on one thread. Without ``probes``
    nothing is decoded to find out more than the container says.

    Raises:
        DecodeError: it is no video, or there is no decoder for it.
        av.FFmpegError: it cannot be opened.
    """
    import av

    try:
        container = av.open(
            io.BytesIO(source) if isinstance(source, bytes) else source,
            mode="r",
            metadata_errors="ignore",
            options={
                "protocol_whitelist": "none" if isinstance(source, bytes) else "file",
                "format_whitelist": FORMATS,
            }
            | ({} if probes else _UNPROBED),
        )
    except (av.error.InvalidDataError, av.error.EOFError, av.error.ArgumentError) as error:
        known = FORMATS.replace(",", ", ")
        raise DecodeError(
            f"its container is none of those supported ({known}), or it is cut off or damaged: "
            f"{error.strerror}. Download it again, or convert it: ffmpeg -i FILE NEW.mp4"
        ) from error
    stream = cast("av.VideoStream | None", container.streams.best("video"))
    if stream is None or av.stream.Disposition.attached_pic in stream.disposition:
        container.close()
        raise DecodeError("it has no video stream" + (", but a cover picture" if stream else ""))
    if getattr(stream, "codec_context", None) is None:
        container.close()
        raise DecodeError(
            "there is no decoder here for its codec. Encode it anew with a program that has one, "
            "such as the FFmpeg of the system: ffmpeg -i FILE NEW.mp4"
        )
    stream.codec_context.thread_count = 1
    return container, stream


class PyavReader(VideoReader):
    """Decodes from the key frame before the first frame wanted, or goes on where it stopped.

    Frames that are not wanted are not decoded where no other one refers to them. A frame is
    identified by its time, or where the container has none by counting from the first.
    """

    def __init__(self, path: str, source: str | bytes) -> None:
        from av.video.reformatter import VideoReformatter

        super().__init__(path)
        self._source = source
        # One for all frames: making one takes longer than converting a small frame.
        self._reformatter = VideoReformatter()
        self._frames: Numbered = iter(())
        self._at: int | None = None
        self._wanted: set[int] = set()
        self._last_wanted, self._skips = 0, False
        self._skipped: set[int] = set()
        self._listing = read_listing(source)
        self._open()
        try:
            self.index = self._known_index()
        except BaseException:
            self.close()
            raise
        self._num_frames = len(self.index.times) or None
        self._counts_by_decoding = not self._num_frames

    def _open(self) -> None:
        self._container, self._stream = open_container(self._source, probes=not self._listing)
        self._is_at_start = True
        self._codec = self._stream.codec_context

    def _known_index(self) -> Index:
        if isinstance(self._source, bytes):
            return self._find_index()
        state = os.stat(self._source)  # noqa: PTH116 - a path is a string in here
        key = (self._source, state.st_size, state.st_mtime_ns)
        if key not in _INDICES:
            _INDICES[key] = self._find_index()
            if len(_INDICES) > INDICES_HELD:
                del _INDICES[next(iter(_INDICES))]
        return _INDICES[key]

    def _find_index(self) -> Index:
        """Find out from its packets which frames there are, in general without decoding them."""
        nothing = Index(np.arange(0), [], repeats=False, may_skip=False)
        if self._container.format.name in UNTIMED:
            return nothing
        packets = self._packets()
        if not packets:
            raise DecodeError("it has no frames")
        stored = [pts for pts, _, _ in packets if pts is not None]
        times = np.unique(np.array(stored, np.int64))
        keys = sorted((pts, dts) for pts, dts, is_key in packets if is_key and pts is not None)
        has_b_frames = self._codec.has_b_frames
        if len(times) < len(packets):
            return nothing
        begins_inside = not keys or times[0] < keys[0][0]
        if begins_inside or (has_b_frames and stored == times.tolist()):
            first = self._first_that_comes(otherwise=times[0])
            if first is None:
                return nothing
            times, keys = times[times >= first], [key for key in keys if key[0] >= first]
        # A palette comes with the first packet alone, and is lost with a seek.
        keys = [] if self._codec.pix_fmt == "pal8" else keys
        may_skip = self._codec.name in _MARKS_UNUSED or self._has_one_layer()
        return Index(times, keys, repeats=not has_b_frames, may_skip=may_skip)

    def _packets(self) -> Sequence[tuple[int | None, int | None, bool]]:
        """Return the times of presentation and decoding of each packet, and whether it is a key."""
        if self._listing:
            is_alone = len(self._container.streams.video) == 1
            listed = self._listing.packets([*self._stream.index_entries]) if is_alone else []
            times = [pts for pts, _, _ in listed]
            # Only frames out of order prove that the decoder knows how many it has to hold back.
            if any(is_key for *_, is_key in listed) and times != sorted(times):
                return listed
            self._listing = None
            self._container.close()
            self._open()
        return [
            (packet.pts, packet.dts, packet.is_keyframe)
            for packet in self._demux()
            if packet.size and not packet.is_discard
        ]

    def seconds(self, count: int) -> NDArray[np.float64]:
        times = self.index.times.tolist()
        if not times:  # those of decoding are evenly spaced, and leave gaps where it does
            packets = self._packets_from(None)
            times = sorted(p.dts for p in packets if p.size and p.dts is not None)
            self._at = None
        tick, rate = self._stream.time_base, self._stream.average_rate
        if tick and len(times) >= count:
            return (np.asarray(times[:count]) - times[0]) * tick.numerator / tick.denominator
        if not rate:
            raise DecodeError(f"its container states no frame rate. {TRANSCODE}", self.path)
        return np.arange(count) * rate.denominator / rate.numerator

    def _first_that_comes(self, otherwise: int) -> int | None:
        """Return the time of the first frame that can be decoded, none if the times may lie.

        Where a video may begin inside a group, or its times have the order of its packets, only
        the decoder knows. ``otherwise``: where the beginning is damaged, and none can tell.
        """
        import av

        came: list[int | None] = []
        with suppress(av.error.InvalidDataError):  # it is met again where it is in the way
            frames = self._by_number(self._packets_from(None))
            came += (frame.pts for _, frame in islice(frames, _TRIED))
        known = [time for time in came if time is not None]
        return [*known, otherwise][0] if known == came == sorted(set(known)) else None

    def _has_one_layer(self) -> bool:
        """Whether it is HEVC, of which the record in the container says so."""
        record = self._codec.extradata or b""
        is_record = len(record) > 22 and record[0] == 1
        return self._codec.name == "hevc" and is_record and record[21] >> 3 & 7 == 1

    def _count(self) -> int:
        self._start_at(None)
        count = sum(1 for _ in self._frames)
        if not count:
            raise DecodeError("it has no frames")
        return count

    def _decode(self, indices: list[int]) -> Frames:
        import av

        try:
            return self._read(indices)
        except av.error.InvalidDataError as error:
            raise DecodeError(
                f"it is damaged: {error.strerror}. Download it again, or encode it anew"
            ) from error

    def _read(self, indices: list[int]) -> Frames:
        if not self._may_have(indices[-1]):
            raise self._ends_before(indices[-1])
        frames: list[Frames] = []
        times = self.index.times
        for run in self._runs(times[indices].tolist() if len(times) else indices):
            taken = self._take(run, skip=self.index.may_skip)
            if len(taken) < len(run):
                self._at = None  # from a key frame on, and with all frames: it may be damaged
                taken = self._take(run, skip=False)
            frames += taken
            if len(taken) < len(run):
                if indices[-1] >= self.num_frames:
                    raise self._ends_before(indices[-1])
                raise DecodeError(
                    f"only {len(frames)} of {len(indices)} frames came out of the decoder. "
                    f"{TRANSCODE}"
                )
        return self._stacked(frames)

    def _ends_before(self, index: int) -> NoSuchFrame:
        return NoSuchFrame(
            f"it has {self.num_frames} frames, and number {index} was asked for: its header, or "
            "the manifest, states more than there are. Count them: tools/check_videos.py"
        )

    def _runs(self, times: list[int]) -> Iterator[list[int]]:
        """Cut ascending times where it is better to seek."""
        run = times[:1]
        for time in times[1:]:
            if self._is_far(run[-1], time):
                yield run
                run = []
            run.append(time)
        yield run

    def _is_far(self, at: int, time: int) -> bool:
        """Whether a seek to a time saves frames on the way to it."""
        key = self._key_before(time)
        if key is None or key[0] <= at:
            return False
        times = self.index.times
        return bisect_left(times, key[0]) - bisect_right(times, at) > _SEEK_SAVES

    def _key_before(self, time: int) -> tuple[int, int | None] | None:
        """Return the last key frame up to a time, if there is one."""
        keys = self.index.keys
        place = bisect_right(keys, time, key=lambda key: key[0])
        return keys[place - 1] if place else None

    def _take(self, run: list[int], *, skip: bool) -> list[Frames]:
        """Decode as many frames of a run as come: -> (H, W, 3) each"""
        # Whether the run comes next, or soon, from where decoding stopped.
        ahead = self._at is not None and self._at < run[0] and not self._is_far(self._at, run[0])
        if not ahead or not self._skipped.isdisjoint(run):
            self._start_at(self._key_before(run[0]))
        self._wanted, self._last_wanted, self._skips = set(run), run[-1], skip
        repeats = self.index.repeats and not skip
        taken: list[Frames] = []
        last: av.VideoFrame | None = None
        for number, frame in self._frames:
            while repeats and last and len(taken) < len(run) and run[len(taken)] < (number or 0):
                taken.append(self._pixels(last))
            if len(taken) < len(run) and number == run[len(taken)]:
                taken.append(self._pixels(frame))
            if len(taken) == len(run):
                return taken
            last = frame
        if repeats and last:
            taken += [self._pixels(last)] * (len(run) - len(taken))
        return taken

    def _start_at(self, key: tuple[int, int | None] | None) -> None:
        """Let frames come from a key frame on, or from the first frame."""
        self._at, self._skipped, self._skips = None, set(), False
        packets = self._packets_from(key)
        is_timed = len(self.index.times) > 0
        self._frames = self._by_time(packets) if is_timed else self._by_number(packets)

    def _by_time(self, packets: "Packets") -> "Numbered":
        for packet in packets:
            unused = self._skips and packet.pts not in self._wanted
            if unused and packet.pts is not None and packet.pts < self._last_wanted:
                self._codec.skip_frame = "NONREF"
                self._skipped.add(packet.pts)
            else:
                self._codec.skip_frame = "DEFAULT"
            for frame in packet.decode():
                if frame.pts is not None and self._at is not None and frame.pts <= self._at:
                    raise DecodeError(
                        f"the times of its frames contradict their order. {TRANSCODE}"
                    )
                self._at = frame.pts
                yield frame.pts, frame

    def _by_number(self, packets: "Packets") -> "Numbered":
        for number, frame in enumerate(frame for packet in packets for frame in packet.decode()):
            self._at = number
            yield number, frame

    def _packets_from(self, key: tuple[int, int | None] | None) -> "Packets":
        # Some containers seek by the time of presentation, some by that of decoding, which Matroska
        # does not state where frames are reordered, and FFmpeg does not know after a seek.
        presented, decoded = key or (None, None)
        for time in (time for time in key or () if time is not None):
            try:
                self._container.seek(time, stream=self._stream, backward=True)
            except PermissionError:  # FFmpeg's -1: its index has no key frame so early
                continue
            packets = self._demux()
            first = next(packets)
            at, latest = (first.pts, presented) if first.dts is None else (first.dts, decoded)
            if first.is_keyframe and at is not None and at <= (latest or 0):
                yield first
                yield from packets
                return
        if not self._is_at_start:
            self._container.close()
            self._open()
        yield from self._demux()

    def _demux(self) -> "Packets":
        self._is_at_start = False
        return self._container.demux(self._stream)

    def _pixels(self, frame: "av.VideoFrame") -> Frames:
        """Convert a frame, upright: -> (H, W, 3)"""
        # In one thread, since the loader's workers take the cores.
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        plane = rgb.planes[0]
        values = np.frombuffer(cast("memoryview", plane), np.uint8).reshape(-1, plane.line_size)
        pixels = values[: rgb.height, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
        return orientation_of(frame).apply(pixels)

    def close(self) -> None:
        self._frames = iter(())
        self._container.close()
