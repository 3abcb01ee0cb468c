"""Start a program in several processes, which form one job.

    python tools/launch.py --processes 4 tools/evaluate.py CHECKPOINT LIST

On several machines, the same line on each of them, with its own --node-rank:
    python tools/launch.py --processes 8 --nodes 2 --node-rank 0 --master-addr NODE0 PROGRAM ...

On the machines of a hostfile, one line per machine with its processes, such as "node0 slots=8":
    python tools/launch.py --hostfile FILE PROGRAM ...

If it names other machines than this one, DeepSpeed's launcher starts them, see tools/hostfile.py:
when asked to stop, it gives processes 30 seconds to save and end, and then exits with 1.

The processes find each other by the variables that torchrun sets, so torchrun can start the same
programs. This one prints nothing while all goes well, ends with the exit code of the program, and
names the process that made the job fail. An option that is not given is taken from the environment
variable that its help names in capitals.
"""

import argparse
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from hostfile import AGAIN, is_here, read_hostfile, run_on_hosts  # type: ignore[import-not-found]

WRONG_INPUT = 2
STOPPED = (75, 130)  # exit codes of a program that has stopped on request with its state saved
POLL = 0.05
SETTLE = 10.0
"""Seconds in which the others may end by themselves after an error of one process: often all found
the same one, and the first is about to print it."""
ENDING = 10.0  # seconds from SIGTERM to SIGKILL for the others of a job that cannot go on
FAULTS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""Signals that a broken connection to another process does not cause, as it may SIGABRT."""
EPILOG = f"""exit codes:
  that of the program if its processes end by themselves, such as 0, 2, or 75 and 130 for a
  stop with the state saved. 1 if one is killed by a signal, or does not end when asked to.

how a job ends:
  SIGTERM, Ctrl-C     passed on once; the processes have HPM_GRACE seconds (300) to save and end
  Ctrl-C again        ends them at once
  an error of one     the others have {SETTLE:.0f} s to end by themselves, then SIGTERM
  one is killed       the others get SIGTERM at once
                      {ENDING:.0f} s after such a SIGTERM the remaining ones are killed
"""


@dataclass(frozen=True)
class Job:
    """Number of processes, and the address where they meet."""

    processes: int
    nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500

    def environment(self, local_rank: int) -> dict[str, str]:
        """Return the environment of a process of this machine."""
        own = {
            "RANK": self.node_rank * self.processes + local_rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": self.processes * self.nodes,
            "LOCAL_WORLD_SIZE": self.processes,
            "GROUP_RANK": self.node_rank,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        threads = {"OMP_NUM_THREADS": str(threads_per_process(self.processes))}
        return {**threads, **os.environ, **{name: str(value) for name, value in own.items()}}


@dataclass
class Worker:
    """A process of this machine."""

    rank: int
    process: subprocess.Popen[bytes]
    sent: set[int] = field(default_factory=set)

    def send(self, number: int) -> None:
        """Signal the process, if it still runs; with SIGKILL, also those that it started."""
        if self.process.poll() is None:
            self.sent.add(number)
            with suppress(ProcessLookupError):
                whole_group = number == signal.SIGKILL
                (os.killpg if whole_group else os.kill)(self.process.pid, number)

    @property
    def code(self) -> int:
        """The exit code, or minus the signal that killed it."""
        return self.process.returncode

    @property
    def failed(self) -> bool:
        """Whether it ended without success, a saved state or a signal that was sent from here."""
        return self.code not in (0, *STOPPED) and -self.code not in self.sent

    def patience(self, grace: float) -> float:
        """Return the seconds for which the others may go on after this one has ended."""
        if self.code == 0:
            return math.inf
        if not self.failed:  # the first may still be writing
            return grace
        return SETTLE if self.code > 0 else 0.0


class Requests:
    """Signals that this launcher has received."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.insists = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.insists = self.first is not None and number == signal.SIGINT
        if self.first is None:  # a terminal that closes asks as a scheduler does
            self.first = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM


