"""A process of a pool: it does one job after the other until it is killed or the run is gone.

What it finds goes to the run through a pipe, its arrays through memory that both share.
"""

import fcntl
import os
import pickle
import resource
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hpm_video.files.plugins import Kind, register


def serve(
    connection: Connection,
    watched: Connection,
    shared: Any,
    result_bytes: int,
    work: Any,
    memory: int,
    registered: Sequence[tuple[Kind, str, Any]],
) -> None:
    """Do one job after the other, with the decoders that were registered."""
    import torch  # the server has it; the run needs it for jobs alone

    for number in (signal.SIGINT, signal.SIGTERM):  # the run saves, and then ends this process
        signal.signal(number, signal.SIG_IGN)
    _end_with_the_run(watched)
    torch.set_num_threads(1)
    _limit_memory(memory)
    for kind, name, thing in registered:
        register(kind, name, thing)
    if hasattr(work, "prepare"):
        work.prepare()
    inbox: deque[Any] = deque()
    room = memoryview(shared).cast("B")
    try:
        connection.send(("ready",))
        while True:
            _, slot, job = inbox.popleft() if inbox else connection.recv()
            place = room[slot * result_bytes : (slot + 1) * result_bytes]
            _do(work, pickle.loads(job), connection, place, inbox)  # noqa: S301 - of the run itself
    except (EOFError, BrokenPipeError):  # the run closed the pool
        return


def _do(work: Any, job: Any, connection: Connection, place: memoryview, inbox: deque[Any]) -> None:
    try:
        done = work(job)
        results = done if isinstance(done, Iterator) else iter([done])
        result = next(results)
        for following in results:
            connection.send(("result", *packed(result, place), True))
            while (message := connection.recv())[0] != "more":
                inbox.append(message)
            result = following
        connection.send(("result", *packed(result, place), False))
    except (EOFError, BrokenPipeError):
        raise EOFError from None
    except Exception as error:  # noqa: BLE001 - the run raises it, whatever it is
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            connection.send(("lost", "it needs more memory than a process that decodes may have"))
            os._exit(0)  # what it holds goes with it
        connection.send(("error", traceback.format_exc()))
        raise EOFError from None


def _end_with_the_run(watched: Connection) -> None:
    """Have the kernel end this process when the other end is closed: the run is gone.

    Nothing is ever sent, so SIGIO means just that; and it ends a process that hangs as well.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    number = watched.fileno()
    fcntl.fcntl(number, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_ASYNC)
    if watched.poll():  # it was closed before
        os._exit(0)


def _limit_memory(memory: int) -> None:
    """Limit the memory of this process alone; larger requests fail. Without /proc: no limit."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii").split()
    except OSError:
        return
    limit = 1024 * int(status[status.index("VmData:") + 1]) + memory
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


class _Pickler(pickle.Pickler):
    """A pickler that takes a tensor for an array, whose numbers can be left out and copied."""

    def reducer_override(self, thing: Any) -> Any:
        import torch

        if isinstance(thing, torch.Tensor):
            return torch.from_numpy, (thing.contiguous().numpy(),)
        return NotImplemented


def packed(result: Any, place: memoryview) -> tuple[bytes, list[Any]]:
    """Return a result without its arrays, and the sizes of those, which are written to ``place``.

    If they are too large for it, their bytes instead of their sizes.
    """
    buffers: list[pickle.PickleBuffer] = []
    header = BytesIO()
    _Pickler(header, 5, buffer_callback=buffers.append).dump(result)
    arrays = [buffer.raw() for buffer in buffers]
    if sum(each.nbytes for each in arrays) > place.nbytes:
        return header.getvalue(), [bytes(each) for each in arrays]
    start = 0
    for each in arrays:
        place[start : start + each.nbytes] = each
        start += each.nbytes
    return header.getvalue(), [each.nbytes for each in arrays]


def unpacked(header: bytes, arrays: list[Any], place: memoryview) -> Any:
    """Return the result, its arrays copied: the place is written to again."""
    buffers, start = [], 0
    for each in arrays:
        if isinstance(each, bytes):
            buffers.append(bytearray(each))
        else:
            buffers.append(bytearray(place[start : start + each]))
            start += each
    return pickle.loads(header, buffers=buffers)  # noqa: S301 - of a process of our own
