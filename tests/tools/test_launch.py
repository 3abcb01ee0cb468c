"""The launchers, with real processes: small programs, most of them without torch."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import alive

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tools" / "launch.py"
# The launcher with other constants: it is never patient, or always.
LAUNCH_WITH = """
import sys
sys.path.insert(0, "tools")
import launch
launch.SETTLE, launch.ENDING = map(float, sys.argv[1:3])
sys.exit(launch.main(sys.argv[3:]))
"""
FOREVER = 1e9

WHO = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
# The processes of a job add up their ranks through sockets, since importing torch takes seconds.
# TOLD is what each of them writes down; REDUCE adds up with torch.
TOLD = """
import json, os, socket, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
found = {name: os.environ.get(name) for name in names}
found |= {"total": total(), "arguments": sys.argv[1:]}
open(os.environ["FOUND"] + f"/{os.environ['RANK']}.json", "w").write(json.dumps(found))
"""
MEET = (
    """
def total():
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        with socket.create_server(place) as server:
            others = [server.accept()[0] for _ in range(count - 1)]
            sums = 1 + sum(int(other.recv(9)) for other in others)
            for other in others:
                other.sendall(str(sums).encode())
        return sums
    while True:
        try:
            with socket.create_connection(place) as first:
                first.sendall(str(rank + 1).encode())
                return int(first.recv(9))
        except ConnectionRefusedError:
            time.sleep(0.02)
"""
    + TOLD
)
REDUCE = (
    """
def total():
    import torch
    from torch import distributed
    distributed.init_process_group("gloo")
    mine = torch.tensor([distributed.get_rank() + 1.0])
    if "KILLED" in os.environ and mine == 2:
        os.kill(os.getpid(), 9)
    distributed.all_reduce(mine)
    distributed.destroy_process_group()
    return mine.item()
"""
    + TOLD
)
# Counts how often it is asked to stop. With a HOLD, it then waits until that file exists.
STOPPABLE = """
import pathlib
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(number))
place = pathlib.Path(os.environ["FOUND"])
(place / f"ready{rank}").write_text(str(os.getpid()))
while not asked:
    time.sleep(0.02)
(place / f"stopping{rank}").write_text("yes")
while "HOLD" in os.environ and not pathlib.Path(os.environ["HOLD"]).exists():
    time.sleep(0.02)
(place / f"asked{rank}").write_text(str(len(asked)))
for number in (signal.SIGTERM, signal.SIGINT):  # a later one would interrupt the shutdown
    signal.signal(number, signal.SIG_IGN)
sys.exit({signal.SIGTERM: 75, signal.SIGINT: 130}[asked[0]])
"""


def with_usual_signals():
    """Tests ignore these signals if nohup or a background shell started them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def started():
    """Start launchers, and kill those of their processes that are left at the end."""
    launchers = []

    def start(command, **variables):
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("OMP_NUM_THREADS", "PYTHONPATH", "MASTER_ADDR", "MASTER_PORT")
        }
        launchers.append(
            subprocess.Popen(
                [str(part) for part in command],
                env=environment | {name: str(value) for name, value in variables.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=with_usual_signals,  # noqa: PLW1509 - no threads here
                cwd=variables.get("CWD", ROOT),
            )
        )
        return launchers[-1]

    yield start
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.terminate()  # it passes this on
        launcher.communicate()


def write_program(folder, text):
    path = folder / "program.py"
    path.write_text(text)
    return path


def finish(launcher):
    out, err = launcher.communicate()
    return launcher.returncode, out, err


def wait_for(path):
    """Wait for a file that another process writes. -> its content"""
    while not path.exists() or not path.read_text():
        time.sleep(0.02)
    return path.read_text()


def wait_for_looks(launcher):
    """Wait until a launcher has checked its processes and signals again: it sleeps in between."""

    def sleeps():
        status = Path(f"/proc/{launcher.pid}/status").read_text()
        return int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.M)[1])

    before = sleeps()
    while sleeps() < before + 3:
        time.sleep(0.02)


def wait_for_end(pid):
    while alive(pid):
        time.sleep(0.02)


