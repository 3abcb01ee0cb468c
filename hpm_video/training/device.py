"""Which device a run uses, and in which precision."""

import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch

from hpm_video.files.errors import ExpectedError

Precision = Literal["fp32", "bf16"]
AUTOCAST: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}

PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 835,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
}
"""TFLOP/s of dense bf16 matrix products by the data sheets, by words of a device's name."""


class EngineError(ExpectedError, RuntimeError):
    """An engine, its device or its processes cannot be used as asked."""


def choose_device(name: str, processes: int = 1) -> torch.device:
    """The device of that name, of a GPU the current one; ``auto``: an accelerator, else the CPU.

    Raises:
        EngineError: there is no such device here, or several processes would share it.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if processes > 1 and name not in ("cpu", "cuda"):
            raise RuntimeError(f"{processes} processes would share it")
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EngineError(
            f"engine.device={name} cannot be used here ({reason}); take auto, or cpu"
        ) from error
    return torch.device(name)


def time_updates(
    update: Callable[[], object], device: torch.device, *, warmup: int = 2, repeats: int = 5
) -> float:
    """Median seconds of one call of ``update``."""
    seconds = []
    for _ in range(warmup + repeats):
        wait_for(device)
        began = time.perf_counter()
        update()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warmup:])


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_flops(device: torch.device, precision: Precision) -> tuple[float, str]:
    """Return the FLOP/s that count as full use of a device, and where that is known from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    words = set(name.replace("-", " ").split())
    listed = [peak for key, peak in PEAKS.items() if words.issuperset(key.split())]
    if listed and precision == "bf16":
        return 1e12 * listed[0], f"the data sheet of {name}"
    size = 512 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device, dtype=AUTOCAST[precision])
    seconds = time_updates(lambda: matrix @ matrix, device)
    return 2 * size**3 / seconds, f"a product of two large matrices on {name}"


def inference_precision(device: torch.device) -> Precision:
    """bf16 on a GPU that is made for it, otherwise fp32."""
    is_gpu = device.type == "cuda"
    return "bf16" if is_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def choose_precision(
    device: torch.device, make_update: Callable[[Precision], Callable[[], object]]
) -> Precision:
    """bf16 where a GPU is made for it; on a CPU only if whole updates measure faster."""
    if device.type in ("cuda", "mps"):
        return inference_precision(device)
    full = time_updates(make_update("fp32"), device, warmup=1, repeats=3)
    half = make_update("bf16")
    if time_updates(half, device, warmup=1, repeats=1) > 1.5 * full:
        return "fp32"  # without instructions for it bf16 is many times slower
    return "bf16" if time_updates(half, device, warmup=0, repeats=3) < 0.9 * full else "fp32"
