"""What training keeps in memory: by formula for the state, by a run without data for the rest.

How much of weights, gradients, moments and teacher a process keeps follows from ZeRO (Rajbhandari
et al., SC 2020, section 3) and from what DeepSpeed 0.19.8 really holds, which is more: the tests
compare the formulas with its tensors.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

WHOLE_GRADIENT = 500_000_000
"""Elements that DeepSpeed's stage 0 copies together to reduce them; no setting changes it."""
BYTES = 4
"""Size of a value: weights, gradients and each of Adam's two moments are float32."""


@dataclass(frozen=True)
class Sharding:
    """How the state is spread over processes, and what of it is kept in the memory of the host."""

    processes: int
    zero_stage: int | None
    """0 to 3; none: plain torch, where every process holds everything."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce: int = 500_000_000
    """Elements of DeepSpeed's buffers, here and below; by default its own. ``reduce_bucket_size``:
    a buffer of so many gradients is allocated, however small the model."""
    live: int = 1_000_000_000
    """``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``: a model that is smaller
    stays gathered from its forward to its backward pass."""
    prefetch: int = 50_000_000
    """``stage3_prefetch_bucket_size``: gathered ahead, and copied once more on arrival."""


@dataclass(frozen=True)
class StateBytes:
    """The parts of what one process keeps."""

    weights: float = 0
    master: float = 0
    moments: float = 0
    gradients: float = 0
    teacher: float = 0
    buffers: float = 0

    @property
    def total(self) -> float:
        return sum(map(float, asdict(self).values()))


class TrainingMemory(NamedTuple):
    """What one process keeps on its device and on the host, apart from activations."""

    device: StateBytes
    host: StateBytes = StateBytes()


def training_memory(parameters: int, teacher: int, sharding: Sharding) -> TrainingMemory:
    """Compute what a student and a teacher with so many parameters keep, at the most of an update.

    For several forward passes per update; one alone needs less where gradients are shared out.
    Stages 1 and 2 follow ``stage_1_and_2.py``: a process has all weights, and beside them the
    master copy of its partition. Stage 1 sums all gradients and reduces them through a bucket, then
    copies its partition out. Stage 2 has the sum of its partition, and as much again: of the pass
    that ends (``grads_in_partition``), or for the optimizer (``flatten``).
    """
    stage, weights, ema = sharding.zero_stage, BYTES * parameters, BYTES * teacher
    own, bucket = weights / sharding.processes, BYTES * sharding.reduce
    if stage in (None, 0):
        # DDP's gradients are views of its buckets; DeepSpeed's stage 0 copies them to reduce them.
        buffers = 0 if stage is None else min(weights, BYTES * WHOLE_GRADIENT)
        return TrainingMemory(StateBytes(weights, 0, 2 * weights, weights, ema, buffers))
    if stage == 3:
        return _memory_of_stage_3(weights, ema, sharding)
    if not sharding.offload_optimizer:
        gradients, buffers = (weights, max(bucket, own)) if stage == 1 else (2 * own, bucket)
        return TrainingMemory(StateBytes(weights, own, 2 * own, gradients, ema, buffers))
    # On the host: the gradient of the master copy, in stage 2 also the sum over passes, and the
    # buffer through which new weights return.
    return TrainingMemory(
        StateBytes(weights, 0, 0, weights if stage == 1 else 0, ema, bucket),
        StateBytes(0, own, 2 * own, own if stage == 1 else 2 * own, 0, own),
    )


def _memory_of_stage_3(weights: int, teacher: int, sharding: Sharding) -> TrainingMemory:
    """Follow ``stage3.py``, with a teacher that is shared out alike, and gathered when it is asked.

    The master copy is one here too: that the float32 shard could be taken instead is meant there,
    but a device is compared with its name, and these are never equal. Not all at once: the teacher
    is gathered; the student is, and the bucket copied to be reduced; the gradient of the partition
    is copied for the optimizer.
    """
    own = weights / sharding.processes
    sizes = sharding.reduce, sharding.live, sharding.prefetch
    bucket, live, prefetch = (BYTES * size for size in sizes)
    passes = max(min(weights, live) + min(weights, prefetch) + min(weights, bucket), teacher)
    shards = own, teacher / sharding.processes
    on, off = ((0, 0), shards) if sharding.offload_parameters else (shards, (0, 0))
    if sharding.offload_optimizer:
        device = StateBytes(on[0], teacher=on[1], buffers=bucket + passes)
        return TrainingMemory(device, StateBytes(off[0], own, 2 * own, 2 * own, off[1]))
    buffers = bucket + max(passes, own)
    device = StateBytes(on[0], own, 2 * own, own, on[1], buffers)
    return TrainingMemory(device, StateBytes(off[0], teacher=off[1]))


def describe_memory(memory: TrainingMemory, activations: float) -> str:
    """A table of what each process keeps, in GB of 10^9 bytes, for the terminal."""
    device = asdict(memory.device) | {"activations": activations}
    host = asdict(memory.host) | {"activations": 0.0}
    rows = [(name, device[name], host[name]) for name in device if device[name] or host[name]]
    rows.append(("together", sum(device.values()), sum(host.values())))
    lines = [f"{'GB of each process':20}{'device':>10}{'host':>10}"]
    lines += [f"{name:20}{on / 1e9:10.2f}{off / 1e9:10.2f}" for name, on, off in rows]
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


class ActivationBytes(NamedTuple):
    """What a forward pass keeps for the backward pass."""

    fixed: float
    """Independent of the clips: copies of the weights in bfloat16."""
    per_clip: float

    @classmethod
    def through(cls, measured: Mapping[int, SimulatedMemory]) -> "ActivationBytes":
        """The line through two simulations, by their numbers of clips."""
        (few, first), (many, second) = sorted(measured.items())
        per_clip = (second.activations - first.activations) / (many - few)
        return cls(first.activations - few * per_clip, per_clip)

    def of(self, clips: int) -> float:
        return self.fixed + self.per_clip * clips


def simulate_update(make_update: Callable[[], Callable[[], object]]) -> SimulatedMemory:
    """Make an update and run it twice on tensors that have shapes and no data.

    Nothing of their size is allocated, whatever the size of the model. The update must be for a
    CPU, unless there is a GPU here: autograd asks the device itself.
    """
    with without_data():
        return measure_update(make_update)


def count_flop(make_update: Callable[[], Callable[[], object]], *, with_data: bool = False) -> int:
    """Make an update and run it, by default without data. -> its FLOP, 2 per multiply-add

    Matrix products and convolutions count, and of attention its two products forward and four
    backward, whatever the kernels compute again.
    """
    tensors = nullcontext() if with_data else without_data()
    with tensors, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        make_update()()
    return int(counter.get_total_flops())


@contextmanager
def without_data() -> Iterator[None]:
    """Let tensors have shapes alone. To ask one for a value is an error."""
    mode = _OneFakeMode()
    # It would remember each tensor by a weak reference, and ``Module.to`` refuses those.
    mode.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign]
    with mode, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


def measure_update(make_update: Callable[[], Callable[[], object]]) -> SimulatedMemory:
    """The same with what tensors really hold."""
    with LiveStorages() as live:
        update = make_update()
        update()  # makes the optimizer's states
        gc.collect()
        resident = live.forget_peak()
        update()
        return SimulatedMemory(resident, live.peak)


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that tensors hold which were made while it was entered.

    Memory inside of an operation is not seen. (The MemTracker of torch 2.11 cannot take its place:
    it fails where a module is frozen, as a teacher is.)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def forget_peak(self) -> int:
        """Look for the peak from now on. -> the bytes held now"""
        self.peak = self.now
        return self.now

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


class _OneFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A mode whose tensors can be copied deeply, as a teacher is made of a student."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_OneFakeMode":
        return self
