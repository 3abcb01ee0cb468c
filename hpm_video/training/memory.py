"""What training keeps in memory: by formula for the state, by a run without data for the rest.

Weights, gradients, moments and teacher are all float32, whatever activations are computed in. How
much of them a process keeps follows from ZeRO (Rajbhandari et al., "ZeRO: Memory Optimizations
Toward Training Trillion Parameter Models", SC 2020, section 3 and table 1) and from what DeepSpeed
0.19.8 really holds, which is more; the tests hold both against the source.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WHOLE_GRADIENT = 500_000_000
"""Elements that DeepSpeed's stage 0 copies together to reduce them; no setting changes it."""


@dataclass(frozen=True)
class BytesPerParameter:
    """Of the state of a mixed or a plain training with Adam."""

    weights: int
    gradients: int
    master: int
    """Of a float32 copy that the optimizer updates."""
    moments: int
    """Adam's two."""


FP32 = BytesPerParameter(weights=4, gradients=4, master=0, moments=8)
"""What our training needs."""
DEEPSPEED_FP32 = BytesPerParameter(weights=4, gradients=4, master=4, moments=8)
"""What ZeRO has of it: a master copy, also where the weights are float32 already."""
MIXED_FP16 = BytesPerParameter(weights=2, gradients=2, master=4, moments=8)
"""The paper's example: 2 + 2 + K bytes with K = 12."""


def zero_bytes(parameters: int, processes: int, stage: int, per: BytesPerParameter) -> float:
    """Of the state on each device, by the formulas of table 1 of the ZeRO paper.

    Stage 1 shares out the optimizer's states, stage 2 also gradients, stage 3 also weights.
    """
    kinds = (per.weights, per.gradients, per.master + per.moments)
    shared = (stage >= 3, stage >= 2, stage >= 1)
    return parameters * sum(
        kind / processes if is_shared else kind
        for kind, is_shared in zip(kinds, shared, strict=True)
    )


@dataclass(frozen=True)
class Buckets:
    """Sizes of DeepSpeed's buffers, in elements."""

    reduce: int
    """``reduce_bucket_size``: a buffer of so many gradients is allocated, however small the
    model."""
    live: int
    """``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``: a model that is smaller
    stays gathered from its forward to its backward pass."""
    prefetch: int
    """``stage3_prefetch_bucket_size``: gathered ahead, and copied once more on arrival."""


DEEPSPEED_BUCKETS = Buckets(reduce=500_000_000, live=1_000_000_000, prefetch=50_000_000)
"""Where a config says nothing."""


@dataclass(frozen=True)
class Sharding:
    """How the state is spread over processes, and what of it is kept in the memory of the host."""

    processes: int
    zero_stage: int | None
    """0 to 3; none: plain torch, where every process holds everything. Gradients are views of
    DDP's own buckets (``gradient_as_bucket_view``)."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    buckets: Buckets = DEEPSPEED_BUCKETS

    def __post_init__(self) -> None:
        stage = self.zero_stage
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        if stage not in (None, 0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage must be 0, 1, 2 or 3, got {stage}")
        if self.offload_optimizer and stage not in (1, 2, 3):
            raise ValueError(
                f"the optimizer is offloaded in ZeRO stages 1 to 3, got engine.zero_stage={stage}; "
                f"take one of those, or keep it on the device"
            )
        if self.offload_parameters and stage != 3:
            raise ValueError(
                f"parameters are offloaded in ZeRO stage 3, got engine.zero_stage={stage}; take "
                f"that, or keep them on the device"
            )


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
        """All of it."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """By name, in bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class TrainingMemory:
    """What one process keeps on its device and on the host, apart from activations."""

    device: StateBytes
    host: StateBytes


def training_memory(parameters: int, teacher: int, sharding: Sharding) -> TrainingMemory:
    """Of a student and a teacher with so many parameters, at the most of an update.

    For several forward passes per update; one alone needs less where gradients are shared out.
    """
    stage = sharding.zero_stage
    if stage is None:
        return TrainingMemory(
            StateBytes(
                weights=FP32.weights * parameters,
                moments=FP32.moments * parameters,
                gradients=FP32.gradients * parameters,
                teacher=FP32.weights * teacher,
            ),
            host=StateBytes(),
        )
    if stage == 0:
        plain = training_memory(parameters, teacher, Sharding(sharding.processes, None)).device
        copied = FP32.gradients * min(parameters, WHOLE_GRADIENT)
        return TrainingMemory(_with(plain, buffers=copied), StateBytes())
    if stage == 3:
        return _memory_of_stage_3(parameters, teacher, sharding)
    return _memory_of_stages_1_and_2(parameters, teacher, sharding)


