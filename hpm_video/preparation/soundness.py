"""Result of decoding a complete video, and how many of its frames are intact."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpm_video.decoding.locations import source_of
from hpm_video.decoding.orientation import orientation_of, upright_size
from hpm_video.decoding.pyav import UNTIMED, PyavReader, open_container
from hpm_video.decoding.reader import Size
from hpm_video.preparation.jobs import Steps

if TYPE_CHECKING:
    import av


@dataclass
class Stream:
    """Record of the packets and frames of a decoded video."""

    stated: int = 0  # number of frames by the container's header, 0 if missing
    promised: float = 0.0  # seconds by the header
    tick: float = 0.0  # seconds per unit of time
    rate: float | None = None  # frames per second by the container
    has_times: bool = True
    """Whether times tell the order of frames; otherwise they are counted."""
    has_order: bool = True
    """Whether times tell it, or the container has none."""
    tracks: int = 1
    """Video streams, of which one is read."""
    left_out: int = 0
    """Packets at the beginning of which no frame comes."""
    packets: int = 0  # number of packets, including those that are not shown
    times: list[int | None] = field(default_factory=list)
    """Presentation times of the shown packets in decoding order."""
    moments: list[int] = field(default_factory=list)
    """The same where known, otherwise the decoding times."""
    keys: list[bool] = field(default_factory=list)  # whether each is a key frame
    corrupt: set[int | None] = field(default_factory=set)
    """Times of packets that the container marks as corrupt."""
    frames: list[tuple[int | None, bool]] = field(default_factory=list)
    """Time of each decoded frame, and whether it is intact and of the size of the first."""
    first_error: str = ""
    errors_at: list[int] = field(default_factory=list)
    """Number of decoded frames before each packet that did not decode."""
    sizes: list[Size] = field(default_factory=list)  # different sizes, upright
    codec: str = ""
    pixel_format: str = ""
    rotation: int = 0

    @property
    def shown(self) -> list[int]:
        """Times of the packets in display order; empty where frames share times."""
        known = sorted(time for time in self.times if time is not None)
        are_unique = self.has_times and len(set(known)) == len(self.times)
        return known if are_unique else []

    def sound(self) -> tuple[int, int, str]:
        """Count the frames before the first fault.

        -> that count, the number that there should be, and the fault of the next frame
        """
        if shown := self.shown:
            intact = {time for time, is_intact in self.frames if is_intact} - self.corrupt
            count = len(shown)
            broken = [i for i, time in enumerate(shown) if time not in intact]
        else:
            count = max(len(self.frames), len(self.times))
            broken = [
                i
                for i, (time, is_intact) in enumerate(self.frames)
                if not is_intact or (self.has_times and time in self.corrupt)
            ]
            broken += [len(self.frames)] if len(self.frames) < count else []
        first = min([count, *broken[:1], *self.errors_at[:1]])
        why = f"frame {first} is damaged or does not come out"
        if self.first_error and first == self.errors_at[0]:
            why = self.first_error
        elif len(self.sizes) > 1:
            sizes = ", then ".join(f"{width} x {height}" for height, width in self.sizes[:3])
            why = f"frame {first} is of another size than those before: {sizes}"
        return first, count, why

    def note_error(self, reason: str) -> None:
        """Note that the next frame is not to be had."""
        self.first_error = self.first_error or f"frame {len(self.frames)}: {reason}"
        self.errors_at.append(len(self.frames))

    def leave_out_before(self, first: int) -> None:
        """Forget packets of which no frame comes, since the stream begins inside a group."""
        kept = [i for i, time in enumerate(self.times) if time is not None and time >= first]
        self.left_out = len(self.times) - len(kept)
        self.times = [self.times[i] for i in kept]
        self.keys = [self.keys[i] for i in kept]
        self.moments = [moment for moment in self.moments if moment >= first]

    def key_distance(self) -> int:
        """Return the largest distance from a key frame to the next, or to the end, in frames."""
        keys = self.keys
        if self.shown:
            times = [time for time in self.times if time is not None]
            keys = [is_key for _, is_key in sorted(zip(times, keys, strict=True))]
        marks = [0, *np.flatnonzero(keys).tolist(), len(keys)]
        return int(np.diff(marks).max())

    def gaps(self) -> NDArray[np.float64]:
        """Return the seconds from each frame to the next; empty without usable times."""
        return np.diff(np.array(self.shown, dtype=np.float64)) * self.tick

    def span(self) -> float:
        """Return the seconds from the first frame to the last."""
        return (max(self.moments) - min(self.moments)) * self.tick if self.moments else 0.0

    def fps(self) -> float | None:
        """Return the average frames per second."""
        return (len(self.moments) - 1) / self.span() if self.span() else self.rate


def decode_all(file: str) -> Steps[Stream]:
    """Decode every packet of a video that has been opened before, and go on after errors.

    Raises:
        DecodeError: it is no video.
        Exception: whatever PyAV raises where a file does not open.
    """
    import av

    source, head = source_of(file)
    with PyavReader(file, source, head) as reader:
        times = reader.times
    container, video = open_container(source)
    with container:
        stream = Stream(
            stated=video.frames,
            promised=float((video.duration or 0) * (video.time_base or 0))
            or (container.duration or 0) / av.time_base,
            tick=float(video.time_base or 0),
            rate=float(video.average_rate) if video.average_rate else None,
            has_times=bool(times),
            has_order=bool(times) or container.format.name in UNTIMED,
            tracks=len(container.streams.video),
            codec=video.codec_context.name,
            pixel_format=video.codec_context.pix_fmt or "",
        )
        for packet in container.demux(video):
            _note_packet(stream, packet)
            _decode(stream, packet)
            yield
    if times:
        stream.leave_out_before(times[0])
    return stream


def _note_packet(stream: Stream, packet: "av.Packet[av.VideoStream]") -> None:
    if not packet.size:
        # Without data, but with a time: a frame that is to be shown again, as AVI has it.
        stream.packets += packet.dts is not None or packet.pts is not None
        return
    stream.packets += 1
    if not packet.is_discard:
        stream.times.append(packet.pts)
        stream.keys.append(bool(packet.is_keyframe))
        if (moment := packet.dts if packet.pts is None else packet.pts) is not None:
            stream.moments.append(moment)
    if packet.is_corrupt:
        stream.corrupt.add(packet.pts)


def _decode(stream: Stream, packet: "av.Packet[av.VideoStream]") -> None:
    import av

    try:
        for frame in packet.decode():
            size = upright_size(frame)
            if not stream.sizes:
                stream.rotation = orientation_of(frame).degrees
            if size not in stream.sizes:
                stream.sizes.append(size)
            before = stream.frames[-1][0] if stream.frames and stream.has_times else None
            if before is not None and frame.pts is not None and frame.pts <= before:
                stream.note_error("its time contradicts its order")
            stream.frames.append((frame.pts, not frame.is_corrupt and size == stream.sizes[0]))
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as error:
        if not isinstance(error, EOFError):
            stream.note_error(getattr(error, "strerror", None) or str(error))
