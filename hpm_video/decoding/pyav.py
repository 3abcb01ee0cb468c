"""Videos with PyAV: exact on every container tried, and the first choice."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from hpm_video.decoding.containers import refuse_lists
from hpm_video.decoding.mp4_header import open_source, read_delays
from hpm_video.decoding.reader import (
    TRANSCODE,
    DecodeError,
    Frames,
    NoSuchFrame,
    Stack,
    VideoReader,
)

if TYPE_CHECKING:
    import av

FORMATS = "mov,matroska,avi,flv,asf,ogg,mpeg,mpegvideo,mpegts,gif,yuv4mpegpipe"
"""Formats of FFmpeg that a video may have, whatever its suffix. Others open further files."""
UNTIMED = ("avi", "mpeg")
"""Containers whose presentation times are made up by the demuxer, or missing."""
_MARKS_UNUSED = ("h264", "mpeg4")
"""Codecs that mark the frames to which no other one refers. In HEVC such a mark is void where there
are temporal layers; the decoders of the others do not skip frames at a word."""
_SEEK_SAVES = 8
"""Frames that must not need decoding to make a seek worth while."""


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    is_key: bool


class _OtherPackets(Exception):  # noqa: N818 - never seen outside
    """The packets are not those of the header's tables."""


def open_container(
    source: str | bytes,
) -> "tuple[av.container.InputContainer, av.VideoStream]":
    """Open the path of a video, or its bytes, and find its first video stream.

    FFmpeg can open nothing else on its behalf, and decodes on one thread: all cores are taken by
    processes.

    Raises:
        DecodeError: it is no video, or there is no decoder for it.
        av.FFmpegError: it cannot be opened.
    """
    import av

    in_memory = isinstance(source, bytes)
    try:
        container = av.open(
            open_source(source) if in_memory else source,
            mode="r",
            metadata_errors="ignore",
            options={
                "protocol_whitelist": "none" if in_memory else "file",
                "format_whitelist": FORMATS,
            },
        )
    except (av.error.InvalidDataError, av.error.EOFError, av.error.ArgumentError) as error:
        raise DecodeError(
            f"it is no video, or it is cut off or damaged: {error.strerror}. Download it again"
        ) from error
    if not container.streams.video:
        container.close()
        raise DecodeError("it has no video stream")
    stream = container.streams.video[0]
    if getattr(stream, "codec_context", None) is None:
        container.close()
        raise DecodeError(f"there is no decoder here for its codec. {TRANSCODE}")
    stream.codec_context.thread_count = 1
    return container, stream