def read_found(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


# --- One machine --------------------------------------------------------------------------------


def test_two_jobs_at_once(tmp_path, started):
    """Each process learns its rank, and neither job meets the other's processes."""
    program = write_program(tmp_path, MEET)
    jobs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        command = [sys.executable, LAUNCH, "--processes", 2, program, "a b", name]
        jobs.append(started(command, FOUND=tmp_path / name))
    for name, job in zip(("one", "two"), jobs, strict=True):
        assert finish(job) == (0, "", "")
        found = read_found(tmp_path / name)
        assert [one["RANK"] for one in found] == [one["LOCAL_RANK"] for one in found] == ["0", "1"]
        threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
        for one in found:
            assert one["total"] == 3
            assert one["arguments"] == ["a b", name]
            assert (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) == ("2", "2")
            assert one["OMP_NUM_THREADS"] == threads


def test_threads_that_are_given_stay(tmp_path, started):
    program = write_program(tmp_path, "import os; print(os.environ['OMP_NUM_THREADS'])")
    job = started([sys.executable, LAUNCH, "--processes", 1, program], OMP_NUM_THREADS=7)
    assert finish(job) == (0, "7\n", "")


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130])
def test_exit_code_is_the_programs(tmp_path, started, code):
    program = write_program(tmp_path, f"{WHO}sys.exit({code})")
    status, out, err = finish(started([sys.executable, LAUNCH, "--processes", 2, program]))
    assert (status, out) == (code, "")
    assert ("ended with code 1, and the job with it" in err) == (code == 1)
    assert (err == "") == (code != 1)  # a program reports a wrong input itself


# Writes down its process id, and can wait until the launcher notices that another one ended.
ENDS = f"""{WHO}
import pathlib
place = pathlib.Path(os.environ["FOUND"])
(place / f"new{{rank}}").write_text(str(os.getpid()))
os.replace(place / f"new{{rank}}", place / f"pid{{rank}}")

def pid_of(other):
    while not (place / f"pid{{other}}").exists():
        time.sleep(0.02)
    return int((place / f"pid{{other}}").read_text())

def wait_for_end_of(other):
    pid = pid_of(other)
    while os.path.exists(f"/proc/{{pid}}"):
        time.sleep(0.02)
"""


def launch_with(settle, ending, processes, program):
    return [sys.executable, "-c", LAUNCH_WITH, settle, ending, "--processes", processes, program]


def test_when_one_fails_the_others_may_report(tmp_path, started):
    text = "if rank == 1: sys.exit(3)\nwait_for_end_of(1)\nprint('the message')\nsys.exit(1)"
    program = write_program(tmp_path, ENDS + text)
    job = started(launch_with(FOREVER, FOREVER, 2, program), FOUND=tmp_path)
    status, out, err = finish(job)
    assert (status, out) == (3, "the message\n")
    assert "rank 1 of 2 (pid " in err
    assert "ended with code 3, and the job with it" in err


def test_when_one_fails_the_others_are_ended(tmp_path, started):
    program = write_program(tmp_path, ENDS + "if rank == 1: sys.exit(3)\nwait_for_end_of(0)")
    job = started(launch_with(0, FOREVER, 2, program), FOUND=tmp_path)
    status, _, err = finish(job)
    assert status == 3
    assert "ended with code 3, and the job with it" in err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_named_and_ends_the_job(tmp_path, started, number):
    """Another one ends first, as when it notices a broken connection early."""
    text = (
        "pid_of(2)\n"
        "if rank == 0: sys.exit(1)\n"
        f"if rank == 1: wait_for_end_of(0); os.kill(os.getpid(), {int(number)})\n"
        "wait_for_end_of(2)\n"
    )
    program = write_program(tmp_path, ENDS + text)
    job = started(launch_with(FOREVER, FOREVER, 3, program), FOUND=tmp_path)
    status, _, err = finish(job)
    assert status == 1
    who = f"rank 1 of 3 (pid {wait_for(tmp_path / 'pid1')} on {socket.gethostname()})"
    assert f"error: {who} was killed by {signal.Signals(number).name}" in err
    assert ("out-of-memory killer" in err) == (number == signal.SIGKILL)
    assert err.count("error:") == 1
    assert "Start the same command again: it resumes from the last checkpoint" in err
    wait_for_end(int(wait_for(tmp_path / "pid2")))


def test_kill_9_of_one_in_the_middle_of_a_collective(tmp_path, started):
    program = write_program(tmp_path, REDUCE)
    job = started([sys.executable, LAUNCH, "--processes", 2, program], FOUND=tmp_path, KILLED="yes")
    status, _, err = finish(job)
    assert status == 1
    assert "rank 1 of 2" in err.splitlines()[-1]
    assert "was killed by SIGKILL" in err.splitlines()[-1]


def test_others_that_do_not_end_are_killed(tmp_path, started):
    text = "if rank == 1: pid_of(0); os.kill(os.getpid(), 9)\nwait_for_end_of(0)"
    program = write_program(
        tmp_path, f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{ENDS}{text}"
    )
    job = started(launch_with(FOREVER, 0.1, 2, program), FOUND=tmp_path)
    status, _, err = finish(job)
    assert status == 1
    assert "rank 1 of 2" in err


