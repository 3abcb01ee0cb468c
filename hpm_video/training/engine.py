"""How a loss becomes an update. The only thing the training loop knows about devices."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hpm_video.config.training import CompileMode
from hpm_video.training.device import AUTOCAST, Precision
from hpm_video.training.distributed import Processes
from hpm_video.training.ema import ema_update
from hpm_video.training.optim import OptimizerState, Tensors, put_state, state_of


@dataclass(eq=False)
class Runner:
    """Runs the forward pass of a model whose weights this process has in full."""

    model: nn.Module
    device: torch.device
    precision: Precision
    """Precision of activations. Weights are float32."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, for everything that a batch is put through."""
        dtype = AUTOCAST[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward pass."""
        return self.model(*inputs, **options)


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """Running averages of batch norms, which each process takes of its own clips."""
    names = ("running_mean", "running_var")
    return [value for name, value in model.named_buffers() if name.endswith(names)]


class Engine(Runner, ABC):
    """Runs a model's forward pass, backward pass and optimizer step.

    One call of ``backward`` and one of ``step`` per micro-batch; ``step`` returns True when it
    updated the weights, which is every ``accumulate`` calls. The loss of an update is the mean over
    its micro-batches and over all processes. Methods that return complete weights or states are
    called by all processes; the first one gets them. Those that are not abstract are right for an
    engine whose processes all have all weights.
    """

    name: str
    """Name for the log."""
    compiled: CompileMode = "off"
    """What of the model was compiled before it was wrapped."""
    optimizer: Any
    """A ``torch.optim.Optimizer`` or a stand-in for one; the loop sets its ``lr``."""
    gradient_norm: Tensor
    """() norm of the gradient of the last update, before it was clipped."""

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        accumulate: int = 1,
        precision: Precision = "fp32",
        processes: Processes = Processes(),  # noqa: B008 - it is frozen
    ) -> None:
        """Take a model that is on ``device`` already."""
        super().__init__(model, device, precision)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.accumulate = accumulate
        self.processes = processes
        self.gradient_norm = torch.zeros((), device=device)
        self._statistics = batch_statistics(model)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch, as its share of the update."""

    @abstractmethod
    def step(self) -> bool:
        """Update the weights once the last micro-batch of an update is done."""

    def shard(self, module: nn.Module) -> None:  # noqa: B027 - nothing to do
        """Shard a module as the model's weights are sharded."""

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield ``module``, or a copy of it, with all weights: any process can call it alone."""
        yield module

    def ema_update(self, module: nn.Module, model: nn.Module, momentum: float) -> None:
        """Move the weights of a module that was sharded towards the model's by ``1 - momentum``."""
        ema_update(module.parameters(), model.parameters(), momentum)

    def weights(self, module: nn.Module) -> Tensors:
        """Return all weights of a module, in the memory of the host of the first process."""
        return on_first(self.processes, module.state_dict().items())

    def optimizer_state(self) -> OptimizerState:
        """What resuming needs beside the weights; no moments on others than the first process."""
        first = self.processes.is_first
        return state_of(self.optimizer, self.model) if first else OptimizerState(0, {})

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Go on where :meth:`optimizer_state` was taken, by any engine."""
        put_state(state, self.optimizer, self.model)

    def _norm_of_gradients(self) -> Tensor:
        return nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )


def on_first(processes: Processes, values: Iterable[tuple[str, Tensor]]) -> Tensors:
    """Bring tensors into the host's memory one after the other; none on others than the first."""
    kept = {}
    for name, value in values:
        if processes.is_first:
            kept[name] = value.detach().cpu()
        del value  # before the next one is put together
    return kept


class TorchEngine(Engine):
    """Plain torch, in any number of processes. The default, and the reference for any other."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad: float | None = None,
        **common: Any,
    ) -> None:
        """Take a model, the optimizer of its parameters, and what :class:`Engine` takes."""
        super().__init__(model, **common)
        self.name = "plain torch" if self.processes.count == 1 else "plain torch, DDP"
        self._runner: Any = model
        self._is_replicated = self.processes.count > 1
        if self._is_replicated:
            self._runner = nn.parallel.DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.optimizer = optimizer
        self._clip_grad = clip_grad
        self._micro_steps = 0

    @override
    def __call__(self, *inputs: Any, **options: Any) -> Any:
        is_last = (self._micro_steps + 1) % self.accumulate == 0
        # Gradients are averaged over the processes once per update, with its last micro-batch.
        apart: Any = nullcontext if is_last or not self._is_replicated else self._runner.no_sync
        with apart():
            return self._runner(*inputs, **options)

    @override
    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss / self.accumulate)

    @override
    def step(self) -> bool:
        self._micro_steps += 1
        if self._micro_steps % self.accumulate:
            return False
        self.gradient_norm = self._norm_of_gradients()
        if self._clip_grad is not None:
            nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self._clip_grad, self.gradient_norm
            )
        self.optimizer.step()
        # DDP keeps the memory of gradients anyway; others beside it would be made otherwise.
        self.optimizer.zero_grad(set_to_none=not self._is_replicated)
        self.processes.average_(self._statistics)
        return True