class PyavReader(VideoReader):
    """Seeks to the key frame before the first frame that is wanted, and decodes from there on.

    Where it stopped it goes on, when the next frames that are wanted follow. Frames that are not
    wanted are not decoded where no other one refers to them. A frame is identified by its time,
    or where the container has none by counting from the first.
    """

    def __init__(self, path: str, source: str | bytes, head: bytes) -> None:
        from av.video.reformatter import VideoReformatter

        super().__init__(path)
        refuse_lists(head)
        self._source = source
        # One for all frames: making one takes longer than converting a small frame.
        self._reformatter = VideoReformatter()
        self._frames: Iterator[tuple[int | None, av.VideoFrame]] = iter(())
        self._at: int | None = None
        self._wanted: set[int] = set()
        self._last_wanted = 0
        self._skips = False
        self._skipped: set[int] = set()
        self._open()
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._container, self._stream = open_container(self._source)
        self._is_at_start = True
        self._codec = self._stream.codec_context

    # --- Which frames there are ---------------------------------------------------------------

    def _index(self) -> None:
        self._keys: list[_Packet] = []
        self._key_times: list[int] = []
        self._times: list[int] = []
        self._stated: dict[int | None, int | None] | None = None
        self._may_skip = False
        self._ordered = self._container.format.name not in UNTIMED
        if self._ordered:
            self._take_index(self._packets_of_header() or self._packets_of_file())
        else:
            self._counts_by_decoding = True

    def _take_index(self, packets: list[_Packet]) -> None:
        if not packets:
            raise DecodeError("it has no frames")
        self._times = sorted({packet.pts for packet in packets if packet.pts is not None})
        self._ordered = len(self._times) == len(packets)
        self._counts_by_decoding = not self._ordered
        self._num_frames = len(packets) if self._ordered else None
        if not self._ordered:
            return
        self._keys = sorted(
            (packet for packet in packets if packet.is_key), key=lambda key: key.pts or 0
        )
        self._key_times = [key.pts or 0 for key in self._keys]
        self._may_skip = self._codec.name in _MARKS_UNUSED or self._has_one_layer()

    def _index_anew(self) -> None:
        self._reopen()
        self._take_index(self._packets_of_file())

    def _packets_of_header(self) -> list[_Packet]:
        """From the tables of an MP4 file, of which the rest is not read; none where it is not so.

        Whether packets are as the tables have it is looked at when they come.
        """
        if not self._container.format.name.startswith("mov") or not hasattr(
            self._stream, "index_entries"
        ):
            return []
        delays = read_delays(self._source, self._stream.id)
        if delays is None:
            return []
        size = self._container.size
        entries = [*self._stream.index_entries]
        complete = len(entries) == len(delays) and all(
            entry.size > 0 and not entry.is_discard and entry.pos + entry.size <= size
            for entry in entries
        )
        if not complete:
            return []
        packets = [
            _Packet(entry.timestamp + delay, entry.timestamp, entry.is_keyframe)
            for entry, delay in zip(entries, delays.tolist(), strict=True)
        ]
        self._stated = {packet.dts: packet.pts for packet in packets}
        return packets if len(self._stated) == len(packets) else []

    def _packets_of_file(self) -> list[_Packet]:
        self._stated = None
        return [
            _Packet(packet.pts, packet.dts, packet.is_keyframe)
            for packet in self._demux()
            if packet.size and not packet.is_discard
        ]

    def _has_one_layer(self) -> bool:
        """Whether it is HEVC, of which the record in the container says so."""
        record = self._codec.extradata or b""
        is_record = len(record) > 22 and record[0] == 1
        return self._codec.name == "hevc" and is_record and record[21] >> 3 & 7 == 1

    def _count(self) -> int:
        self._start_at([])
        count = sum(1 for _ in self._frames)
        if not count:
            raise DecodeError("it has no frames")
        return count

    # --- Decoding them ------------------------------------------------------------------------

    def _decode(self, indices: list[int]) -> Frames:
        import av

        try:
            return self._read(indices)
        except av.error.InvalidDataError as error:
            raise DecodeError(
                f"it is damaged: {error.strerror}. Download it again, or encode it anew"
            ) from error
        except _OtherPackets:
            self._index_anew()
            return self._decode(indices)

    def _read(self, indices: list[int]) -> Frames:
        stack = Stack(len(indices), self._size)
        if not self._may_have(indices[-1]):
            raise self._ends_before(indices[-1])
        times = [self._times[index] for index in indices] if self._ordered else indices
        for run in self._runs(times):
            if not self._take(run, stack, skip=self._may_skip):
                self._at = None  # from a key frame on, and with all frames: it may be damaged
                if not self._take(run, stack, skip=False):
                    if indices[-1] >= self.num_frames:
                        raise self._ends_before(indices[-1])
                    break
        frames = stack.frames()
        self._size = stack.size
        return frames

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
        key = bisect_right(self._key_times, time) - 1 if self._ordered else -1
        if key < 0 or self._key_times[key] <= at:
            return False
        passed = bisect_left(self._times, self._key_times[key]) - bisect_right(self._times, at)
        return passed > _SEEK_SAVES

    def _take(self, run: list[int], stack: Stack, *, skip: bool) -> bool:
        """Decode the frames of a run. -> whether they all came; otherwise none is taken"""
        before = stack.filled
        # Whether the run comes next, or soon, from where decoding stopped.
        ahead = self._at is not None and self._at < run[0] and not self._is_far(self._at, run[0])
        if not ahead or not self._skipped.isdisjoint(run):
            self._start_at(self._keys[: bisect_right(self._key_times, run[0])])
        self._wanted, self._last_wanted, self._skips = set(run), run[-1], skip
        for number, frame in self._frames:
            if number == run[stack.filled - before]:
                self._put(frame, stack)
                if stack.filled - before == len(run):
                    return True
        stack.filled = before
        return False

    def _start_at(self, keys: list[_Packet]) -> None:
        """Let frames come from the last of ``keys`` on, or from the first frame."""
        self._at, self._skipped, self._skips = None, set(), False
        packets = self._packets_from(keys)
        self._frames = self._by_time(packets) if self._ordered else self._by_number(packets)

    def _by_time(
        self, packets: "Iterator[av.Packet[av.VideoStream]]"
    ) -> "Iterator[tuple[int | None, av.VideoFrame]]":
        for packet in packets:
            if self._stated and packet.size and self._stated.get(packet.dts) != packet.pts:
                raise _OtherPackets
            unused = self._skips and packet.pts not in self._wanted
            if unused and packet.pts is not None and packet.pts < self._last_wanted:
                self._codec.skip_frame = "NONREF"
                self._skipped.add(packet.pts)
            else:
                self._codec.skip_frame = "DEFAULT"
            for frame in packet.decode():
                self._at = frame.pts
                yield frame.pts, frame

    def _by_number(
        self, packets: "Iterator[av.Packet[av.VideoStream]]"
    ) -> "Iterator[tuple[int | None, av.VideoFrame]]":
        for number, frame in enumerate(frame for packet in packets for frame in packet.decode()):
            self._at = number
            yield number, frame

    def _packets_from(self, keys: list[_Packet]) -> "Iterator[av.Packet[av.VideoStream]]":
        for time in (keys[-1].pts, keys[-1].dts) if keys else ():
            # Some containers seek by the time of presentation, some by that of decoding.
            if time is None:
                continue
            self._container.seek(time, stream=self._stream, backward=True)
            packets = self._demux()
            first = next(packets)
            if first.is_keyframe and first.dts is not None and first.dts <= (keys[-1].dts or 0):
                yield first
                yield from packets
                return
        if not self._is_at_start:
            self._reopen()
        yield from self._demux()

    def _demux(self) -> "Iterator[av.Packet[av.VideoStream]]":
        self._is_at_start = False
        return self._container.demux(self._stream)

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _put(self, frame: "av.VideoFrame", stack: Stack) -> None:
        """Add a frame to the stack, upright: cameras of telephones note how they were held."""
        # In one thread, since the loader's workers take the cores.
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        plane = rgb.planes[0]
        values = np.frombuffer(cast("memoryview", plane), np.uint8).reshape(-1, plane.line_size)
        pixels = values[: rgb.height, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
        stack.add(np.rot90(pixels, round(frame.rotation / 90) % 4))

    def close(self) -> None:
        self._frames = iter(())
        self._container.close()
