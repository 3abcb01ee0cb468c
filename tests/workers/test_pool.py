import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import alive

from hpm_video.workers.pool import GIB, Limits, Lost, Pool, PoolError, PoolStopped
from hpm_video.workers.process import serve

pytestmark = pytest.mark.slow

WORK = """
    import ctypes
    import os
    import time
    from pathlib import Path

    import numpy as np
    import torch

    def work(job):
        match job:
            case "hang":
                hang()
            case ("hang", folder):
                Path(folder, f"{os.getpid()}.hangs").touch()
                hang()
            case "abort":
                os.abort()
            case "segfault":
                ctypes.string_at(0)
            case "exit":
                os._exit(3)
            case "eat":
                eaten = []
                while True:
                    eaten.append(np.ones(2**22, np.uint8))
            case "eat with torch":
                return torch.ones(2**40, dtype=torch.uint8)
            case "bug":
                raise ZeroDivisionError("a bug")
            case ("many", count):
                return ((i, np.full(1000, i, np.uint8)) for i in range(count))
            case ("hang after", count):
                return hang_after(count)
            case ("wait", folder):  # until there is a file "open"
                Path(folder, str(os.getpid())).touch()
                while not Path(folder, "open").exists():
                    time.sleep(0.01)
                return os.getpid()
            case ("long", text):
                return text[::-1]
        return {"tensor": torch.full((5, 200), job), "array": np.arange(job), "job": job}

    class EndsAsItIsRead:
        def __reduce__(self):
            return os._exit, (7,)

    def hang():  # in native code that holds the interpreter's lock
        ctypes.PyDLL(None).sleep(10**6)

    def hang_after(count):
        for i in range(count):
            yield i, np.zeros(1, np.uint8)
        hang()
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The work of a pool, which has to come from a module."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "work_of_a_pool.py").write_text(textwrap.dedent(WORK))
    sys.path.insert(0, str(folder))
    import work_of_a_pool

    yield work_of_a_pool.work
    sys.path.remove(str(folder))


def over(pool, jobs):
    """The single result of each job, with its index in ``jobs``, in order of arrival."""
    for place, job in enumerate(jobs):
        pool.submit(place, job)
    for _ in jobs:
        answer = pool.next()
        yield answer.tag, answer.result


def pool_of(work, workers=2, seconds=1e9, memory=GIB, **options):
    return Pool(work, workers, Limits(seconds, memory), **options)


def waiting(folder):
    """The processes that wait for a file ``open`` in the folder."""
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def pids_of(pool, workers, folder):
    """The processes of a pool, found while all of them are busy."""
    for place in range(workers):
        pool.submit(place, ("wait", folder))
    while len(waiting(folder)) < workers:
        time.sleep(0.01)
    (folder / "open").touch()
    return {pool.next().result for _ in range(workers)}


@pytest.mark.parametrize("result_bytes", [0, 100, 10_000])
def test_results_come_back_whole(work, result_bytes):
    jobs = [*range(1, 20), 3000]
    with pool_of(work, result_bytes=result_bytes) as pool:
        found = dict(over(pool, jobs))
    for place, job in enumerate(jobs):
        assert torch.equal(found[place]["tensor"], torch.full((5, 200), job))
        assert np.array_equal(found[place]["array"], np.arange(job))
    found[0]["tensor"].add_(1)  # they can be written to


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ("abort", "the process that decoded it ended by SIGABRT"),
        ("segfault", "the process that decoded it ended by SIGSEGV"),
        ("exit", "the process that decoded it ended with exit code 3"),
        ("eat", "it needs more memory than a process that decodes may have"),
        ("eat with torch", "it needs more memory than a process that decodes may have"),
    ],
)
def test_a_job_that_takes_its_process_down_is_named_and_the_others_are_done(
    work, tmp_path, job, reason
):
    jobs = [1, 2, job, 3, 4, 5, 6]
    with pool_of(work, memory=GIB // 4) as pool:
        found = dict(over(pool, jobs))
        assert found[2] == Lost("", reason)
        assert [found[place]["job"] for place in (0, 1, 3, 4, 5, 6)] == [1, 2, 3, 4, 5, 6]
        assert len(pids_of(pool, 2, tmp_path)) == 2, "all processes are back"


def test_a_job_that_hangs_is_named_when_the_others_are_done(work, tmp_path, pool_clock):
    with pool_of(work, seconds=1.0, depth=1) as pool:
        answers = over(pool, ["hang", 1, 2, 3, 4])
        assert sorted(place for place, _ in islice(answers, 4)) == [1, 2, 3, 4]
        pool_clock.steps = repeat(0.5)
        assert next(answers) == (0, Lost("", "it took longer than 1 s"))
        pool_clock.steps = iter(())
        assert len(pids_of(pool, 2, tmp_path)) == 2, "both processes are back"


def test_the_clock_is_that_of_the_machine(work):
    """Only tested here: on a very busy machine a job that does not hang would be late."""
    with pool_of(work, workers=1, seconds=0.5) as pool:
        assert dict(over(pool, ["hang"])) == {0: Lost("", "it took longer than 0.5 s")}


def test_many_bad_jobs_one_after_another(work):
    jobs = ["abort", "exit"] * 5 + [7]
    with pool_of(work) as pool:
        found = dict(over(pool, jobs))
    assert [isinstance(found[place], Lost) for place in range(11)] == [True] * 10 + [False]


def test_a_job_may_have_many_results(work):
    with pool_of(work) as pool:
        pool.submit("a", ("many", 30))
        pool.submit("b", ("many", 30))
        found = {"a": [], "b": []}
        ended = set()
        while ended != {"a", "b"}:
            answer = pool.next()
            found[answer.tag].append(answer.result)
            ended |= {answer.tag} if answer.is_last else set()
    for results in found.values():
        assert [number for number, _ in results] == list(range(30))
        assert all((array == number).all() for number, array in results)


def test_each_of_many_results_has_its_own_time(work, pool_clock):
    """Each takes half a second, more than a second in all; the last one never comes."""
    with pool_of(work, workers=1, seconds=1.0) as pool:
        pool.submit(0, ("hang after", 10))
        for number in range(9):
            pool_clock.steps = iter([0.0, 0.5])
            assert pool.next().result[0] == number
        pool_clock.steps = repeat(0.5)
        assert pool.next().result == Lost("", "it took longer than 1 s")


@pytest.mark.parametrize("length", [10**4, 10**5, 3 * 10**6])
def test_jobs_and_results_that_a_pipe_does_not_hold(work, length):
    jobs = [("long", str(i) + "-" * length) for i in range(12)]
    with pool_of(work) as pool:
        found = dict(over(pool, jobs))
    assert [found[place][-len(str(place)) :][::-1] for place in range(12)] == [
        str(place) for place in range(12)
    ]


def test_jobs_behind_one_that_hangs(work, pool_clock):
    """One fits into the pipe of the hanging process, and one is too long for it."""
    with pool_of(work, workers=1, seconds=1.0) as pool:
        answers = over(pool, ["hang", 3, ("long", "-" * 10**6)])
        pool_clock.steps = repeat(0.5)
        assert next(answers) == (0, Lost("", "it took longer than 1 s"))
        pool_clock.steps = iter(())
        found = dict(answers)
    assert found[1]["job"] == 3
    assert len(found[2]) == 10**6


def kill_all():
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)


def test_a_process_that_is_killed_from_outside_is_no_fault_of_its_job(work, tmp_path):
    with pool_of(work, workers=1) as pool:
        list(over(pool, [1]))
        for attempts in (1, 2):
            folder = tmp_path / str(attempts)
            folder.mkdir()
            pool.submit("waits", ("wait", folder), attempts=attempts)
            while not waiting(folder):
                time.sleep(0.01)
            kill_all()
            (folder / "open").touch()
            result = pool.next().result
            assert isinstance(result, Lost) == (attempts == 1)
        pool.submit("crashes", "abort", attempts=2)
        assert isinstance(pool.next().result, Lost)


def test_a_process_that_is_killed_between_two_results(work):
    with pool_of(work, workers=1) as pool:
        pool.submit("many", ("many", 5), attempts=2)
        assert pool.next().result[0] == 0
        kill_all()  # it has sent the next result, or is about to
        answers = [pool.next()]
        while not answers[-1].is_last:
            answers.append(pool.next())
        assert isinstance(answers[-1].result, Lost), "a job that has begun is not started again"


def test_processes_that_do_not_start_end_the_run(work):
    broken = sys.modules[work.__module__].EndsAsItIsRead()
    message = r"did not start, 3 times: .* ended with exit code 7.*data\.workers=0"
    with pytest.raises(PoolError, match=message), pool_of(broken, workers=2) as pool:
        list(over(pool, [1, 2, 3]))
    assert not multiprocessing.active_children()


def test_an_error_of_the_work_ends_the_run_with_its_traceback(work):
    with pool_of(work) as pool, pytest.raises(PoolError, match=r"ZeroDivisionError: a bug"):
        list(over(pool, ["bug"]))


def test_time_in_which_the_run_stands_still_does_not_count(work, tmp_path, pool_clock):
    def sleeping():  # as a machine does for a while, between two readings of the clock
        yield 0.0
        yield 1000.0
        (tmp_path / "open").touch()

    with pool_of(work, workers=1, seconds=2.0) as pool:
        list(over(pool, [1]))
        pool.submit("slow", ("wait", tmp_path))
        pool_clock.steps = sleeping()
        assert isinstance(pool.next().result, int)
    assert pool_clock.now == 1000.0


def test_stopped_from_another_thread(work):
    with pool_of(work, workers=1) as pool:
        pool.submit(0, "hang")
        pool.stop()
        with pytest.raises(PoolStopped):
            pool.next()


def test_nothing_is_left_after_it(work, tmp_path):
    with pool_of(work) as pool:
        pids = pids_of(pool, 2, tmp_path)
        pool.submit(0, "hang")
    assert not any(map(alive, pids))
    assert not multiprocessing.active_children()


RUN = """
    import signal
    import sys
    import time
    from pathlib import Path

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    sys.path.insert(0, sys.argv[1])
    folder = Path(sys.argv[2])
    from work_of_a_pool import work
    from hpm_video.workers.pool import Limits, Pool

    # No guard of __main__: the processes must not run this again.
    with Pool(work, 3, Limits(1e9, 2**28)) as pool:
        for job in ("wait", "hang"):
            for _ in range(3):
                pool.submit(0, (job, folder))
        while len(list(folder.iterdir())) < 3:
            time.sleep(0.01)
        (folder / "open").touch()
        pids = {pool.next().result for _ in range(3)}
        while len(list(folder.glob("*.hangs"))) < 3:
            time.sleep(0.01)
        print(*pids, flush=True)
        print(pool.next())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_that_hang_end_with_the_run(work, number, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(RUN))
    (tmp_path / "gate").mkdir()
    command = [
        sys.executable,
        str(script),
        str(Path(sys.modules["work_of_a_pool"].__file__).parent),
        str(tmp_path / "gate"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(alive, pids))
        run.send_signal(number)
        run.wait()
    while any(map(alive, pids)):
        time.sleep(0.05)


def test_a_process_that_gets_ready_after_the_pool_was_closed_ends_in_silence(capfd):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    run, watched = context.Pipe()
    room = context.RawArray("B", 8)
    ours.close()
    process = context.Process(target=serve, args=(theirs, watched, room, 8, abs, GIB, []))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""
    run.close()
