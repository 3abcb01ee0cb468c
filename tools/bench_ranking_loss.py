"""What the ranking loss costs: python tools/bench_ranking_loss.py [--clips N] [--tokens N].

The package's form, which walks the pairs of tokens in blocks of rows, beside the plain one, which
holds B x M x M tensors. Each is measured in processes of its own, in turns, so that neither finds
memory that the other has already taken.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpm_video.mining.losses import ranking_loss
from hpm_video.training.device import choose_device, synchronise, time_updates

WARM_UP = (1, 16)
"""Clips and tokens of a first call, which loads what every call needs."""


@dataclass(frozen=True)
class Measurement:
    """What forward and backward of one form took."""

    seconds: float
    megabytes: float
    """Peak memory beyond what was there before."""
    loss: float


def plain_ranking_loss(scores: Tensor, errors: Tensor) -> Tensor:
    """The same loss, written down as it is defined: (B, M), (B, M) -> ()

    -log sigmoid(s_i - s_j), which is softplus(s_j - s_i), averaged over ordered pairs e_i > e_j.
    """
    counted = errors[:, :, None] > errors[:, None, :]
    wrong_by = scores[:, None, :] - scores[:, :, None]
    return (F.softplus(wrong_by) * counted).sum() / counted.sum().clamp(min=1)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": plain_ranking_loss,
    "blockwise": ranking_loss,
}


def main() -> int:
    """Measure, and print a table."""
    arguments = parse_arguments()
    try:
        device = choose_device(arguments.device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"peak memory can be measured on cpu and cuda, not on {device.type}")
        if min(arguments.clips, arguments.turns, arguments.repeats) < 1 or arguments.tokens < 2:
            raise ValueError("--clips, --turns and --repeats must be at least 1, --tokens 2")
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        if arguments.measure:
            print(json.dumps(asdict(measure(arguments, device))))
            return 0
        found = measure_in_turns(arguments)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(arguments, device, found)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time and peak memory of the ranking loss, forward and backward."
    )
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1412, help="hidden tokens of a clip")
    parser.add_argument("--turns", type=int, default=2, help="processes of each form")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of a process")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--measure", choices=FORMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_in_turns(arguments: argparse.Namespace) -> dict[str, Measurement]:
    """Medians over the turns of each form.

    Raises:
        RuntimeError: a process failed, say for want of memory.
    """
    turns: dict[str, list[Measurement]] = {name: [] for name in FORMS}
    for _ in range(arguments.turns):
        for name, measurements in turns.items():
            command = [sys.executable, *sys.argv, "--measure", name]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                reason = (process.stderr.strip().splitlines() or ["nothing was said"])[-1]
                raise RuntimeError(
                    f"the process of the {name} form ended with code {process.returncode} "
                    f"({reason}); where memory is short, take fewer --clips"
                )
            measurements.append(Measurement(**json.loads(process.stdout)))
    return {
        name: Measurement(
            seconds=statistics.median(m.seconds for m in measurements),
            megabytes=statistics.median(m.megabytes for m in measurements),
            loss=measurements[0].loss,
        )
        for name, measurements in turns.items()
    }


def measure(arguments: argparse.Namespace, device: torch.device) -> Measurement:
    """Forward and backward of one form, in this process. The first call counts the memory."""
    form = FORMS[arguments.measure]
    run(form, *draw(*WARM_UP, device))
    scores, errors = draw(arguments.clips, arguments.tokens, device)
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_bytes(device)
    loss = run(form, scores, errors)
    synchronise(device)
    used = peak_bytes(device) - before

    def again() -> None:
        run(form, scores, errors)

    seconds = time_updates(again, device, warmup=0, repeats=arguments.repeats)
    return Measurement(seconds, used / 1e6, float(loss))


def draw(clips: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scores and errors of tokens: -> 2 x (B, M), the same on every device"""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(clips, tokens, generator=generator)
    errors = torch.rand(clips, tokens, generator=generator)
    return scores.to(device).requires_grad_(), errors.to(device)


def run(form: Callable[[Tensor, Tensor], Tensor], scores: Tensor, errors: Tensor) -> Tensor:
    """Forward and backward. -> the loss"""
    scores.grad = None
    loss = form(scores, errors)
    torch.autograd.backward(loss)
    return loss.detach()


def peak_bytes(device: torch.device) -> int:
    """Most memory held at once so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_table(
    arguments: argparse.Namespace, device: torch.device, found: dict[str, Measurement]
) -> None:
    """Both forms, and how many times more the plain one takes."""
    plain, blockwise = found["plain"], found["blockwise"]
    print(
        f"{arguments.clips} clips x {arguments.tokens} tokens, forward and backward, {device.type} "
        f"with {torch.get_num_threads()} thread(s), medians of {arguments.turns} process(es)"
    )
    print(f"{'form':12}{'time':>12}{'peak memory':>16}{'loss':>12}")
    for name, one in found.items():
        print(f"{name:12}{one.seconds * 1e3:9.1f} ms{one.megabytes:13.1f} MB{one.loss:12.6f}")
    time_ratio = plain.seconds / blockwise.seconds
    memory_ratio = plain.megabytes / max(blockwise.megabytes, 0.1)
    print(f"{'ratio':12}{time_ratio:10.1f} x{memory_ratio:14.1f} x")


if __name__ == "__main__":
    sys.exit(main())
