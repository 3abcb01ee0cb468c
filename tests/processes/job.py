"""Several small runs one after the other, in each process of a job: job.py CASES FOLDER

CASES is a JSON list. A case is a whole run by hpm_video.runs.pretraining or .finetuning, of which
nothing is replaced: listeners record what each process does in FOLDER/NAME-RANK.json.
"""

import gc
import itertools
import json
import logging
import math
import os
import signal
import sys
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from tiny_runs import TRACED
from torch import distributed
from torch.profiler import ProfilerActivity, profile

from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data import reading as dataset
from hpm_video.runs.finetuning import finetune
from hpm_video.runs.pretraining import pretrain
from hpm_video.training import fast
from hpm_video.training.deepspeed_engine import DeepSpeedEngine, import_deepspeed
from hpm_video.training.distributed import joined_processes
from hpm_video.training.engine import TorchEngine, batch_statistics
from hpm_video.training.run import Run
from hpm_video.training.stop import Interrupted

PROGRAMS = {"pretrain": (PretrainConfig, pretrain), "finetune": (FinetuneConfig, finetune)}


def replaced(owner, name, make):
    """While this is open, ``owner.name`` is what ``make`` makes of it."""
    return mock.patch.object(owner, name, make(getattr(owner, name)))


def listened(owner, name, look):
    """While this is open, ``look`` gets the arguments of each call of ``owner.name`` first."""

    def make(original):
        def call(*inputs, **options):
            look(*inputs)
            return original(*inputs, **options)

        return call

    return replaced(owner, name, make)


def files_of_batches(seen):
    """The files of every micro-batch."""
    seen["files"] = []
    return listened(Run, "note_failures", lambda _, batch: seen["files"].append(list(batch.files)))


def files_opened(seen):
    """Every file that is opened, in order, including those of validation clips."""
    seen["opened"] = []
    return listened(dataset, "open_video", lambda path, *_: seen["opened"].append(path))


@contextmanager
def reductions(seen):
    """The number of values in each reduction over the processes, for each pass of the second
    update, as gloo reports it to torch's profiler."""
    seen["reduced"] = []
    passes, running = itertools.count(1), []

    def begin(engine, *_):
        if engine.accumulate < next(passes) <= 2 * engine.accumulate:
            running.append(profile(activities=[ProfilerActivity.CPU], record_shapes=True))
            running[0].start()

    def end(original):
        def call(self):
            result = original(self)
            if running:
                distributed.barrier()  # gloo reports a reduction after the engine has its result
                running[0].stop()
                seen["reduced"].append(
                    [
                        sum(math.prod(shape) for shape in event.input_shapes)
                        for event in running.pop().events()
                        if event.name.startswith("gloo:") and "reduce" in event.name
                    ]
                )
            return result

        return call

    with ExitStack() as stack:
        for engine in (TorchEngine, DeepSpeedEngine):
            stack.enter_context(listened(engine, "__call__", begin))
            stack.enter_context(replaced(engine, "step", end))
        yield


@contextmanager
def whole_tensors(seen):
    """For every parameter that is gathered while a checkpoint is saved: its size, and how many
    values of others are still in memory."""
    seen["joined"] = []
    alive, saving = {}, []

    def join(original):
        def call(self, parameter):
            others = sum(alive.values())
            whole = original(self, parameter)
            if saving:
                number = len(seen["joined"])
                alive[number] = whole.numel()
                weakref.finalize(whole, alive.pop, number)
                seen["joined"].append([whole.numel(), others])
            return whole

        return call

    def save(original):
        def call(self, done, **options):
            saving.append(done)
            original(self, done, **options)
            saving.pop()

        return call

    with replaced(DeepSpeedEngine, "_join", join), replaced(Run, "save", save):
        yield


def settings(seen):
    """The settings that DeepSpeed ends up with."""

    def make(original):
        def call(self, *inputs, **options):
            original(self, *inputs, **options)
            engine = self._engine
            offloaded = (engine.zero_offload_optimizer(), engine.zero_offload_param())
            seen["settings"] = {
                "reduce_bucket_size": engine.zero_reduce_bucket_size(),
                "kept_whole_below": engine.zero_param_persistence_threshold(),
                "train_batch_size": engine.train_batch_size(),
                "gradient_clipping": engine.gradient_clipping(),
                "offload": [str(part.device) for part in offloaded],
            }

        return call

    return replaced(DeepSpeedEngine, "__init__", make)


def statistics(seen):
    """The running averages of batch norms after every update."""
    seen["statistics"] = []

    def look(run, *_):
        seen["statistics"].append([each.tolist() for each in batch_statistics(run.engine.model)])

    return listened(Run, "after_update", look)


def stop_after(update):
    """The last process of the job, and only that one, gets SIGTERM in ``update``."""
    is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

    def look(_, progress, *__):
        if progress.update == update and is_last:
            os.kill(os.getpid(), signal.SIGTERM)

    return listened(Run, "after_update", look)


LISTENERS = {
    "files": files_of_batches,
    "opened": files_opened,
    "reductions": reductions,
    "wholes": whole_tensors,
    "settings": settings,
    "statistics": statistics,
}


def run_case(case, processes):
    schema, program = PROGRAMS[case["program"]]
    seen = {}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(fast, "HOW", TRACED))
        for name in case["listen"]:
            stack.enter_context(LISTENERS[name](seen))
        if case["stop"] is not None:
            stack.enter_context(stop_after(case["stop"]))
        config = load_config(schema, Path(case["config"]), case["overrides"])
        try:
            program(config, processes)
        except Interrupted as stop:
            seen["interrupted"] = [str(stop), stop.exit_code]
    return seen


def main(cases, folder):
    import_deepspeed(torch.device("cpu"))
    gc.freeze()  # collecting garbage among all imported modules takes longer than an update
    with joined_processes() as processes:
        if processes.is_first:
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        for case in json.loads(Path(cases).read_text()):
            name = case["name"]
            sys.stderr.write(f"--- {name}, rank {processes.rank}\n")
            seen = run_case(case, processes)
            (Path(folder) / f"{name}-{processes.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
