"""Looking at one file as a whole: what it is, and whether all of it decodes."""

import contextlib
import hashlib
import io
import os
import re
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hpm_video.config.choices import DecoderChoice
from hpm_video.decoding.locations import TarMember, frames_in, is_frame_folder, is_image
from hpm_video.decoding.pyav import UNTIMED, open_container
from hpm_video.decoding.reader import DecodeError, Size, VideoReader, as_decode_error
from hpm_video.decoding.registry import open_video
from hpm_video.preparation.findings import BETWEEN_REASONS, Finding, Stamp
from hpm_video.workers.heartbeat import Beat

if TYPE_CHECKING:
    import av

Result = TypeVar("Result")

SHORTEST = 16
"""Frames of a usual clip."""
FARTHEST = 250
"""Frames between key frames: encoders come with this as the limit, and 12 is better here."""
SMALLEST = 32
"""Pixels of a side."""
NARROWEST = 4.0
"""The long side as a multiple of the short one."""
UNEVEN_SHARE = 0.05
"""Of the gaps between frames may be off by more than ``UNEVEN`` before that is told."""
UNEVEN = 0.1
"""Of the usual gap. Containers that count in milliseconds are off by one or two anyway."""
TICKS = 1.6
ANEW = "encode it anew with tools/transcode.py"

_LESS = (0, 1, 2, 4, 8, 16, 32)
"""Frames that are given up where the last ones before some damage cannot be read."""
_ENDS = 2**16
"""Bytes of a file's beginning and of its end that its digest is of."""
_RUN = 8
"""Frames of a folder that are read at once."""
_CLOCKWISE = {3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}
"""What the orientations of EXIF mean, mirrored or not."""


@dataclass(frozen=True)
class Task:
    """A file to look at. Small: it goes to another process."""

    file: str
    """Its place, as :mod:`hpm_video.decoding.locations` has it."""
    known: Stamp | None = None
    """When it was looked at before. Unless it has changed since, nothing is done."""
    decoder: DecoderChoice = "auto"
    seconds_in_all: float = 3600.0
    """After which it is given up although it goes on."""


@dataclass(frozen=True)
class Working:
    """A file that is being decoded, and gets on."""


WORKING = Working()
Beats = Generator[Working, None, Result]
"""Says now and then that it gets on, and at last returns a result."""
TOO_LONG = (
    "it took longer than {:g} s in all: where it is only long, check it with more --seconds-in-all"
)


class Watch:
    """Looks at the clock after every frame."""

    def __init__(self, seconds_in_all: float) -> None:
        self._beat = Beat()
        self._seconds = seconds_in_all
        self._end = time.monotonic() + seconds_in_all

    def look(self) -> Iterator[Working]:
        """Say that there was a frame, when it is time to.

        Raises:
            TooLongError: it is enough.
        """
        if self._beat.is_due():
            if time.monotonic() > self._end:
                raise TooLongError(TOO_LONG.format(self._seconds))
            yield WORKING


class TooLongError(DecodeError):
    """A file that goes on and on."""


def check_file(task: Task) -> Iterator[Working | Finding | None]:
    """Decode all of a file. -> at last what was found out, or none if it has not changed

    As long as frames come out, it says now and then that it gets on. Whatever is wrong with the
    file is part of the finding; only a lack of memory is raised.
    """
    try:
        stamp = stamp_of(task.file)
    except OSError as error:
        stamp = Stamp()
        missing = isinstance(error, FileNotFoundError)
        why = "there is no such file" if missing else f"{error.strerror}"
        yield None if task.known == stamp else bad(why)
        return
    if task.known == stamp:
        yield None
        return
    try:
        with as_decode_error(task.file):
            watch = Watch(task.seconds_in_all)
            finding = yield from measure(task.file, task.decoder, watch)
            finding = replace(finding, content=content_of(task.file, stamp))
    except TooLongError as error:
        finding = replace(bad(error.reason), limits=(task.seconds_in_all,))
    except DecodeError as error:
        finding = bad(error.reason)
    yield replace(finding, bytes=stamp.bytes, modified=stamp.modified)


