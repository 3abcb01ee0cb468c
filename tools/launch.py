"""Start a program in several processes, which form one job.

    python tools/launch.py --processes 4 tools/evaluate.py CHECKPOINT LIST

On several machines, the same line on each of them, with its own --node-rank:
    python tools/launch.py --processes 8 --nodes 2 --node-rank 0 --master-addr NODE0 PROGRAM ...

The processes find each other by the variables of torchrun, which can start the same programs. This
one prints nothing while all goes well, and names the process that made the job fail. An option that
is not given is taken from the environment variable that its help names in capitals.
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
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

WRONG_INPUT = 2
STOPPED = (75, 130)  # exit codes of a program that has stopped on request with its state saved
POLL = 0.05
SETTLE = 10.0
"""Seconds in which the others may end by themselves after an error of one process: often all found
the same one, and the first is about to print it."""
ENDING = 10.0  # seconds from SIGTERM to SIGKILL for the others of a job that cannot go on
FAULTS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""Signals that a broken connection to another process does not cause, as it may SIGABRT."""
AGAIN = "Start the same command again: it resumes from the last checkpoint"
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


class Worker:
    """A process of this machine, in a session of its own, which no Ctrl-C reaches."""

    def __init__(self, command: Sequence[str], variables: dict[str, str]) -> None:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def follow_launcher() -> None:
            if libc is not None:
                libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: stop when the launcher is killed

        self.rank = int(variables["RANK"])
        self.process = subprocess.Popen(
            command, env=variables, start_new_session=True, preexec_fn=follow_launcher
        )
        self.sent = set[int]()

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


def note_signals() -> list[int]:
    """Return the signals that this launcher has received, a list that grows."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda number, _frame: received.append(number))
    return received


def main(command_line: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them. -> the exit code, see ``EPILOG``"""
    given = read_options(command_line)
    count = given.processes * given.nodes
    command = [sys.executable, "-u", given.program, *given.arguments]
    if given.dry_run:
        command += ["--processes", str(count)]
    if given.dry_run or count == 1:  # a signal then reaches the program itself
        os.execv(sys.executable, command)
    received = note_signals()
    with closing(socket.socket()) as place:
        port = given.master_port or 29500
        if given.nodes == 1 and given.master_port is None:
            # A port that no other job of this machine gets while it is open. It does not listen,
            # so the first process, which does, may take the same.
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        workers = [
            Worker(command, variables_of(given, port, local_rank))
            for local_rank in range(given.processes)
        ]
        ended = watch(workers, received, given.grace)
    return conclude(count, ended, insists=signal.SIGINT in received[1:])


def read_options(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line. An option not given is read from its variable."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, variable: str, kind: type, default: object, about: str) -> None:
        default = os.environ.get(variable) or default
        parser.add_argument(name, type=kind, default=default, metavar=variable, help=about)

    add("--processes", "GPUS", int, 1, "processes on this machine; default: 1")
    add("--nodes", "NNODES", int, 1, "machines, with --processes on each; default: 1")
    add("--node-rank", "NODE_RANK", int, None, "number of this machine, from 0")
    add("--master-addr", "MASTER_ADDR", str, None, "name or address of machine 0")
    free = "free port on machine 0; default: 29500, or any port with one machine"
    add("--master-port", "MASTER_PORT", int, None, free)
    add("--grace", "HPM_GRACE", float, 300.0, "seconds to save in after a stop; default: 300")
    parser.add_argument("program", help="a Python file")
    of_program = "its arguments; with --dry-run among them it starts once and is told --processes"
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=of_program)
    given = parser.parse_args(command_line)
    given.dry_run = "--dry-run" in given.arguments
    if not Path(given.program).is_file():
        parser.error(f"no program {given.program} in {Path.cwd()}; name a Python file")
    if given.processes < 1 or given.nodes < 1:
        parser.error(
            f"--processes {given.processes} (GPUS) and --nodes {given.nodes} (NNODES) must be at "
            "least 1"
        )
    if given.nodes == 1 or given.dry_run:
        given.node_rank, given.master_addr = 0, "127.0.0.1"
    elif given.node_rank not in range(given.nodes) or given.master_addr is None:
        parser.error(
            f"--nodes {given.nodes} (NNODES) needs --node-rank (NODE_RANK), from 0 to "
            f"{given.nodes - 1}, and --master-addr (MASTER_ADDR), the name or address of machine 0"
        )
    return given