def main(command_line: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them. -> the exit code, see ``EPILOG``"""
    parser = make_parser()
    given = parser.parse_args(command_line)
    try:
        hosts = read_hostfile(given.hostfile, reach=not given.dry_run) if given.hostfile else {}
        job = read_job(given, hosts)
    except (ValueError, OSError) as error:
        parser.exit(WRONG_INPUT, f"error: {error}\n")
    command, count = [given.program, *given.arguments], job.processes * job.nodes
    if given.dry_run:
        command += ["--dry-run", "--processes", str(count)]
    if given.dry_run or (count == 1 and not hosts):  # a signal then reaches the program itself
        os.execv(sys.executable, [sys.executable, "-u", *command])
    requests = Requests()
    if hosts and not is_here(hosts):
        threads = threads_per_process(max(hosts.values()))
        return int(run_on_hosts(given.hostfile, hosts, command, threads, lambda: requests.first))
    with closing(socket.socket()) as place:
        if job.nodes == 1 and given.master_port is None:
            # A port that no other job of this machine gets while it is open. It does not listen,
            # so the first process, which does, may take the same.
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(("127.0.0.1", 0))
            job = replace(job, port=place.getsockname()[1])
        workers = start(job, [sys.executable, "-u", *command])
        ended = watch(workers, requests, 300 if given.grace is None else given.grace)
    return conclude(job, ended, requests)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser. An option that is not given is read from its environment variable."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, variable: str, kind: Callable[[str], Any], about: str) -> None:
        default = os.environ.get(variable) or None
        parser.add_argument(name, type=kind, default=default, metavar=variable, help=about)

    add("--processes", "GPUS", number("GPUS", 1), "processes on this machine; default: 1")
    add("--nodes", "NNODES", number("NNODES", 1), "machines, with --processes on each; default: 1")
    rank = number("NODE_RANK", 0)
    add("--node-rank", "NODE_RANK", rank, "number of this machine, from 0")
    add("--master-addr", "MASTER_ADDR", str, "name or address of machine 0")
    port = number("MASTER_PORT", 1, 2**16 - 1)
    free = "free port on machine 0; default: 29500, or any port with one machine"
    add("--master-port", "MASTER_PORT", port, free)
    add("--hostfile", "HOSTFILE", Path, "file with the machines and processes, see above")
    grace = number("HPM_GRACE", 0)
    add("--grace", "HPM_GRACE", grace, "seconds to save in after a stop; default: 300")
    once = "start the program once, with --dry-run and the number of processes"
    parser.add_argument("--dry-run", action="store_true", help=once)
    parser.add_argument("program", help="a Python file")
    of_program = "arguments of the program"
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=of_program)
    return parser


def number(variable: str, least: int, most: float = math.inf) -> Callable[[str], int]:
    """Make a parser of whole numbers in a range, for an option or its variable."""

    def parse(text: str) -> int:
        if text.isdecimal() and least <= int(text) <= most:
            return int(text)
        allowed = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"({variable}) must be a whole number {allowed}: {text}")

    return parse


def read_job(given: argparse.Namespace, hosts: Mapping[str, int]) -> Job:
    """Make the job that the options describe.

    Raises:
        ValueError: the options do not fit each other.
    """
    if not Path(given.program).is_file():
        raise ValueError(f"no program {given.program} in {Path.cwd()}; name a Python file")
    if hosts and (given.processes or given.nodes or given.node_rank is not None):
        raise ValueError(
            "--hostfile (HOSTFILE) says machines and processes: leave out --processes (GPUS), "
            "--nodes (NNODES) and --node-rank (NODE_RANK)"
        )
    processes, nodes = sum(hosts.values()) or given.processes or 1, given.nodes or 1
    port = given.master_port or 29500
    if nodes == 1 or given.dry_run:
        return Job(processes, nodes, port=port)
    if given.node_rank is None or given.master_addr is None:
        raise ValueError(
            f"--nodes {nodes} (NNODES) needs --node-rank (NODE_RANK), 0 on the first machine, and "
            "--master-addr (MASTER_ADDR), the first machine's name or address"
        )
    if given.node_rank >= nodes:
        raise ValueError(
            f"--node-rank {given.node_rank} (NODE_RANK) must be in 0 to {nodes - 1}: there are "
            f"--nodes {nodes}"
        )
    return Job(processes, nodes, given.node_rank, given.master_addr, port)


def threads_per_process(processes: int) -> int:
    """Return the number of usable cores per process."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // processes)


def start(job: Job, command: Sequence[str]) -> list[Worker]:
    """Start the processes of this machine, each in its own session, which no Ctrl-C reaches."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def follow_launcher() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: stop when the launcher is killed

    workers = []
    for local_rank in range(job.processes):
        environment = job.environment(local_rank)
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=follow_launcher
        )
        workers.append(Worker(int(environment["RANK"]), process))
    return workers


def watch(workers: Sequence[Worker], requests: Requests, grace: float) -> list[Worker]:
    """Wait until all have ended, and enforce it. -> the processes in the order of their ends"""
    ended: list[Worker] = []
    passed_on = False
    ask_at = kill_at = math.inf
    while alive := [worker for worker in workers if worker not in ended]:
        time.sleep(POLL)
        now = time.monotonic()
        if requests.first is not None and not passed_on:
            passed_on = True
            sys.stderr.write(f"\n{requests.first.name}: the processes save and end\n")
            for worker in alive:
                worker.send(requests.first)
            kill_at = min(kill_at, now + grace)
        gone = [worker for worker in alive if worker.process.poll() is not None]
        # Of processes that ended at one time, the cause comes first.
        gone.sort(key=lambda worker: (-worker.code not in FAULTS, worker.code < 0, worker.rank))
        for worker in gone:
            ended.append(worker)
            patience = worker.patience(grace)
            ask_at = min(ask_at, now + patience)
            kill_at = min(kill_at, now + patience + ENDING)
        must_end = now >= kill_at or requests.insists
        if now >= ask_at or must_end:
            ask_at = math.inf
            for worker in alive:
                worker.send(signal.SIGKILL if must_end else signal.SIGTERM)
    return ended


def conclude(job: Job, ended: Sequence[Worker], requests: Requests) -> int:
    """Report what made the job fail and the remedy, if it did. -> the exit code"""
    failed, here = [worker for worker in ended if worker.failed], socket.gethostname()
    if failed:
        cause = min(failed, key=lambda worker: -worker.code not in FAULTS)  # the earliest of both
        reported = any(worker.rank == 0 and worker.code == WRONG_INPUT for worker in failed)
        if cause.code != WRONG_INPUT or not reported:  # by the first process
            what = f"ended with code {cause.code}, and the job with it"
            if cause.code < 0:
                name = signal.Signals(-cause.code).name
                perhaps = ", for instance by the out-of-memory killer" if name == "SIGKILL" else ""
                what = f"was killed by {name}{perhaps}; the job is ended. {AGAIN}"
            count = job.processes * job.nodes
            who = f"rank {cause.rank} of {count} (pid {cause.process.pid} on {here})"
            sys.stderr.write(f"\nerror: {who} {what}\n")
        return max(cause.code, 0) or 1
    killed = [str(worker.rank) for worker in ended if -worker.code == signal.SIGKILL]
    if killed:
        why = "was stopped by a second Ctrl-C" if requests.insists else "did not end in time"
        sys.stderr.write(
            f"\nerror: the job {why}; killed: rank {', '.join(killed)} on {here}. {AGAIN}. "
            f"HPM_GRACE=SECONDS gives more time to save.\n"
        )
        return 130 if requests.insists else 1
    codes = {worker.code for worker in ended}
    stopped = [code for code in STOPPED if code in codes]
    died = [128 - code for code in sorted(codes) if code < 0]  # before it could save
    return [*stopped, *died, 0][0]


if __name__ == "__main__":
    sys.exit(main())
