"""Weights put into a model, and how files of them fail."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from hpm_video.files.errors import ExpectedError

OF_ANOTHER_PROJECT = (
    "If it is of another project: python tools/weights.py import FILE FOLDER, and then "
    "init_weights=FOLDER"
)


class CheckpointError(ExpectedError, RuntimeError):
    """A checkpoint that cannot be written, read or used. The message says why and what to do."""


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: Path,
    *,
    may_lack: tuple[str, ...] = (),
    may_leave: tuple[str, ...] = (),
) -> list[str]:
    """Put ``weights`` into ``module``. -> the parameters they lack, which keep what they had.

    Raises:
        CheckpointError: a parameter is missing whose name does not begin with one of
            ``may_lack``, one is left over whose name does not begin with one of ``may_leave``, or
            shapes differ. Every such name is given.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    wrong = [f"missing {name}" for name in missing if not name.startswith(may_lack)]
    wrong += [
        f"left over {name}"
        for name in weights
        if name not in own and not name.startswith(may_leave)
    ]
    wrong += [
        f"{name} has shape {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        embedding = [name for name in own if name == "patch_embed.proj.weight"] or [*own]
        ours = any(name in weights and weights[name].ndim == own[name].ndim for name in embedding)
        raise CheckpointError(
            f"the weights of {source} do not fit the model of this config:\n  "
            + "\n  ".join(wrong)
            + ("" if ours else f"\n{OF_ANOTHER_PROJECT}")
        )
    module.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return missing
