"""Metrics of training: how they are measured, and the lines in which they are written."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpm_video.files.errors import ExpectedError
from hpm_video.training.distributed import Processes
from hpm_video.training.objective import Losses

log = logging.getLogger(__name__)


class NonFiniteLossError(ExpectedError, RuntimeError):
    """A loss or a gradient is not finite."""


class MetricsError(ExpectedError, ValueError):
    """A file of metrics cannot be read. The message gives the line and the remedy."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``, without a last line that was cut off.

    Raises:
        MetricsError: a line does not hold metrics.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines and not lines[-1].endswith("}"):
        del lines[-1]
    found = []
    for number, line in enumerate(lines, start=1):
        record: dict[str, Any] = {}
        with suppress(ValueError, TypeError):  # it is no JSON, or no object
            record = dict(json.loads(line))
        values = {**record}
        named, counted = type(values.pop("kind", None)) is str, type(values.get("update")) is int
        if not named or not counted or not {*map(type, values.values())} <= {int, float}:
            raise MetricsError(
                f"{path}, line {number} is {line[:60]!r}, and must be a JSON object with its kind, "
                f"the number of an update, and numbers; delete the line, or move the file away to "
                f"start without it"
            )
        if record.get("kind") == "held_out":  # as it was called one version ago
            record["kind"] = "validation"
        found.append(record)
    return found


class HostEvent:
    """A moment on the host, with the methods of ``torch.cuda.Event``."""

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, later: "HostEvent") -> float:
        return 1000 * (later._seconds - self._seconds)


class Meter:
    """Losses, speed and waiting between two lines of metrics.

    Sums stay on the device until :meth:`read` copies all of them at once; only :meth:`read` waits
    for the device. It gathers the sums of all processes, so all must call it.
    """

    def __init__(
        self,
        device: torch.device,
        processes: Processes = Processes(),  # noqa: B008 - it is frozen
        *,
        cost: Callable[[str, int], float] | None = None,
        peak: float = math.inf,
    ) -> None:
        """``cost``: FLOP per clip, by source and update; ``peak``: FLOP/s of the device."""
        self._device, self._processes, self._cost, self._peak = device, processes, cost, peak
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._files: dict[int, list[str]] = {}
        self._event: Callable[[], Any] = HostEvent
        if device.type == "cuda":
            self._event = partial(torch.cuda.Event, enable_timing=True)
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()  # not every batch has every loss
        self._clips, self._flop, self.left_out = 0, 0.0, 0.0
        self._waits: list[tuple[Any, Any]] = []
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this context in which the device is idle as waiting for data.

        A GPU that is still busy with earlier work reaches both events at the same time.
        """
        began, ended = self._event(), self._event()
        began.record()
        yield
        ended.record()
        self._waits.append((began, ended))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent in this context: validation, pictures, saving."""
        began = time.perf_counter()
        yield
        self.left_out += time.perf_counter() - began

    def add(self, update: int, losses: Losses, files: Sequence[str], source: str = "") -> None:
        """Take the losses of one micro-batch."""
        for name, value in {"loss": losses.total, **losses.parts}.items():
            self._add(name, value.detach())
        self._look_at(losses.total, update)
        self._files.setdefault(update, []).extend(files)
        self._clips += len(files)
        if self._cost is not None:
            self._flop += len(files) * self._cost(source, update)

    def add_update(self, update: int, gradient_norm: Tensor) -> None:
        """Take the norm of the gradient of an update."""
        self._look_at(gradient_norm, update)
        self._add("gradient_norm", gradient_norm)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] += 1

    def _look_at(self, value: Tensor, update: int) -> None:
        """Remember the first update in which a value was not finite."""
        bad = ~value.detach().isfinite() & (self._first_bad < 0)
        self._first_bad = torch.where(bad, update, self._first_bad)

    def check(self) -> None:
        """Make sure that every loss so far was finite.

        Raises:
            NonFiniteLossError: one was not. The message has the update and the files of its batch.
        """
        self._refuse_bad(int(self._first_bad))

    def _refuse_bad(self, own: int) -> None:
        found = [update for update in self._processes.gather([own]) if update >= 0]
        own_files, self._files = self._files, {}
        if found:
            update = min(found)
            files = self._processes.gather(own_files.get(update, []) if own == update else [])
            raise NonFiniteLossError(
                f"the loss or the gradient of update {update} is not a finite number; the last "
                f"checkpoint is from before. Try a lower recipe.base_lr, recipe.clip_grad, or "
                f"engine.precision=fp32. The files of its batch:\n  "
                + "\n  ".join(dict.fromkeys(files))
            )

    def read(self) -> dict[str, float]:
        """Read means since the last call, clips per second, and the share of time spent waiting.

        Waiting is that of the process that waits longest, since the others wait for it. On GPUs
        there are also the mean TFLOP/s of a GPU, their share of the peak (MFU), and the peak memory
        of tensors in any process, in GB of 10^9 bytes.
        """
        first_bad, *sums = torch.stack(
            [value.float() for value in (self._first_bad, *self._sums.values())]
        ).tolist()
        self._refuse_bad(int(first_bad))
        means = {
            name: (total, self._counts[name]) for name, total in zip(self._sums, sums, strict=True)
        }
        seconds = max(time.perf_counter() - self._began - self.left_out, 1e-9)
        waited = sum(began.elapsed_time(ended) for began, ended in self._waits) / 1000
        memory = 0
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        rates = self._clips / seconds, waited / seconds, self._flop / seconds, memory
        everyone = self._processes.gather([(means, rates)])
        self._restart()
        clips, waits, flops, memories = zip(*(rates for _, rates in everyone), strict=True)
        values = {
            name: sum(own[name][0] for own, _ in everyone)
            / sum(own[name][1] for own, _ in everyone)
            for name in means
        }
        values |= {"clips_per_second": sum(clips), "data_wait": max(waits)}
        if self._cost is not None:
            flops_of_one = sum(flops) / len(flops)
            values["tflops_per_gpu"], values["mfu"] = flops_of_one / 1e12, flops_of_one / self._peak
            values["peak_memory_gb"] = max(memories) / 1e9
        return values


class WaitingWarning:
    """Warns once, with a remedy, if a run waits for data in three lines of metrics in a row."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._in_a_row = -1  # the first line of a run does not count: workers start

    def look(self, data_wait: float) -> None:
        """Note the share of time spent waiting since the last line."""
        waits = data_wait > 0.3 or not 0 <= self._in_a_row < 3  # beyond 3 it counts silently
        self._in_a_row = self._in_a_row + 1 if waits else 0
        if self._in_a_row == 3:
            log.warning(
                "%.0f%% of the time goes into waiting for data. To see why, and how many "
                "data.workers would suffice: python tools/bench.py loader %s. If it is decoding, "
                "tools/transcode.py makes videos small and fast to read",
                100 * data_wait,
                self._config,
            )
