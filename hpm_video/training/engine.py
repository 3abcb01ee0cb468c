"""How a loss becomes an update. The only thing the training loop knows about devices."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpm_video.training.device import AUTOCAST, Precision
from hpm_video.training.distributed import Processes
from hpm_video.training.optim import OptimizerState, Tensors, put_state, state_of


class Viewer(Protocol):
    """A model that is looked at: only its forward pass, of any number of clips."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of training."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward pass."""


@dataclass(frozen=True)
class WholeModel:
    """A viewer of a model that this process has all weights of."""

    model: nn.Module
    device: torch.device
    precision: Precision

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of training."""
        return autocast(self.device, self.precision)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward pass."""
        return self.model(*inputs, **options)


class Engine(Protocol):
    """Runs a model's forward pass, backward pass and optimizer step.

    One call of ``backward`` and one of ``step`` per micro-batch; ``step`` returns True when it
    updated the weights, which is every ``accumulate`` calls. The loss of an update is the mean over
    its micro-batches and over all processes. What returns whole weights or states is called by all
    processes; the first gets them.
    """

    device: torch.device
    model: nn.Module
    accumulate: int
    gradient_norm: Tensor
    """() of the last update, before it was clipped."""
    precision: Precision
    """What activations are computed in."""
    processes: Processes

    @property
    def name(self) -> str:
        """For the log."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, whose ``lr`` the loop sets."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, for everything that a batch is put through. Weights stay float32."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward pass."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch, as its share of the update."""

    def step(self) -> bool:
        """Update the weights once the last micro-batch of an update is done."""

    def hold(self, module: nn.Module) -> None:
        """Place a module that follows the model, as the model's weights are placed."""

    def whole(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        """``module``, or a copy of it, that any process can call alone."""

    def weights(self, module: nn.Module) -> Tensors:
        """All weights of a module in the host's memory; none on other processes than the first."""

    def optimizer_state(self) -> OptimizerState:
        """What resuming needs beside the weights; no moments on others than the first process."""

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Go on where :meth:`optimizer_state` was taken, by any engine."""


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """Running averages of batch norms, which each process takes of its own clips."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [
        value
        for norm in norms
        for value in (norm.running_mean, norm.running_var)
        if value is not None
    ]


class TorchEngine:
    """Plain torch, in any number of processes. The default, and the reference for any other."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        accumulate: int = 1,
        clip_grad: float | None = None,
        precision: Precision = "fp32",
        processes: Processes = Processes(),  # noqa: B008 - it is frozen
    ) -> None:
        """Take a model that is on ``device`` already, and the optimizer of its parameters."""
        self.model = model
        self.device = device
        self.accumulate = accumulate
        self.precision: Precision = precision
        self.processes = processes
        self.gradient_norm = torch.zeros((), device=device)
        self._runner = processes.replicate(model)
        self._statistics = batch_statistics(model)
        self._optimizer = optimizer
        self._clip_grad = clip_grad
        self._micro_steps = 0

    @property
    def name(self) -> str:
        """For the log."""
        return "plain torch" if self.processes.count == 1 else "plain torch, DDP"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, whose ``lr`` the loop sets."""
        return self._optimizer.param_groups

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, for everything that a batch is put through. Weights stay float32."""
        return autocast(self.device, self.precision)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward pass."""
        is_last = (self._micro_steps + 1) % self.accumulate == 0
        # Gradients are averaged over the processes once per update, with its last micro-batch.
        kept: AbstractContextManager[Any] = nullcontext()
        if isinstance(self._runner, nn.parallel.DistributedDataParallel) and not is_last:
            kept = self._runner.no_sync()
        with kept:
            return self._runner(*inputs, **options)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch, as its share of the update."""
        torch.autograd.backward(loss / self.accumulate)

    def step(self) -> bool:
        """Update the weights once the last micro-batch of an update is done."""
        self._micro_steps += 1
        if self._micro_steps % self.accumulate:
            return False
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm(gradients)
        if self._clip_grad is not None:
            nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self._clip_grad, self.gradient_norm
            )
        self._optimizer.step()
        # DDP keeps the memory of gradients anyway; others beside it would be made otherwise.
        is_replicated = isinstance(self._runner, nn.parallel.DistributedDataParallel)
        self._optimizer.zero_grad(set_to_none=not is_replicated)
        self.processes.average_(self._statistics)
        return True

    def hold(self, module: nn.Module) -> None:
        """Nothing to do: all processes have all weights."""

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module itself."""
        yield module

    def weights(self, module: nn.Module) -> Tensors:
        """All weights of a module in the host's memory; none on other processes than the first."""
        if not self.processes.is_first:
            return {}
        return {name: value.detach().cpu() for name, value in module.state_dict().items()}

    def optimizer_state(self) -> OptimizerState:
        """What resuming needs beside the weights; no moments on others than the first process."""
        if not self.processes.is_first:
            return OptimizerState(0, {})
        return state_of(self._optimizer, self.model)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Go on where :meth:`optimizer_state` was taken, by any engine."""
        put_state(state, self._optimizer, self.model)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Computes in ``precision`` what gains by it."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