def bad(*reasons: str) -> Finding:
    """The finding that a file cannot be used."""
    return Finding("bad", tuple(map(_one_reason, reasons)))


def stamp_of(file: str) -> Stamp:
    """Size and time of a file; of a folder of frames their sum, and the last of them.

    Raises:
        OSError: there is no such file.
    """
    if is_frame_folder(file):
        states = [frame.stat() for frame in frames_in(file)] or [Path(file).stat()]
        return Stamp(sum(state.st_size for state in states), _time(states))
    member = TarMember.parse(file)
    state = Path(member.tar if member else file).stat()
    return Stamp(member.size if member else state.st_size, _time([state]))


def _time(states: Sequence[os.stat_result]) -> str:
    microseconds = max(state.st_mtime_ns for state in states) // 1000
    start = datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (start + timedelta(microseconds=microseconds)).isoformat(timespec="microseconds")


def content_of(file: str, stamp: Stamp) -> str:
    """A digest of size, beginning and end of a file; of the names of frames too."""
    digest = hashlib.blake2b(repr(stamp.bytes).encode(), digest_size=8)
    if is_frame_folder(file):
        frames = frames_in(file)
        digest.update(repr([(frame.name, frame.stat().st_size) for frame in frames]).encode())
        for frame in (*frames[:1], *frames[-1:]):
            digest.update(_ends(frame, 0, frame.stat().st_size))
    else:
        member = TarMember.parse(file)
        start, size = (member.offset, member.size) if member else (0, stamp.bytes or 0)
        digest.update(_ends(Path(member.tar if member else file), start, size))
    return digest.hexdigest()


