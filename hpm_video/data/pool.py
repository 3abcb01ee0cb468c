"""Processes for work in native code that may hang, crash or take all memory: a pool that goes on.

Decoding a broken or hostile file does all three, and nothing in Python stops it, for a native call
may hold the interpreter's lock. So each job is done in another process, with a limit of time and
one of memory. A process that goes beyond is killed and replaced, and its job comes back as
:class:`Lost`; the jobs behind it are given to others.

The processes are forked from a server that has imported what they need and has done nothing else
(``forkserver`` of multiprocessing): they take over no thread, no lock and no GPU of a run, so a new
one can begin at any time. Nor do they import the script that runs: the work of a pool is defined in
a module.
"""

import contextlib
import multiprocessing
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_byte
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from types import ModuleType, TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

from typing_extensions import Self

from hpm_video.data.pool_process import serve, unpacked

Job = TypeVar("Job")

PRELOADED = ["hpm_video.data.loader"]
START_SECONDS = 300
"""For a process to begin: the first of them waits until the server has imported torch."""
TICK = 0.25
"""Seconds between two looks at the clock."""
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What a process may take for a job."""

    seconds: float = 60.0
    """From the beginning of a job, or its last result, to the next result. Time in which the run
    itself was stopped (Ctrl-Z, a suspended machine) does not count."""
    memory: int = 4 * GIB
    """Bytes, beyond those that it begins with. On Linux only."""


USUAL = Limits()


@dataclass(frozen=True)
class Lost:
    """What came of a job instead of a result."""

    reason: str


class Answer(NamedTuple):
    """What came of a job."""

    tag: Any
    """As it was submitted."""
    result: Any
    """A result, or :class:`Lost`."""
    is_last: bool
    """Nothing more comes of this job."""


class PoolStopped(Exception):  # noqa: N818 - not an error: nobody wants results any more
    """The pool was stopped while somebody waited for a result."""


class PoolError(RuntimeError):
    """The pool itself does not work, or the work raised what it must not: the run has to end."""


class Pool(Generic[Job]):
    """Processes that do jobs, and are replaced when a job takes them down.

    ``work`` must be picklable: a function of a module, or an object of a class of one. It returns
    one result, or an iterator of several. Arrays and CPU tensors in a result come through shared
    memory. Where it has a method ``prepare``, each process calls that once, and no limit counts the
    time it takes: for imports.
    """

    def __init__(
        self,
        work: Callable[[Job], Any],
        workers: int,
        limits: Limits,
        *,
        result_bytes: int = 0,
        depth: int = 2,
    ) -> None:
        """``workers``: processes, at least 1.

        ``result_bytes``: of the arrays in a result, at most; larger ones come through a pipe,
        slowly. ``depth``: jobs that a process holds, those that it has not begun included.
        """
        if workers < 1 or depth < 1:
            raise ValueError(
                f"a pool needs at least 1 worker of depth 1, got {workers} and {depth}"
            )
        self._limits = limits
        self._jobs: deque[tuple[Any, Job]] = deque()
        self._clock = 0.0
        self._stopped = threading.Event()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._workers = [
            _Worker(context, work, limits, result_bytes, depth) for _ in range(workers)
        ]
        # Before multiprocessing waits, as the interpreter exits, for processes that would not end.
        self._finalizer = Finalize(self, _kill, args=(self._workers,), exitpriority=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._finalizer()

    def stop(self) -> None:
        """Have :meth:`next` give up, from another thread. The pool is to be closed after that."""
        self._stopped.set()

    def submit(self, tag: object, job: Job, *, first: bool = False) -> None:
        """Have a job done, before all that wait with ``first``."""
        if first:
            self._jobs.appendleft((tag, job))
        else:
            self._jobs.append((tag, job))
        self._feed()

    def next(self) -> Answer:
        """Wait for a result of any job that was submitted.

        Raises:
            PoolError: processes do not start, or the work raised an error.
            PoolStopped: :meth:`stop` was called.
        """
        while not self._stopped.is_set():
            self._feed()
            began = time.monotonic()
            ready = wait([worker.connection for worker in self._workers], timeout=TICK)
            # While this process stood still the others may have too: that counts as two looks.
            self._clock += min(time.monotonic() - began, 2 * TICK)
            for worker in self._workers:
                answer = worker.receive(self._clock) if worker.connection in ready else None
                if answer is None and worker.is_late(self._clock):
                    answer = worker.give_up(f"it took longer than {self._limits.seconds:g} s")
                self._jobs.extendleft(reversed(worker.take_back()))
                if answer is not None:
                    return answer
        raise PoolStopped

    def _feed(self) -> None:
        """Hand out jobs, to the process that has the fewest."""
        while self._jobs:
            worker = min(self._workers, key=lambda each: len(each.held))
            if not worker.has_room:
                return
            worker.begin(*self._jobs.popleft(), self._clock)


def over(pool: Pool[Job], jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
    """Each job's one result, or :class:`Lost`, with its place in ``jobs``, as they come."""
    for place, job in enumerate(jobs):
        pool.submit(place, job)
    for _ in jobs:
        answer = pool.next()
        yield answer.tag, answer.result


