"""Processes for work in native code that may hang, crash or take all memory: a pool that goes on.

Decoding a broken or hostile file does all three, and nothing in Python stops it, for a native call
may hold the interpreter's lock. So each job is done in another process, with a limit of time and
one of memory. A process that goes beyond is killed and replaced, and its job comes back as
:class:`Lost`; the jobs behind it are given to others.

The processes are forked from a server that has imported what they need and has done nothing else
(``forkserver`` of multiprocessing): they take over no thread, lock or GPU of a run, so a new one
can begin at any time. They do not import the script that runs.
"""

import contextlib
import multiprocessing
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_byte
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

from typing_extensions import Self

from hpm_video.files.atomic import temporary_folder
from hpm_video.files.errors import ExpectedError
from hpm_video.files.failures import Failure
from hpm_video.files.plugins import decoders
from hpm_video.workers.process import serve, unpacked

Job = TypeVar("Job")

START_SECONDS = 300  # for a process: the first one waits until the server has imported torch
STARTS = 3  # times that a process may fail to start before the run ends
SAFE_BYTES = 2**15  # two jobs of this size fit into the buffer of a pipe
REAPING = 30  # seconds until an exit code is known: the server that forked the process looks first
TICK = 0.25  # seconds between two looks at the clock
NAME = "hpm_video decoding"  # of the processes of pools
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


class Lost(Failure):
    """What came of a job, or of the file that it is about, whose process was lost."""


class Answer(NamedTuple):
    """What came of a job."""

    tag: Any  # with which the job was submitted
    result: Any  # or Lost
    is_last: bool  # nothing more comes of this job


class PoolStopped(Exception):  # noqa: N818 - not an error: nobody wants results any more
    """The pool was stopped while somebody waited for a result."""


class PoolError(ExpectedError, RuntimeError):
    """The pool itself does not work, or the work raised what it must not: the run has to end."""