def variables_of(given: argparse.Namespace, port: int, local_rank: int) -> dict[str, str]:
    """Return the environment of a process of this machine."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    of_job = {
        "RANK": given.node_rank * given.processes + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": given.processes * given.nodes,
        "LOCAL_WORLD_SIZE": given.processes,
        "MASTER_ADDR": given.master_addr,
        "MASTER_PORT": port,
    }
    threads = {"OMP_NUM_THREADS": str(max(1, cores // given.processes))}
    return threads | os.environ | {name: str(value) for name, value in of_job.items()}


def watch(workers: Sequence[Worker], received: Sequence[int], grace: float) -> list[Worker]:
    """Wait until all have ended, and enforce it. -> the processes in the order of their ends

    ``received``: signals to this launcher, as they come.
    """
    ended: list[Worker] = []
    passed_on = False
    ask_at = kill_at = math.inf
    while alive := [worker for worker in workers if worker not in ended]:
        time.sleep(POLL)
        now = time.monotonic()
        if received and not passed_on:
            passed_on = True
            # A terminal that closes asks as a scheduler does.
            asked = signal.SIGINT if received[0] == signal.SIGINT else signal.SIGTERM
            sys.stderr.write(f"\n{asked.name}: the processes save and end\n")
            for worker in alive:
                worker.send(asked)
            kill_at = min(kill_at, now + grace)
        gone = [worker for worker in alive if worker.process.poll() is not None]
        # Of processes that ended at one time, the cause comes first.
        gone.sort(key=lambda worker: (-worker.code not in FAULTS, worker.code < 0, worker.rank))
        for worker in gone:
            ended.append(worker)
            patience = worker.patience(grace)
            ask_at = min(ask_at, now + patience)
            kill_at = min(kill_at, now + patience + ENDING)
        must_end = now >= kill_at or signal.SIGINT in received[1:]
        if now >= ask_at or must_end:
            ask_at = math.inf
            for worker in alive:
                worker.send(signal.SIGKILL if must_end else signal.SIGTERM)
    return ended


def conclude(count: int, ended: Sequence[Worker], *, insists: bool) -> int:
    """Name the process that made the job fail, if one did. -> the exit code

    ``insists``: whether Ctrl-C came again.
    """
    here = socket.gethostname()
    failed = [worker for worker in ended if worker.failed]
    if failed:
        cause = min(failed, key=lambda worker: -worker.code not in FAULTS)  # the earliest of both
        what = f"ended with code {cause.code}, and the job with it"
        if cause.code < 0:
            name = signal.Signals(-cause.code).name
            perhaps = ", for instance by the out-of-memory killer" if name == "SIGKILL" else ""
            what = f"was killed by {name}{perhaps}; the job is ended. {AGAIN}"
        if cause.code != WRONG_INPUT:  # which the program itself tells
            who = f"rank {cause.rank} of {count} (pid {cause.process.pid} on {here})"
            sys.stderr.write(f"\nerror: {who} {what}\n")
        return max(cause.code, 0) or 1
    killed = [str(worker.rank) for worker in ended if -worker.code == signal.SIGKILL]
    if killed:
        why = "was stopped by a second Ctrl-C" if insists else "did not end in time"
        sys.stderr.write(
            f"\nerror: the job {why}; killed: rank {', '.join(killed)} on {here}. {AGAIN}. "
            f"HPM_GRACE=SECONDS gives more time to save.\n"
        )
        return 130 if insists else 1
    codes = [worker.code if worker.code >= 0 else 128 - worker.code for worker in ended]
    return max(codes, key=lambda code: (code in STOPPED, code))  # some died before they could save


if __name__ == "__main__":
    sys.exit(main())