@dataclass(eq=False)
class _Held:
    """A job that a process has."""

    tag: Any
    job: Any
    slot: int


@dataclass(eq=False)
class _Worker:
    """A process, as the pool sees it; a new one takes over where it ends."""

    context: Any
    work: Any
    limits: Limits
    result_bytes: int
    depth: int
    held: deque[_Held] = field(default_factory=deque)
    _returned: list[tuple[Any, Any]] = field(default_factory=list)
    _since: float | None = None
    """When it began what it is at; not yet known of a process that starts."""
    _ready: bool = False

    def __post_init__(self) -> None:
        # A file without a name: nothing is left of it, however this process ends.
        self._shared = self.context.RawArray(c_byte, max(self.result_bytes * self.depth, 1))
        self._start()

    def _start(self) -> None:
        self.connection, theirs = self.context.Pipe()
        watched, self._life = self.context.Pipe(duplex=False)
        self.process = self.context.Process(
            target=serve,
            args=(theirs, watched, self._shared, self.result_bytes, self.work, self.limits.memory),
            daemon=True,
        )
        with _no_script():
            self.process.start()
        theirs.close()
        watched.close()
        self._ready, self._since = False, None

    @property
    def has_room(self) -> bool:
        return len(self.held) < self.depth

    def begin(self, tag: Any, job: Any, clock: float) -> None:
        slot = next(i for i in range(self.depth) if all(i != held.slot for held in self.held))
        if not self.held:
            self._since = clock
        self.held.append(_Held(tag, job, slot))
        with contextlib.suppress(OSError):  # where it is gone, that is found when it is listened to
            self.connection.send(("job", slot, job))

    def is_late(self, clock: float) -> bool:
        if self._since is None or not (self.held or not self._ready):
            return False
        return clock - self._since > (self.limits.seconds if self._ready else START_SECONDS)

    def receive(self, clock: float) -> Answer | None:
        """What the process says; where it says nothing any more, a new one takes its place."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            return self.give_up(None)
        self._since = clock
        if kind == "ready":
            self._ready = True
            return None
        if kind == "error":
            raise PoolError(f"reading data failed unexpectedly:\n{content[0]}")
        if kind == "lost":
            return self.give_up(content[0])
        header, sizes, more = content
        job = self.held[0]
        result = unpacked(header, sizes, self._slot(job.slot))
        if more:
            self.connection.send(("more",))
        else:
            self.held.popleft()
        return Answer(job.tag, result, is_last=not more)

    def give_up(self, reason: str | None) -> Answer | None:
        """Kill the process and start another one. -> what came of its job

        ``reason``: none where the process ended by itself.
        """
        was_ready = self._ready
        ended = self._end()
        if not was_ready:
            raise PoolError(
                "a process that decodes did not start: "
                f"{reason or f'it ended {ended}'}. What it printed stands above; "
                "data.workers=0 decodes in the run's own process"
            )
        job = self.held.popleft() if self.held else None
        self._returned += [(held.tag, held.job) for held in self.held]
        self.held.clear()
        self._start()
        if job is None:
            return None
        why = reason or f"the process that decoded it ended {ended}"
        return Answer(job.tag, Lost(why), is_last=True)

    def take_back(self) -> list[tuple[Any, Any]]:
        """Jobs that a process which ended had not begun."""
        returned, self._returned = self._returned, []
        return returned

    def _end(self) -> str:
        """Kill it. -> how it ended"""
        self.connection.close()
        self._life.close()
        # One that ended by itself may tell how; one in the middle of reading from a dead disk
        # does not even end when killed: then nobody waits for it.
        self.process.join(timeout=0.5)
        code = self.process.exitcode
        self.process.kill()
        self.process.join(timeout=2)
        if code is None or code >= 0:
            return f"with exit code {code}"
        name = signal.Signals(-code).name
        hint = ", as a system does that has no memory left" if name == "SIGKILL" else ""
        return f"by {name}{hint}"

    def kill(self) -> None:
        self.connection.close()
        self._life.close()
        self.process.kill()

    def _slot(self, slot: int) -> memoryview:
        whole = memoryview(self._shared).cast("B")
        return whole[slot * self.result_bytes : (slot + 1) * self.result_bytes]


@contextlib.contextmanager
def _no_script() -> Iterator[None]:
    """Without this a new process imports the script that runs, and all that the script imports."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _kill(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.process.join(timeout=2)
