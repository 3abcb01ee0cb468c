"""Read a hostfile, and start a program on other machines by DeepSpeed's launcher.

DeepSpeed reaches them by pdsh and ssh without a password; repository, environment and data must lie
at the same paths there. It passes on PYTHONPATH, OMP_NUM_THREADS and what starts with HPM_, DS_,
NCCL_, GLOO_ or TORCH_; write other variables as lines "NAME=VALUE" of .deepspeed_env, here or in
the home folder. MASTER_ADDR and MASTER_PORT are used if they are set.
"""

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

OWN = ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "PYTHONUNBUFFERED")
PASSED_ON = (*OWN, "HPM_", "DS_", "NCCL_", "GLOO_", "TORCH_")
FORM = "write a line such as 'node0 slots=8'"
AGAIN = "Start the same command again: it goes on from the last checkpoint"
LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?")


def read_hostfile(path: Path, *, reach: bool = True) -> dict[str, int]:
    """Read machines, and the number of processes of each. ``reach``: they are to be reached.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no hostfile, or other machines cannot be reached.
    """
    hosts: dict[str, int] = {}
    lines = [line.strip() for line in path.read_text().splitlines()]
    for line in (line for line in lines if line and not line.startswith("#")):
        found = LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"{path}: {line!r} is no host; {FORM}")
        if found[1] in hosts:
            raise ValueError(f"{path} names {found[1]} twice; write one line for each machine")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ValueError(f"{path} names no host; {FORM}")
    missing = [name for name in ("pdsh", "ssh") if shutil.which(name) is None]
    if missing and reach and not is_here(hosts):
        raise ValueError(
            f"no program {' and '.join(missing)}, by which DeepSpeed reaches {', '.join(hosts)}. "
            "Install it (Debian: pdsh, openssh-client), or start on each machine with NNODES"
        )
    return hosts


def is_here(hosts: Mapping[str, int]) -> bool:
    """Return whether this machine is the only one."""
    name = socket.gethostname()
    return set(hosts) <= {"localhost", "127.0.0.1", name, name.partition(".")[0]}


def run_on_hosts(
    path: Path,
    hosts: Mapping[str, int],
    program: Sequence[str],
    threads: int,
    asked: Callable[[], signal.Signals | None],
) -> int:
    """Start the processes, wait for them, and pass a stop on once. -> the exit code

    ``threads`` of each process; ``asked``: which signal this launcher was sent.
    """
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if len(set(hosts.values())) == 1:
        environment.setdefault("LOCAL_WORLD_SIZE", str(max(hosts.values())))
    # One machine that is not this one would be taken for it without --force_multi.
    options = ["--quiet", "--no_local_rank", "--force_multi", "--hostfile", str(path)]
    options += ["--master_port", os.environ.get("MASTER_PORT", "29500")]
    if address := os.environ.get("MASTER_ADDR"):
        options += ["--master_addr", address]
    # For the shell of another machine; DeepSpeed itself quotes arguments with spaces.
    quoted = [text if " " in text else shlex.quote(text) for text in program[1:]]
    passed_on = False
    with tempfile.NamedTemporaryFile("w") as variables:
        variables.write(variables_of_nodes(environment))
        variables.flush()
        runner = subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *options, program[0], *quoted],
            env={**environment, "DS_ENV_FILE": variables.name},
            start_new_session=True,
        )
        while runner.poll() is None:
            time.sleep(0.05)
            if not passed_on and (number := asked()) is not None:
                passed_on = True
                sys.stderr.write(f"\n{number.name}: the processes save and end, within 30 s\n")
                runner.send_signal(signal.SIGTERM)
    code = runner.returncode
    if code < 0 or code > 192:  # the second is how DeepSpeed exits with minus a signal
        name = signal.Signals(-code if code < 0 else 256 - code).name
        sys.stderr.write(f"\nerror: a process was killed by {name}; the job is ended. {AGAIN}\n")
        return 1
    return code


def variables_of_nodes(environment: Mapping[str, str]) -> str:
    """Write the variables that DeepSpeed sets on other machines, with the user's own lines."""
    # DeepSpeed adds the root of the repository to PYTHONPATH, where `datasets` shadows a library.
    lines = [f"PYTHONPATH={environment.get('PYTHONPATH', '')}"]
    lines += [
        f"{name}={value}"
        for name, value in environment.items()
        if name.startswith(PASSED_ON) and name != "DS_ENV_FILE" and "\n" not in value
    ]
    for folder in (Path.home(), Path.cwd()):
        users = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if users.is_file():
            lines += [line for line in users.read_text().splitlines() if "=" in line]
    return "\n".join(lines) + "\n"
