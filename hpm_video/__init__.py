"""Hard Patches Mining for masked video and image modelling.

    import hpm_video

    model = hpm_video.load("runs/demo")
    features = model.features(clips)

What is listed in ``__all__`` is the public API; it is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpm_video.api import Model, build_model, build_objective, load, load_config, train
    from hpm_video.files.plugins import register

__version__ = "0.1.0"
__all__ = ["Model", "build_model", "build_objective", "load", "load_config", "register", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "files.plugins" if name == "register" else "api"
        return getattr(import_module(f"hpm_video.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
