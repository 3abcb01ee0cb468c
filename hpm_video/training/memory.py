"""What training keeps in memory: by formula for the state, by a run without data for the rest.

The formulas follow from ZeRO (Rajbhandari et al., SC 2020, section 3) and from what DeepSpeed
0.19.8 really holds, which is more: the tests compare them with its tensors.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WHOLE_GRADIENT = 500_000_000
"""Elements that DeepSpeed's stage 0 copies together to reduce them; no setting changes it."""
BYTES = 4
"""Size of a value: weights, gradients and each of Adam's two moments are float32."""
Parts = dict[str, float]


class TrainingMemory(NamedTuple):
    """Bytes that one process keeps on its device and on the host, by part; without activations."""

    device: Parts
    host: Parts


def training_memory(
    parameters: int, teacher: int, processes: int, zero: Mapping[str, Any] | None = None
) -> TrainingMemory:
    """Compute what a student and a teacher with so many parameters keep, at the most of an update.

    ``zero``: the section zero_optimization of DeepSpeed's configuration; without it, plain torch.
    For several forward passes per update. In stages 1 and 2 a process has all weights, and the
    master copy of its partition. Stage 1 sums all gradients and reduces them through a bucket, then
    copies its partition out. Stage 2 has the sum of its partition, and as much again: of the pass
    that ends, or for the optimizer. In stage 3 the teacher is sharded alike; not all at once, the
    teacher is gathered; the student is, and the bucket copied to be reduced; the gradient of the
    partition is copied for the optimizer.
    """
    weights, ema = BYTES * parameters, BYTES * teacher
    if zero is None or zero["stage"] == 0:
        # DDP's gradients are views of its buckets; DeepSpeed's stage 0 copies them to reduce them.
        buffers = 0 if zero is None else min(weights, BYTES * WHOLE_GRADIENT)
        return TrainingMemory(_parts(weights, 0, 2 * weights, weights, ema, buffers), {})
    stage, own, share = zero["stage"], weights / processes, ema / processes
    bucket = BYTES * zero["reduce_bucket_size"]  # allocated, however small the model
    offloads, offloads_weights = (
        zero.get(f"offload_{what}", {}).get("device", "none") != "none"
        for what in ("optimizer", "param")
    )
    if stage < 3:
        if not offloads:
            gradients, buffers = (weights, max(bucket, own)) if stage == 1 else (2 * own, bucket)
            return TrainingMemory(_parts(weights, own, 2 * own, gradients, ema, buffers), {})
        # On the host: the gradient of the master copy, in stage 2 also the sum over passes, and the
        # buffer through which new weights return.
        return TrainingMemory(
            _parts(weights, 0, 0, weights if stage == 1 else 0, ema, bucket),
            _parts(0, own, 2 * own, own if stage == 1 else 2 * own, 0, own),
        )
    # A smaller model stays gathered from its forward to its backward pass; what is gathered ahead
    # is copied once more on arrival.
    live = BYTES * max(zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"])
    prefetch = BYTES * zero["stage3_prefetch_bucket_size"]
    passes = max(min(weights, live) + min(weights, prefetch) + min(weights, bucket), ema)
    on, off = ((0, 0), (own, share)) if offloads_weights else ((own, share), (0, 0))
    if offloads:
        return TrainingMemory(
            _parts(on[0], 0, 0, 0, on[1], bucket + passes),
            _parts(off[0], own, 2 * own, 2 * own, off[1], 0),
        )
    device = _parts(on[0], own, 2 * own, own, on[1], bucket + max(passes, own))
    return TrainingMemory(device, _parts(off[0], 0, 0, 0, off[1], 0))


def _parts(*sizes: float) -> Parts:
    names = ("weights", "master", "moments", "gradients", "teacher", "buffers")
    return dict(zip(names, sizes, strict=True))


def describe_memory(memory: TrainingMemory, activations: float) -> str:
    """Tabulate what each process keeps, in GB of 10^9 bytes."""
    device = {**memory.device, "activations": activations}
    host = {name: memory.host.get(name, 0.0) for name in device}
    device["together"], host["together"] = sum(device.values()), sum(host.values())
    lines = [f"{'GB of each process':20}{'device':>10}{'host':>10}"]
    for name, size in device.items():
        if size or host[name]:
            lines.append(f"{name:20}{size / 1e9:10.2f}{host[name] / 1e9:10.2f}")
    return "\n".join(lines)


class SimulatedMemory(NamedTuple):
    """Bytes that an update needs in one process that holds everything."""

    resident: int
    """Between updates: weights, teacher, moments, the batch."""
    peak: int
    """The most during an update."""

    @property
    def activations(self) -> int:
        """What comes and goes in an update. With few clips, that is the gradients."""
        return self.peak - self.resident


def activation_bytes(measured: Mapping[int, SimulatedMemory]) -> tuple[float, float]:
    """What forward passes keep, by two simulations: -> per clip, and besides (bfloat16 weights)"""
    (few, first), (many, second) = sorted(measured.items())
    per_clip = (second.activations - first.activations) / (many - few)
    return per_clip, first.activations - few * per_clip


def simulate_update(make_update: Callable[[], Callable[[], object]]) -> SimulatedMemory:
    """Make an update and run it twice on tensors that have shapes and no data.

    It must be for a CPU, unless there is a GPU here: autograd asks the device itself.
    """
    with without_data():
        return measure_update(make_update)


@contextmanager
def without_data() -> Iterator[None]:
    """Let tensors have shapes alone. To ask one for a value is an error."""
    mode: Any = FakeTensorMode()  # type: ignore[no-untyped-call]
    mode.__deepcopy__ = lambda _: mode  # a teacher is a deep copy of a student
    # It would remember each tensor by a weak reference, and ``Module.to`` refuses those.
    mode.fake_tensor_converter.set_tensor_memo = lambda *_: None
    with mode, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


def measure_update(make_update: Callable[[], Callable[[], object]]) -> SimulatedMemory:
    """Make an update and run it twice, with what tensors really hold."""
    with LiveStorages() as live:
        update = make_update()
        update()  # makes the optimizer's states
        gc.collect()
        resident = live.peak = live.now
        update()
        return SimulatedMemory(resident, live.peak)


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is entered, not those inside an operation.

    (The MemTracker of torch 2.11 fails where a module is frozen, as a teacher is.)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        place = id(storage)
        if place in self._alive:
            return
        size = storage.nbytes()

        def freed(_: object) -> None:
            del self._alive[place]
            self.now -= size

        self._alive[place] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
