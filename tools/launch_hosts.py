"""Start a program on the machines of a hostfile, by DeepSpeed's launcher.

    python tools/launch_hosts.py HOSTFILE PROGRAM ARGUMENT ...

Each line of the file is a machine and its processes: "node0 slots=8". DeepSpeed reaches machines
other than this one by pdsh and ssh without a password; repository, environment and data must lie
at the same paths there. PYTHONPATH, OMP_NUM_THREADS and what starts with HPM_, DS_, NCCL_, GLOO_
or TORCH_ reach them; other variables are lines "NAME=VALUE" of .deepspeed_env, here or in the
home folder. MASTER_ADDR and MASTER_PORT are used where they are given.

DeepSpeed's launcher gives processes 30 seconds to save and end when they are asked to stop, and
ends with 1 then where there are several machines. tools/launch.py gives them more, and ends as the
program does.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from launch import (  # type: ignore[import-not-found] # beside this file
    POLL,
    Requests,
    read_program,
    reserve_port,
    threads_per_process,
)

ALSO = ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "PYTHONUNBUFFERED")
PASSED_ON = ("HPM_", "DS_", "NCCL_", "GLOO_", "TORCH_")
LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?")


def main(command_line: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them. -> the exit code"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hostfile", type=Path)
    parser.add_argument("program", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    arguments = parser.parse_args(command_line)
    try:
        program = read_program(arguments.program)
        hosts = read_hostfile(arguments.hostfile)
        check_reach(hosts)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    here = is_here(hosts)
    environment = {**shares(hosts), **os.environ}
    requests = Requests()
    with closing(socket.socket()) as place, tempfile.NamedTemporaryFile("w") as variables:
        variables.write(variables_of_nodes(environment))
        variables.flush()
        runner = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "deepspeed.launcher.runner",
                "--quiet",
                "--no_local_rank",
                "--hostfile",
                str(arguments.hostfile),
                *meeting_place(hosts, place),
                program,
                *(arguments.arguments if here else map(quoted, arguments.arguments)),
            ],
            env={**environment, "DS_ENV_FILE": variables.name},
            start_new_session=True,
        )
        return wait(runner, requests, here)


def read_hostfile(path: Path) -> dict[str, int]:
    """Machines, and the number of processes of each.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no hostfile.
    """
    hosts: dict[str, int] = {}
    for line in map(str.strip, path.read_text().splitlines()):
        if not line or line.startswith("#"):
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"{path}: {line!r} is no host; write a line such as 'node0 slots=8'")
        if found[1] in hosts:
            raise ValueError(f"{path} names {found[1]} twice; write one line for each machine")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ValueError(f"{path} names no host; write a line such as 'node0 slots=8'")
    return hosts


def check_reach(hosts: dict[str, int]) -> None:
    """See that other machines can be reached.

    Raises:
        ValueError: a program for that is missing.
    """
    missing = [name for name in ("pdsh", "ssh") if shutil.which(name) is None]
    if missing and not is_here(hosts):
        raise ValueError(
            f"no program {' and '.join(missing)}, by which DeepSpeed reaches {', '.join(hosts)}. "
            "Install it (Debian: pdsh, openssh-client), or start on each machine with NNODES"
        )


def is_here(hosts: dict[str, int]) -> bool:
    """Whether this machine is the only one."""
    name = socket.gethostname()
    return set(hosts) <= {"localhost", "127.0.0.1", name, name.partition(".")[0]}


def meeting_place(hosts: dict[str, int], place: socket.socket) -> list[str]:
    """Options that say where the processes find each other; ssh only where it is needed."""
    port = os.environ.get("MASTER_PORT")
    if is_here(hosts):
        options = ["--master_addr", "127.0.0.1", "--no_ssh_check"]
        return [*options, "--master_port", port or str(reserve_port(place))]
    address = os.environ.get("MASTER_ADDR")
    options = ["--force_multi"]  # one machine that is not this one would be taken for it
    if address:
        options += ["--master_addr", address]
    return [*options, "--master_port", port or "29500"]


def shares(hosts: dict[str, int]) -> dict[str, str]:
    """What a process takes of its machine, which DeepSpeed does not say."""
    shared = {"OMP_NUM_THREADS": str(threads_per_process(max(hosts.values())))}
    if len(set(hosts.values())) == 1:
        shared["LOCAL_WORLD_SIZE"] = str(max(hosts.values()))
    return shared


def variables_of_nodes(environment: Mapping[str, str]) -> str:
    """The file of variables that DeepSpeed sets on other machines, with the user's own lines."""
    # DeepSpeed adds the root of the repository to PYTHONPATH, where `datasets` shadows a library.
    lines = [f"PYTHONPATH={environment.get('PYTHONPATH', '')}"]
    for name, value in environment.items():
        chosen = name in ALSO or (name.startswith(PASSED_ON) and name != "DS_ENV_FILE")
        if chosen and "\n" not in value:
            lines.append(f"{name}={value}")
    for folder in (Path.home(), Path.cwd()):
        users = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if users.is_file():
            lines += [line for line in users.read_text().splitlines() if "=" in line]
    return "\n".join(lines) + "\n"


def quoted(argument: str) -> str:
    """An argument for the shell of another machine; DeepSpeed itself quotes those with spaces."""
    return argument if " " in argument else shlex.quote(argument)


def wait(runner: subprocess.Popen[bytes], requests: Requests, here: bool) -> int:
    """Wait for DeepSpeed's launcher, and pass a stop on. -> the exit code"""
    passed_on = False
    while runner.poll() is None:
        time.sleep(POLL)
        if requests.first is not None and not passed_on:
            passed_on = True
            sys.stderr.write(f"\n{requests.first.name}: the processes save and end, within 30 s\n")
            if here:  # DeepSpeed's own processes would forget the exit code
                signal_workers(runner.pid, requests.first)
            else:
                runner.send_signal(signal.SIGTERM)
    code = runner.returncode
    if code < 0 or code > 192:  # the second is how DeepSpeed exits with minus a signal
        number = -code if code < 0 else 256 - code
        sys.stderr.write(
            f"\nerror: a process was killed by {signal.Signals(number).name}; the job is ended. "
            "Start the same command again: it goes on from the last checkpoint\n"
        )
        return 1
    return code


def signal_workers(runner: int, number: int) -> None:
    """Signal the program's processes, which the runner's one child has started."""
    import psutil  # type: ignore[import-untyped] # DeepSpeed needs it too

    with suppress(psutil.NoSuchProcess):
        for node in psutil.Process(runner).children():
            for worker in node.children():
                worker.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
