"""Loading of weights into a model, and the error of checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from hpm_video.files.errors import ExpectedError

OF_ANOTHER_PROJECT = (
    "If it is of another project: python tools/weights.py import FILE FOLDER, and then "
    "init_weights=FOLDER"
)


class CheckpointError(ExpectedError, RuntimeError):
    """A checkpoint that cannot be written, read or used. The message says why and what to do."""


def misfits(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    may_lack: tuple[str, ...] = (),
    may_leave: tuple[str, ...] = (),
    called: Callable[[str], str] = str,
) -> list[str]:
    """Return the weights that are missing, left over or of another shape than a model's own.

    Those are allowed to whose names begin with one of ``may_lack`` or ``may_leave``. ``called``:
    what a user calls a weight.
    """
    wrong = [
        f"missing {called(name)}"
        for name in own
        if name not in weights and not name.startswith(may_lack)
    ]
    for name, value in weights.items():
        shape = tuple(value.shape)
        if name not in own and not name.startswith(may_leave):
            wrong.append(f"left over {called(name)}")
        elif name in own and value.shape != own[name].shape:
            wrong.append(f"{called(name)} has shape {shape}, the model's {tuple(own[name].shape)}")
    return wrong


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
        CheckpointError: some do not fit, see :func:`misfits`. Every such name is given.
    """
    own = module.state_dict()
    if wrong := misfits(own, weights, may_lack=may_lack, may_leave=may_leave):
        embedding = [name for name in own if name == "patch_embed.proj.weight"] or [*own]
        ours = any(name in weights and weights[name].ndim == own[name].ndim for name in embedding)
        raise CheckpointError(
            f"the weights of {source} do not fit the model of this config:\n  "
            + "\n  ".join(wrong)
            + ("" if ours else f"\n{OF_ANOTHER_PROJECT}")
        )
    module.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return [name for name in own if name not in weights]
