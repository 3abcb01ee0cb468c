"""How a loss becomes an update. The only thing the training loop knows about devices."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpm_video.training.device import Precision


class Engine(Protocol):
    """Runs a model's forward pass, backward pass and optimizer step.

    One call of ``backward`` and one of ``step`` per micro-batch; ``step`` returns True when it
    updated the weights, which is every ``accumulate`` calls.
    """

    device: torch.device
    model: nn.Module
    accumulate: int
    gradient_norm: Tensor
    """() of the last update, before it was clipped."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def autocast(self) -> AbstractContextManager[Any]: ...
    def __call__(self, *inputs: Any, **options: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> bool: ...
    def optimizer_state(self) -> dict[str, Any]: ...
    def load_optimizer_state(self, state: dict[str, Any]) -> None: ...


class TorchEngine:
    """Plain torch: one process, one device. The default, and the reference for any other."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        accumulate: int = 1,
        clip_grad: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Take a model that is on ``device`` already, and the optimizer of its parameters."""
        self.model = model
        self.device = device
        self.accumulate = accumulate
        self._optimizer = optimizer
        self._clip_grad = clip_grad
        self._autocast = autocast
        self._micro_steps = 0
        self.gradient_norm = torch.zeros((), device=device)

    @property
    def precision(self) -> Precision:
        """What activations are computed in."""
        return "fp32" if self._autocast is None else "bf16"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, whose ``lr`` the loop sets."""
        return self._optimizer.param_groups

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, for everything that a batch is put through. Weights stay float32."""
        enabled = self._autocast is not None
        return torch.autocast(self.device.type, self._autocast, enabled=enabled)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward pass."""
        return self.model(*inputs, **options)

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
        self._optimizer.zero_grad(set_to_none=True)
        return True

    def optimizer_state(self) -> dict[str, Any]:
        """What resuming needs beside the weights."""
        return self._optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`optimizer_state` was taken."""
        self._optimizer.load_state_dict(state)
