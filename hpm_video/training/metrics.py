"""Metrics of training: how they are measured, and the lines in which they are written."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpm_video.files.errors import ExpectedError
from hpm_video.training.distributed import Processes
from hpm_video.training.objective import Losses


class NonFiniteLossError(ExpectedError, RuntimeError):
    """A loss or a gradient is not finite."""


class MetricsError(ExpectedError, ValueError):
    """A file of metrics cannot be read. The message gives the line and the remedy."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``, if there is one, without a last one that was cut off.

    Raises:
        MetricsError: a line does not hold metrics.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines and not lines[-1].endswith("}"):
        del lines[-1]
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = dict(json.loads(line))
            kind, update = str(record.pop("kind")), int(record.pop("update"))
            _ = [float(value) for value in record.values()]
            found.append({"kind": kind, "update": update, **record})
        except (ValueError, TypeError, KeyError) as error:  # noqa: PERF203 - one ends it
            raise MetricsError(
                f"{path}, line {number} is {line[:60]!r}, and must be a JSON object with kind, "
                f"update and numbers; delete the line, or move the file away to start without it"
            ) from error
    return found


class HostEvent:
    """A moment on the host, in place of a ``torch.cuda.Event``."""

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, later: "HostEvent") -> float:
        return 1000 * (later._seconds - self._seconds)


class Meter:
    """Losses, speed and waiting between two lines of metrics.

    Sums stay on the device until :meth:`read`, which all processes must call, copies them at once.
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
        """Count the time in this context in which the device is idle as waiting for data."""
        # A GPU that is still busy with earlier work reaches both events at the same time.
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
        """Raise a NonFiniteLossError, with the batch's files, where a loss so far is not finite."""
        self._check(int(self._first_bad))

    def _check(self, own: int) -> None:
        found = [update for update in self._processes.gather([own]) if update >= 0]
        files, self._files = self._files, {}
        if found:
            update = min(found)
            listed = self._processes.gather(files.get(update, []) if own == update else [])
            raise NonFiniteLossError(
                f"the loss or the gradient of update {update} is not a finite number; the last "
                f"checkpoint is from before. Try a lower recipe.base_lr, recipe.clip_grad, or "
                f"engine.precision=fp32. The files of its batch:\n  "
                + "\n  ".join(dict.fromkeys(listed))
            )

    def read(self) -> dict[str, float]:
        """Read means since the last call, clips per second, and the share of time spent waiting.

        That is of the process that waits longest: the others wait for it. On GPUs there are also
        the mean TFLOP/s of one, their share of the peak (MFU), and the peak memory in any process,
        in GB of 10^9 bytes.
        """
        first_bad, *sums = torch.stack(
            [value.float() for value in (self._first_bad, *self._sums.values())]
        ).tolist()
        self._check(int(first_bad))
        counted = zip(sums, self._counts.values(), strict=True)
        own = dict(zip(self._sums, counted, strict=True))
        seconds = max(time.perf_counter() - self._began - self.left_out, 1e-9)
        waited = sum(began.elapsed_time(ended) for began, ended in self._waits) / 1000
        memory = 0
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        rates = self._clips / seconds, waited / seconds, self._flop / seconds, memory
        everyone = self._processes.gather([(own, rates)])
        self._restart()
        values = {}
        for name in own:
            totals, counts = zip(*(each[name] for each, _ in everyone), strict=True)
            values[name] = sum(totals) / sum(counts)
        clips, waits, flops, memories = zip(*(rates for _, rates in everyone), strict=True)
        values |= {"clips_per_second": sum(clips), "data_wait": max(waits)}
        if self._cost is not None:
            flops_of_one = sum(flops) / len(flops)
            values["tflops_per_gpu"], values["mfu"] = flops_of_one / 1e12, flops_of_one / self._peak
            values["peak_memory_gb"] = max(memories) / 1e9
        return values