# --- Being asked to stop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)]
)
def test_a_stop_is_passed_on_once(tmp_path, started, number, code):
    """Even if SIGTERM comes twice."""
    program = write_program(tmp_path, WHO + STOPPABLE)
    hold = tmp_path / "may end"
    job = started([sys.executable, LAUNCH, "--processes", 2, program], FOUND=tmp_path, HOLD=hold)
    for rank in (0, 1):
        wait_for(tmp_path / f"ready{rank}")
    job.send_signal(number)
    for rank in (0, 1):
        wait_for(tmp_path / f"stopping{rank}")
    if number == signal.SIGTERM:
        job.send_signal(number)
    wait_for_looks(job)
    hold.touch()
    status, _, err = finish(job)
    assert (status, err.count("the processes save and end")) == (code, 1)
    assert [(tmp_path / f"asked{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_ctrl_c_of_a_terminal_reaches_the_processes_once(tmp_path, started):
    """The terminal sends it to the whole process group."""
    program = write_program(tmp_path, WHO + STOPPABLE)
    hold = tmp_path / "may end"
    job = started([sys.executable, LAUNCH, "--processes", 2, program], FOUND=tmp_path, HOLD=hold)
    for rank in (0, 1):
        wait_for(tmp_path / f"ready{rank}")
    os.killpg(job.pid, signal.SIGINT)
    for rank in (0, 1):
        wait_for(tmp_path / f"stopping{rank}")
    wait_for_looks(job)
    hold.touch()
    assert finish(job)[0] == 130
    assert [(tmp_path / f"asked{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_a_stop_that_lasts_too_long(tmp_path, started):
    program = write_program(tmp_path, WHO + STOPPABLE)
    command = [sys.executable, LAUNCH, "--processes", 2, program]
    job = started(command, FOUND=tmp_path, HOLD="/never", HPM_GRACE=1)
    pids = [int(wait_for(tmp_path / f"ready{rank}")) for rank in (0, 1)]
    job.terminate()
    status, _, err = finish(job)
    assert status == 1
    assert "did not end in time; killed: rank 0, 1 on" in err
    assert "HPM_GRACE=SECONDS" in err
    assert not any(map(alive, pids))


def test_a_second_ctrl_c_ends_them_at_once(tmp_path, started):
    program = write_program(tmp_path, WHO + STOPPABLE)
    command = [sys.executable, LAUNCH, "--processes", 2, program]
    job = started(command, FOUND=tmp_path, HOLD="/never")
    pids = [int(wait_for(tmp_path / f"ready{rank}")) for rank in (0, 1)]
    job.send_signal(signal.SIGINT)
    for rank in (0, 1):
        wait_for(tmp_path / f"stopping{rank}")
    job.send_signal(signal.SIGINT)
    status, _, err = finish(job)
    assert status == 130
    assert "stopped by a second Ctrl-C" in err
    assert not any(map(alive, pids))


def test_the_first_may_save_while_others_have_ended(tmp_path, started):
    """The stop did not come through the launcher."""
    text = "if rank == 0: wait_for_end_of(1); print('saved')\nsys.exit(75)"
    program = write_program(tmp_path, ENDS + text)
    job = started([sys.executable, LAUNCH, "--processes", 2, program], FOUND=tmp_path)
    assert finish(job) == (75, "saved\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="by prctl, which Linux has")
def test_killing_the_launcher_stops_the_processes(tmp_path, started):
    program = write_program(tmp_path, WHO + STOPPABLE)
    job = started([sys.executable, LAUNCH, "--processes", 2, program], FOUND=tmp_path)
    pids = [int(wait_for(tmp_path / f"ready{rank}")) for rank in (0, 1)]
    job.kill()
    for pid in pids:
        wait_for_end(pid)
    assert (tmp_path / "asked0").read_text() == "1"


# --- Several machines ---------------------------------------------------------------------------


def test_two_nodes_on_one_machine(tmp_path, started, reserve_port):
    program = write_program(tmp_path, MEET)
    port = reserve_port()
    jobs = [
        started(
            [
                sys.executable,
                LAUNCH,
                "--processes",
                1,
                "--nodes",
                2,
                "--node-rank",
                rank,
                "--master-addr",
                "127.0.0.1",
                "--master-port",
                port,
                program,
            ],
            FOUND=tmp_path,
        )
        for rank in (0, 1)
    ]
    assert [finish(job) for job in jobs] == [(0, "", "")] * 2
    found = read_found(tmp_path)
    assert [(one["RANK"], one["LOCAL_RANK"], one["total"]) for one in found] == [
        ("0", "0", 3),
        ("1", "0", 3),
    ]


def test_torchrun_starts_the_same_programs(tmp_path, started):
    program = write_program(tmp_path, REDUCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = started([*command, "--nproc-per-node", 2, program], FOUND=tmp_path)
    assert finish(job)[0] == 0
    assert [one["total"] for one in read_found(tmp_path)] == [3, 3]


# --- Slurm --------------------------------------------------------------------------------------

# Starts the command once per node like srun, and returns the highest exit code.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >>"$FOUND/srun"
while [[ $1 == -* ]]; do
  if [[ $1 == --ntasks=* ]]; then count="${1#*=}"; fi
  shift
done
for ((node = 0; node < count; node++)); do
  SLURM_NODEID=$node "$@" &
  started+=("$!")
done
worst=0
for one in "${started[@]}"; do
  code=0; wait "$one" || code=$?
  if ((code > worst)); then worst=$code; fi
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '127.0.0.1\\n127.0.0.2\\n'; else echo "$@" >>"$FOUND/requeued"; fi
"""


@pytest.fixture
def slurm(tmp_path, started):
    """Run the Slurm script in a copy of the repository in which all programs are ``text``."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "tools", root / "tools")
    (root / "configs").mkdir()
    (root / "configs" / "mine.yaml").write_text("seed: 1\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\nif [[ $1 == -c ]]; then exit 0; fi\nexec "{sys.executable}" "$@"\n'
    )
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
    for name in ("python", "srun", "scontrol"):
        (tmp_path / name).chmod(0o755)

    def run(program, text, *arguments, **variables):
        for name in ("pretrain", "finetune"):
            (root / "tools" / f"{name}.py").write_text(text)
        spooled = shutil.copy(root / "tools" / "slurm" / "job.sbatch", tmp_path / "slurm_script")
        return started(
            ["bash", spooled, program, *arguments],
            HPM_PYTHON=python,
            FOUND=tmp_path,
            PATH=f"{tmp_path}:{os.environ['PATH']}",
            **{
                "SLURM_SUBMIT_DIR": root,
                "SLURM_JOB_ID": 20000 + os.getpid(),
                "SLURM_JOB_NODELIST": "node[0-1]",
                "SLURM_JOB_NUM_NODES": 1,
                "SLURM_GPUS_ON_NODE": 2,
                **variables,
            },
        )

    return run


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
@pytest.mark.parametrize("code", [0, 2, 75, 143])
def test_slurm_queues_a_stopped_run_again(slurm, tmp_path, program, code):
    text = f"{WHO}print(*sys.argv[1:]) if rank == 0 else 0\nsys.exit({code})"
    status, out, err = finish(slurm(program, text, "configs/mine.yaml", "a=b c"))
    assert status == code, err
    assert "configs/mine.yaml a=b c\n" in out
    requeued = tmp_path / "requeued"
    assert requeued.exists() == (code in (75, 143))
    if code in (75, 143):
        assert requeued.read_text() == f"requeue {20000 + os.getpid()}\n"


def test_slurm_stops_at_the_time_limit(slurm, tmp_path):
    """The signal goes to srun's processes (launchers and workers), but not to the script."""
    job = slurm("pretrain", WHO + STOPPABLE, "configs/mine.yaml", SLURM_CPUS_PER_TASK=3)
    pids = [int(wait_for(tmp_path / f"ready{rank}")) for rank in (0, 1)]
    launcher = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (launcher, *pids):
        os.kill(pid, signal.SIGTERM)
    status, _, err = finish(job)
    assert status == 75, err
    assert (tmp_path / "requeued").exists()
    assert "--cpus-per-task=3\n" in (tmp_path / "srun").read_text()


def test_slurm_cancelled_is_not_queued_again(slurm, tmp_path):
    """The script gets SIGTERM too, and ends without requeueing."""
    job = slurm("pretrain", WHO + STOPPABLE, "configs/mine.yaml")
    pids = [int(wait_for(tmp_path / f"ready{rank}")) for rank in (0, 1)]
    for pid in (job.pid, *pids):
        os.kill(pid, signal.SIGTERM)
    assert finish(job)[0] == -signal.SIGTERM
    for pid in pids:
        wait_for_end(pid)
    assert not (tmp_path / "requeued").exists()


def test_slurm_nodes_form_one_job(slurm, tmp_path):
    variables = {"SLURM_JOB_NUM_NODES": 2, "SLURM_GPUS_ON_NODE": 1}
    status, _, err = finish(slurm("pretrain", MEET, "configs/mine.yaml", **variables))
    assert status == 0, err
    found = read_found(tmp_path)
    assert [(one["RANK"], one["LOCAL_RANK"], one["total"]) for one in found] == [
        ("0", "0", 3),
        ("1", "0", 3),
    ]


def test_slurm_from_elsewhere(slurm, tmp_path):
    status, _, err = finish(slurm("pretrain", "", SLURM_SUBMIT_DIR=tmp_path))
    assert status == 2
    assert f"{tmp_path} is not the root of the repository" in err