def _ends(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        first = file.read(min(size, _ENDS))
        file.seek(start + max(size - _ENDS, 0))
        return first + file.read(min(size, _ENDS))


def measure(file: str, decoder: DecoderChoice, watch: Watch) -> Beats[Finding]:
    """Everything about a file but its bytes.

    Raises:
        DecodeError: it does not open, or not one of its frames decodes.
    """
    if is_frame_folder(file) or is_image(file):
        return (yield from _measure_pictures(file, watch))
    with open_video(file, decoder) as reader:
        return (yield from _measure_video(reader, file, watch))


def _measure_pictures(file: str, watch: Watch) -> Beats[Finding]:
    """An image, or a folder of them: read as training reads them."""
    with open_video(file) as reader:
        size = reader.height, reader.width
        count = reader.num_frames
        sound, why = yield from _sound_pictures(reader, watch)
    data = frames_in(file)[0].read_bytes() if is_frame_folder(file) else _bytes_of(file)
    picture = picture_facts(data)
    finding = Finding(
        "fine",
        num_frames=sound,
        width=size[1],
        height=size[0],
        codec=picture.format,
        pixel_format=picture.mode,
        key_frame_distance=1,
        rotation=picture.rotation,
    )
    doubts = list(doubts_of_size(size))
    if is_frame_folder(file):
        doubts += doubts_of_length(sound)
    return _judged(finding, doubts, _Soundness(sound, count, why))


def _sound_pictures(reader: VideoReader, watch: Watch) -> Beats[tuple[int, str]]:
    """How many of the frames can be read until one cannot, and why that one cannot."""
    index = 0
    try:
        for start in range(0, reader.num_frames, _RUN):
            index = start
            reader.read(range(start, min(start + _RUN, reader.num_frames)))
            yield from watch.look()
        return reader.num_frames, ""
    except TooLongError:
        raise
    except DecodeError:
        return _sound_one_by_one(reader, index)


def _sound_one_by_one(reader: VideoReader, start: int) -> tuple[int, str]:
    index = start
    try:
        for index in range(start, reader.num_frames):
            reader.read([index])
    except DecodeError as error:
        return index, error.reason
    raise DecodeError("its frames are of more than one size")


def _bytes_of(file: str) -> bytes:
    member = TarMember.parse(file)
    return member.read() if member else Path(file).read_bytes()


class _Picture(NamedTuple):
    format: str
    mode: str
    rotation: int


def picture_facts(data: bytes) -> _Picture:
    """Format, kind of pixels and turn (degrees, clockwise) of an image that was read before."""
    from PIL import ExifTags, Image

    orientation = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            with contextlib.suppress(Exception):  # damaged metadata are of no account
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            kind = (image.format or "").lower()
            return _Picture(kind, image.mode, _CLOCKWISE.get(orientation, 0))


@dataclass
class Stream:
    """What went through the decoder, packet by packet and frame by frame."""

    stated: int = 0
    """Frames that the container's header promises, 0 where it says nothing."""
    promised: float = 0.0
    """Seconds that it promises."""
    tick: float = 0.0
    """Seconds of a unit of time."""
    rate: float | None = None
    """Frames per second, as the container has it."""
    has_times: bool = True
    packets: int = 0
    """All of them, those included that are not shown."""
    times: list[int | None] = field(default_factory=list)
    """Of the packets that are shown, in the order of decoding."""
    moments: list[int] = field(default_factory=list)
    """The same, or where a time of presentation is missing that of decoding; those known."""
    keys: list[bool] = field(default_factory=list)
    """Which of these are key frames."""
    torn: set[int | None] = field(default_factory=set)
    """Times of packets that the container calls damaged."""
    frames: list[tuple[int | None, bool]] = field(default_factory=list)
    """Time of each frame that came out, and whether it is whole and of the size of the first."""
    first_error: str = ""
    errors_at: list[int] = field(default_factory=list)
    """How many frames had come out when a packet did not decode."""
    sizes: list[Size] = field(default_factory=list)
    """Upright, those that differ."""
    codec: str = ""
    pixel_format: str = ""
    rotation: int = 0

    @property
    def ordered(self) -> bool:
        """Whether times say which frame is which; otherwise they are counted."""
        return self.has_times and None not in self.times and len(set(self.times)) == len(self.times)

    def sound(self) -> "_Soundness":
        """How many frames decode until one does not, or a packet is met that does not."""
        if self.ordered:
            whole = {time for time, is_whole in self.frames if is_whole} - self.torn
            shown = sorted(time for time in self.times if time is not None)
            count = len(shown)
            broken = [i for i, time in enumerate(shown) if time not in whole]
        else:
            count = max(len(self.frames), len(self.times))
            broken = [
                i
                for i, (time, is_whole) in enumerate(self.frames)
                if not is_whole or (self.has_times and time in self.torn)
            ]
            broken += [len(self.frames)] if len(self.frames) < count else []
        first = min([count, *broken[:1], *self.errors_at[:1]])
        return _Soundness(first, count, self._why(first))

    def _why(self, first: int) -> str:
        if self.first_error and first == self.errors_at[0]:
            return self.first_error
        if len(self.sizes) > 1:
            told = ", then ".join(f"{width} x {height}" for height, width in self.sizes[:3])
            return f"frame {first} is damaged or of another size: {told}"
        return f"frame {first} is damaged or does not come out"

    def key_distance(self) -> int:
        """Frames from one key frame to the next, or to the end, at most, in order of display."""
        keys = self.keys
        if self.ordered:
            shown = [time for time in self.times if time is not None]
            keys = [is_key for _, is_key in sorted(zip(shown, keys, strict=True))]
        marks = [0, *(place for place, is_key in enumerate(keys) if is_key), len(keys)]
        return max((b - a for a, b in zip(marks[:-1], marks[1:], strict=True)), default=0)

    def gaps(self) -> NDArray[np.float64]:
        """Seconds from one frame to the next; none where times mean nothing."""
        if not self.ordered:
            return np.empty(0)
        shown = sorted(time for time in self.times if time is not None)
        return np.diff(np.array(shown, dtype=np.float64)) * self.tick

    def span(self) -> float:
        """Seconds from the first frame to the last."""
        return (max(self.moments) - min(self.moments)) * self.tick if self.moments else 0.0

    def fps(self) -> float | None:
        """Frames per second, on average."""
        return (len(self.moments) - 1) / self.span() if self.span() else self.rate


@dataclass(frozen=True)
class _Soundness:
    """How much of a file decodes."""

    sound: int
    """Frames until the first that does not."""
    count: int
    """Frames that there should be."""
    why: str


def _measure_video(reader: VideoReader, file: str, watch: Watch) -> Beats[Finding]:
    stream = yield from decode_all(file, watch)
    if not stream.frames:
        raise DecodeError(stream.first_error or "it has no frames")
    found = stream.sound()
    # Without times training counts frames as they are counted here.
    sound = min(found.sound, reader.num_frames) if stream.ordered else found.sound
    sound, why = yield from _readable(reader, sound, watch)
    found = replace(found, sound=sound, why=why or found.why)
    fps = stream.fps()
    height, width = stream.sizes[0]
    finding = Finding(
        "fine",
        num_frames=sound,
        fps=fps,
        duration=sound / fps if fps else None,
        width=width,
        height=height,
        codec=stream.codec,
        pixel_format=stream.pixel_format,
        key_frame_distance=stream.key_distance(),
        rotation=stream.rotation,
    )
    doubts = doubts_of_stream(stream, sound)
    if stream.ordered and reader.num_frames != found.count:
        doubts.append(
            f"the decoder that is to be used counts {reader.num_frames} frames, PyAV {found.count}"
        )
    return _judged(finding, doubts, found)


def _readable(reader: VideoReader, sound: int, watch: Watch) -> Beats[tuple[int, str]]:
    """How many of the frames training can read, and if not all of them, why.

    It gets at them by another way than one after the other, and where decoding has to go on to get
    a frame out it may meet what is damaged behind it.
    """
    why = ""
    for less in _LESS:
        last = sound - less - 1
        if last < 0:
            break
        try:
            for index in sorted({0, last // 2, last}):
                reader.read([index])
                yield from watch.look()
        except TooLongError:
            raise
        except (DecodeError, IndexError) as error:
            why = why or (error.reason if isinstance(error, DecodeError) else str(error))
        else:
            return last + 1, why
    return 0, why


def decode_all(file: str, watch: Watch) -> Beats[Stream]:
    """Decode every packet of a video that was opened before, going on after errors.

    Raises:
        DecodeError: it is no video.
        TooLongError: it goes on and on.
        Exception: whatever PyAV raises where a file does not open.
    """
    member = TarMember.parse(file)
    source = member.read() if member else os.path.abspath(file)  # noqa: PTH100
    container, video = open_container(source)
    with container:
        stream = Stream(
            stated=video.frames,
            promised=float((video.duration or 0) * (video.time_base or 0)),
            tick=float(video.time_base or 0),
            rate=float(video.average_rate) if video.average_rate else None,
            has_times=container.format.name not in UNTIMED,
            codec=video.codec_context.name,
            pixel_format=video.codec_context.pix_fmt or "",
        )
        for packet in container.demux(video):
            _take(stream, packet)
            yield from watch.look()
    return stream


def _take(stream: Stream, packet: "av.Packet[av.VideoStream]") -> None:
    """Decode a packet, and note what comes of it."""
    if packet.size:
        stream.packets += 1
        if not packet.is_discard:
            stream.times.append(packet.pts)
            stream.keys.append(bool(packet.is_keyframe))
            if (moment := packet.dts if packet.pts is None else packet.pts) is not None:
                stream.moments.append(moment)
        if packet.is_corrupt:
            stream.torn.add(packet.pts)
    elif packet.dts is not None or packet.pts is not None:
        stream.packets += 1  # a frame that is to be shown again, as AVI has it
    for frame in _decoded(stream, packet):
        turns = round(frame.rotation / 90) % 4
        size = (frame.height, frame.width) if turns % 2 == 0 else (frame.width, frame.height)
        if size not in stream.sizes:
            stream.sizes.append(size)
            stream.rotation = -90 * turns % 360 if len(stream.sizes) == 1 else stream.rotation
        stream.frames.append((frame.pts, not frame.is_corrupt and size == stream.sizes[0]))


def _decoded(stream: Stream, packet: "av.Packet[av.VideoStream]") -> Iterator["av.VideoFrame"]:
    import av

    try:
        yield from packet.decode()
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as error:
        if not isinstance(error, EOFError):
            told = getattr(error, "strerror", None) or str(error)
            stream.first_error = stream.first_error or f"frame {len(stream.frames)}: {told}"
            stream.errors_at.append(len(stream.frames))


def doubts_of_stream(stream: Stream, sound: int) -> list[str]:
    """Why a video may not be what it should be, although it decodes."""
    doubts = []
    fps = stream.fps()
    # An edit list leaves frames out, and AVI counts those that are shown longer: as long as told.
    if stream.stated > stream.packets and fps and abs(stream.promised - stream.span()) > 2.5 / fps:
        doubts.append(
            f"its header promises {stream.stated} frames in {stream.promised:.4g} s, and it holds "
            f"{stream.packets} in {stream.span():.4g} s: where it was cut off, download it again"
        )
    if (distance := stream.key_distance()) > FARTHEST:
        doubts.append(
            f"{distance} frames from one key frame to the next, so reading from the middle is "
            f"slow: {ANEW}"
        )
    doubts += doubts_of_gaps(stream.gaps(), stream.tick)
    doubts += doubts_of_size(stream.sizes[0])
    doubts += doubts_of_length(sound)
    return doubts


def doubts_of_gaps(gaps: NDArray[np.float64], tick: float) -> Iterator[str]:
    """Whether frames follow each other evenly: (K,) in seconds"""
    if len(gaps) < 2:
        return
    usual = float(np.median(gaps))
    allowed = max(UNEVEN * usual, TICKS * tick)
    share = float(np.mean(np.abs(gaps - usual) > allowed))
    if share > UNEVEN_SHARE:
        low, high = 1000 * gaps.min(), 1000 * gaps.max()
        yield (
            f"a varying frame rate, {low:.0f} to {high:.0f} ms from frame to frame, mostly "
            f"{1000 * usual:.0f}, so a stride is no fixed time: {ANEW}"
        )


def doubts_of_size(size: Size) -> Iterator[str]:
    """Whether frames have a usual size: height and width"""
    short, long = sorted(size)
    named = f"{size[1]} x {size[0]} pixels"
    if short < SMALLEST:
        yield f"{named}, a side of less than {SMALLEST}: look whether that is meant"
    elif long > NARROWEST * short:
        yield f"{named}, {long / short:.1f} times as long as wide, of which crops show a small part"


def doubts_of_length(num_frames: int) -> Iterator[str]:
    """Whether a video has frames enough."""
    if num_frames == 1:
        yield "a video of 1 frame: where a still is meant, save it as an image"
    elif num_frames < SHORTEST:
        yield f"{num_frames} frames, fewer than a clip of {SHORTEST}: some are shown repeatedly"


def _judged(finding: Finding, doubts: Sequence[str], found: _Soundness) -> Finding:
    """The finding with its verdict, by how much of it decodes."""
    if found.sound < found.count:
        some = f"only the first {found.sound}" if found.sound else "none"
        why = (
            f"{some} of {found.count} frames can be read ({found.why}): download it again, or "
            f"{ANEW}"
        )
        if found.sound < SHORTEST:
            return _bad_after_all(finding, why)
        doubts = [why, *doubts]
    reasons = tuple(map(_one_reason, doubts))
    return replace(finding, verdict="suspicious" if reasons else "fine", reasons=reasons)


def _bad_after_all(finding: Finding, why: str) -> Finding:
    return replace(
        finding,
        verdict="bad",
        reasons=(_one_reason(why),),
        num_frames=finding.num_frames or None,
        duration=finding.duration if finding.num_frames else None,
    )


def _one_reason(why: str) -> str:
    """On one line, and not to be taken for two."""
    why = re.sub(r"\[Errno -?\d+\] ", "", why)
    return " ".join(why.split()).replace(BETWEEN_REASONS, ", ")