def _memory_of_stages_1_and_2(parameters: int, teacher: int, sharding: Sharding) -> TrainingMemory:
    """Of ``stage_1_and_2.py``.

    A process has all weights, and beside them the master copy of its partition. Stage 1 sums whole
    gradients and reduces them through a bucket, then copies its partition out. Stage 2 has the sum
    of its partition, and as much again: of the pass that ends (``grads_in_partition``), or for the
    optimizer (``flatten``).
    """
    per, partition = DEEPSPEED_FP32, parameters / sharding.processes
    whole, own = per.gradients * parameters, per.gradients * partition
    bucket = per.gradients * sharding.buckets.reduce
    first, offload = sharding.zero_stage == 1, sharding.offload_optimizer
    device = StateBytes(weights=per.weights * parameters, teacher=per.weights * teacher)
    state = {"master": per.master * partition, "moments": per.moments * partition}
    if not offload:
        gradients, buffers = (whole, max(bucket, own)) if first else (2 * own, bucket)
        device = _with(device, gradients=gradients, buffers=buffers, **state)
        return TrainingMemory(device, StateBytes())
    # On the host: the gradient of the master copy, in stage 2 also the sum over passes, and the
    # buffer through which new weights return.
    device = _with(device, gradients=whole if first else 0, buffers=bucket)
    gradients = own if first else 2 * own
    host = StateBytes(gradients=gradients, buffers=per.weights * partition, **state)
    return TrainingMemory(device, host)


def _memory_of_stage_3(parameters: int, teacher: int, sharding: Sharding) -> TrainingMemory:
    """Of ``stage3.py``, with a teacher that is shared out alike, and gathered when it is asked.

    The master copy is one here too: that the float32 shard could be taken instead is meant there,
    but a device is compared with its name, and these are never equal. Not all at once: the teacher
    is gathered; the student is, and the bucket copied to be reduced; the gradient of the partition
    is copied for the optimizer.
    """
    per, buckets = DEEPSPEED_FP32, sharding.buckets
    partition = parameters / sharding.processes
    own, bucket = per.gradients * partition, per.gradients * buckets.reduce
    reduced = per.gradients * min(parameters, buckets.reduce)
    gathered = per.weights * (min(parameters, buckets.live) + min(parameters, buckets.prefetch))
    passes = max(gathered + reduced, per.weights * teacher)
    shards = {
        "weights": per.weights * partition,
        "teacher": per.weights * teacher / sharding.processes,
    }
    state = {"master": per.master * partition, "moments": per.moments * partition}
    device, host = StateBytes(), StateBytes()
    if sharding.offload_parameters:
        host = _with(host, **shards)
    else:
        device = _with(device, **shards)
    if sharding.offload_optimizer:
        device = _with(device, buffers=bucket + passes)
        host = _with(host, gradients=2 * own, **state)
    else:
        device = _with(device, gradients=own, buffers=bucket + max(passes, own), **state)
    return TrainingMemory(device, host)


def _with(state: StateBytes, **more: float) -> StateBytes:
    return StateBytes(**{**state.parts, **more})


def describe_memory(memory: TrainingMemory, activations: float) -> str:
    """A table of what each process keeps, in GB of 10^9 bytes, for the terminal."""
    device = memory.device.parts | {"activations": activations}
    host = memory.host.parts | {"activations": 0.0}
    rows = [(name, device[name], host[name]) for name in device if device[name] or host[name]]
    rows.append(("together", sum(device.values()), sum(host.values())))
    lines = [f"{'GB of each process':20}{'device':>10}{'host':>10}"]
    lines += [f"{name:20}{on / 1e9:10.2f}{off / 1e9:10.2f}" for name, on, off in rows]
    return "\n".join(lines)


# --- A run without data -------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedMemory:
    """What an update needs in one process that holds everything."""

    resident: int
    """Bytes between updates: weights, teacher, moments, the batch."""
    peak: int
    """Most bytes during an update."""

    @property
    def activations(self) -> int:
        """What comes and goes in an update. With few clips, that is the gradients."""
        return self.peak - self.resident


@dataclass(frozen=True)
class ActivationBytes:
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
        """Of a pass of so many clips."""
        return self.fixed + self.per_clip * clips


def simulate_update(make_update: Callable[[], Callable[[], None]]) -> SimulatedMemory:
    """Make an update and run it twice on tensors that have shapes and no data.

    Nothing of their size is allocated, whatever the size of the model. The update must be for a
    CPU, unless there is a GPU here: autograd asks the device itself.
    """
    with _without_data():
        return measure_update(make_update)


def measure_update(make_update: Callable[[], Callable[[], None]]) -> SimulatedMemory:
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

    Memory inside of an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def forget_peak(self) -> int:
        """Look for the peak from now on. -> the bytes that are held now"""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],  # noqa: ARG002
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and note what it made."""
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
        """Copies of tensors stay in the same mode."""
        return self


@contextmanager
def _without_data() -> Iterator[None]:
    """Every tensor that is made has a shape, a type, a device, and no data."""
    mode = _OneFakeMode()
    # It would remember each tensor by a weak reference, and ``Module.to`` refuses those.
    mode.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign]
    with mode, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield
