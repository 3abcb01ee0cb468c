"""Optimizers, and which parameters they decay and how fast they train them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    """Groups of parameters of one weight decay and one share of the learning rate (``lr_scale``).

    Weights decay; biases, norms and tokens do not, but for tokens whose names are in
    ``also_decayed``. Parameters that do not learn are in no group. ``lr_scale`` gives the share by
    the name of a parameter; without it, all learn alike.
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
    """Share of the learning rate by depth: decay^(num_layers - 1 - layer), 1 for the last layer.

    VideoMAE and BEiT fine-tune so: the patch embedding is layer 0, block k layer k + 1, norm and
    head the last.
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