class Pool(Generic[Job]):
    """Processes that do jobs, and are replaced when a job takes them down.

    ``work`` must be picklable: a function of a module, or an object of a class of one. It returns
    one result, or an iterator of several. Arrays and CPU tensors in a result come through shared
    memory. If it has a method ``prepare``, each process calls that once, without a limit of time.
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
        """Start so many ``workers``, at least 1.

        ``result_bytes``: of the arrays in a result; larger ones come through a pipe, slowly.
        ``depth``: jobs that a process holds; with 2 it need not wait for the run.
        """
        self._limits = limits
        self._jobs: deque[_Job] = deque()
        self._clock = 0.0
        self._stopped = threading.Event()
        context = multiprocessing.get_context("forkserver")
        # A folder that is deleted even after a kill, for the sockets of multiprocessing.
        own: Any = multiprocessing.current_process()
        own._config.setdefault("tempdir", str(temporary_folder()))  # noqa: SLF001
        context.set_forkserver_preload(["torch", serve.__module__, work.__module__])
        self._workers: list[_Worker] = []
        # At exit, before multiprocessing waits for processes that would not end.
        self._finalizer = Finalize(self, _kill, args=(self._workers,), exitpriority=10)
        for _ in range(workers):
            self._workers.append(_Worker(context, work, limits, result_bytes, depth))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._finalizer()

    def stop(self) -> None:
        """Have :meth:`next` give up, from another thread. The pool is to be closed after that."""
        self._stopped.set()

    def submit(
        self, tag: object, job: Job, *, path: str = "", first: bool = False, attempts: int = 1
    ) -> None:
        """Have a job done, before all that wait with ``first``.

        ``path``: of the file that it is about, for its failure. ``attempts``: how often it may be
        begun, for a process may be lost through no fault of its job.
        """
        add = self._jobs.appendleft if first else self._jobs.append
        add(_Job(tag, pickle.dumps(job), path, attempts))
        self._feed()

    def next(self) -> Answer:
        """Wait for a result of any job that was submitted.

        Raises PoolError if processes do not start or the work raised an error, and PoolStopped if
        :meth:`stop` was called.
        """
        while not self._stopped.is_set():
            self._feed()
            began = time.monotonic()
            ready = wait([worker.connection for worker in self._workers], timeout=TICK)
            # While this process stood still, the others may have too.
            self._clock += min(time.monotonic() - began, 2 * TICK)
            for worker in self._workers:
                answer = worker.receive(self._clock) if worker.connection in ready else None
                if answer is None and worker.is_late(self._clock):
                    answer = worker.give_up(f"it took longer than {self._limits.seconds:g} s")
                self._jobs.extendleft(reversed(worker.returned))
                worker.returned = []
                if answer is not None:
                    return answer
        raise PoolStopped

    def _feed(self) -> None:
        while self._jobs:
            worker = min(self._workers, key=lambda each: len(each.held))
            if not worker.takes(self._jobs[0]):
                return
            worker.begin(self._jobs.popleft(), self._clock)


@dataclass(eq=False)
class _Job:
    tag: Any
    data: bytes  # it itself, pickled
    path: str
    attempts: int  # how often it may still be begun
    slot: int = 0  # of the shared memory, where it was begun
    has_results: bool = False


class _Worker:
    """A process, as the pool sees it; a new one takes over where it ends."""

    def __init__(
        self, context: Any, work: Any, limits: Limits, result_bytes: int, depth: int
    ) -> None:
        self._context, self._work, self._limits = context, work, limits
        self._result_bytes, self._depth = result_bytes, depth
        # A file without a name: nothing is left of it, however this process ends.
        self._shared = context.RawArray(c_byte, max(result_bytes * depth, 1))
        self.held: deque[_Job] = deque()
        self.returned: list[_Job] = []  # by a process that ended, to be begun by another
        self._failed_starts = 0
        self._start()

    def _start(self) -> None:
        try:
            self.connection, theirs = self._context.Pipe()
            watched, self._life = self._context.Pipe(duplex=False)
            given = theirs, watched, self._shared, self._result_bytes, self._work
            given = (*given, self._limits.memory, decoders())
            process = self._context.Process(target=serve, args=given, daemon=True, name=NAME)
            with _no_script():
                process.start()
        except OSError as error:
            raise PoolError(
                f"a process that decodes cannot be started: {error}. Allow more open files "
                "(ulimit -n), set TMPDIR to a shorter path, or lower data.workers"
            ) from error
        theirs.close()
        watched.close()
        self.process, self._ready = process, False
        self._since: float | None = None  # when it began what it is at, unknown while it starts

    def takes(self, job: _Job) -> bool:
        """Whether it can be given a job now: only when idle a large one, which it has to read."""
        if len(job.data) > SAFE_BYTES:
            return self._ready and not self.held
        return len(self.held) < self._depth

    def begin(self, job: _Job, clock: float) -> None:
        slots = {held.slot for held in self.held}
        job.slot = next(slot for slot in range(self._depth) if slot not in slots)
        if not self.held:
            self._since = clock
        self.held.append(job)
        with contextlib.suppress(OSError):  # if it is gone, receive() finds that
            self.connection.send(("job", job.slot, job.data))

    def is_late(self, clock: float) -> bool:
        if self._since is None or (self._ready and not self.held):
            return False
        return clock - self._since > (self._limits.seconds if self._ready else START_SECONDS)

    def receive(self, clock: float) -> Answer | None:
        """Take a message of the process; where it ended, a new one takes its place."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            return self.give_up(None)
        self._since = clock
        if kind == "ready":
            self._ready, self._failed_starts = True, 0
            return None
        if kind == "error":
            raise PoolError(f"reading data failed unexpectedly:\n{content[0]}")
        job = self.held[0]
        if kind == "lost":
            job.attempts = 0  # it would be the same again
            return self.give_up(content[0])
        header, sizes, more = content
        job.has_results = True
        place = memoryview(self._shared).cast("B")[job.slot * self._result_bytes :]
        result = unpacked(header, sizes, place)
        if more:
            with contextlib.suppress(OSError):
                self.connection.send(("more",))
        else:
            self.held.popleft()
        return Answer(job.tag, result, is_last=not more)

    def give_up(self, reason: str | None) -> Answer | None:
        """Kill the process and start another one. -> what came of its job

        ``reason``: none where the process ended by itself.
        """
        if reason is None:
            self.process.join(timeout=REAPING)
            code = self.process.exitcode
            is_killed = code is not None and code < 0
            how = f"by {signal.Signals(-code).name}" if is_killed else f"with exit code {code}"
            reason = f"the process that decoded it ended {how}"
        self.kill()
        self.process.join(timeout=2)  # one that reads from a dead disk does not even end then
        job = self.held.popleft() if self.held and self._ready else None
        self.returned += self.held
        self.held.clear()
        self._failed_starts += not self._ready
        if self._failed_starts >= STARTS:
            raise PoolError(
                f"a process that decodes did not start, {STARTS} times: {reason}. What it printed "
                "stands above; data.workers=0 decodes in the run's own process"
            )
        self._start()
        if job is None:
            return None
        job.attempts -= 1
        if job.attempts > 0 and not job.has_results:
            self.returned.insert(0, job)
            return None
        return Answer(job.tag, Lost(job.path, reason), is_last=True)

    def kill(self) -> None:
        self.process.kill()  # before it finds that nobody listens, and prints a traceback
        self.connection.close()
        self._life.close()


@contextlib.contextmanager
def _no_script() -> Iterator[None]:
    """Keep a new process from importing the script that runs, and all that the script imports."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _kill(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.kill()
    for worker in workers:
        worker.process.join(timeout=2)
