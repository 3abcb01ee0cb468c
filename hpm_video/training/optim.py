"""Optimizers, their learning rate over a run, and which parameters they decay."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpm_video.config.training import RecipeConfig
from hpm_video.training.progress import Progress

Tensors = dict[str, Tensor]
Groups = list[dict[str, Any]]
TOKENS = ("cls_token", "mask_token", "latent")
"""Learned tokens, by the last part of their names."""


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr_scale: Callable[[str], float] | None = None,
    also_decayed: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups of parameters that learn, of one weight decay and one share of the learning rate.

    ``lr_scale`` gives the share by the name of a parameter. Weights decay; biases, norms and tokens
    do not, but for those ``also_decayed``.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if lr_scale is None else lr_scale(name)
            is_token = name.split(".")[-1] in TOKENS
            decayed = name in also_decayed or (parameter.ndim > 1 and not is_token)
            groups.setdefault((decayed, scale), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[0] else 0.0, "lr_scale": key[1]}
        for key in sorted(groups, reverse=True)
    ]


def layer_decay_of(
    layer_of: Callable[[str], int], num_layers: int, decay: float
) -> Callable[[str], float]:
    """Share of the learning rate by depth, as VideoMAE and BEiT fine-tune: 1 for the last layer.

    The patch embedding is layer 0, block k layer k + 1, norm and head the last.
    """
    return lambda name: decay ** (num_layers - 1 - layer_of(name))


def make_adamw(groups: Groups, *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW with eps 1e-8, whose fused form updates all parameters in one call."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": make_adamw,
    "sgd": lambda groups, betas: torch.optim.SGD(groups, lr=0.0, momentum=betas[0]),
}
"""Optimizers by ``recipe.optimizer``; their learning rate is set before every update."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate: linear warm-up from 0, then half a cosine, at the fractional epoch."""

    peak: float
    final: float
    warmup_epochs: float

    def at(self, progress: Progress) -> float:
        """The learning rate of the update that follows ``progress``."""
        epoch, epochs = progress.exact_epoch, progress.epochs
        if epoch < self.warmup_epochs:
            return self.peak * epoch / self.warmup_epochs
        done = min((epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-9), 1.0)
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * done))


def schedule_of(recipe: RecipeConfig) -> Schedule:
    """The schedule of a recipe, whose rates are for 256 videos per update (Goyal et al., 2017)."""
    scale = recipe.batch_size / 256
    return Schedule(recipe.base_lr * scale, recipe.min_lr * scale, recipe.warmup_epochs)


@dataclass(frozen=True)
class OptimizerState:
    """What resuming needs beside the weights, whatever engine it is of."""

    step: int
    """Updates that were made; 0 of an optimizer that does not count."""
    moments: Mapping[str, Mapping[str, Tensor]]
    """Kind (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``) -> name of a parameter -> value."""


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerState:
    """The state of an optimizer whose parameters are not sharded, in the host's memory."""
    names: dict[Tensor, str] = {value: name for name, value in model.named_parameters()}
    step, moments = 0, dict[str, Tensors]()
    for parameter, values in optimizer.state.items():
        for kind, value in values.items():
            if kind == "step":
                step = int(value)
            elif value is not None:
                moments.setdefault(kind, {})[names[parameter]] = value.detach().cpu()
    return OptimizerState(step, moments)


def put_state(state: OptimizerState, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put a state into an optimizer whose parameters are not sharded."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    values = {}
    for place, name in enumerate(order):
        its_own = {kind: of[name] for kind, of in state.moments.items() if name in of}
        if its_own and state.step:
            its_own["step"] = torch.tensor(float(state.step))  # each has its own, which counts on
        if its_own:
            values[place] = its_own
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": values, "param_groups": groups})
