"""DeepSpeed's ZeRO as an engine: optimizer, gradients and weights sharded over processes.

Stage 0 shards nothing, 1 the optimizer's moments, 2 the gradients as well, 3 the weights as well
(Rajbhandari et al., "ZeRO", SC 2020). What an update computes is what :class:`TorchEngine` does.
The only user of deepspeed.
"""

import copy
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.training import EngineConfig
from hpm_video.training.device import EngineError, Precision
from hpm_video.training.distributed import make_sure_of_group
from hpm_video.training.ema import ema_update
from hpm_video.training.engine import Engine, on_first
from hpm_video.training.optim import OptimizerState, Tensors

Settings = dict[str, Any]
USUAL: Settings = {
    "steps_per_print": None,
    "zero_allow_untested_optimizer": True,  # SGD
    "zero_force_ds_cpu_optimizer": False,
    # Or gradients of matrix products would be averaged in bfloat16, which DDP does not do.
    "torch_autocast": {"lower_precision_safe_modules": []},
    "zero_optimization": {
        # Elements. DeepSpeed's own sizes (500, 50, 1000 and 1000 million) are made for models of
        # many thousand million parameters: buffers would hold more than all of a ViT-H, and stage 3
        # would keep its weights gathered from the forward to the backward pass.
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 20_000_000,
        "stage3_max_live_parameters": 60_000_000,
        "stage3_max_reuse_distance": 60_000_000,
    },
}
"""What the user's file may change."""


class DeepSpeedEngine(Engine):
    """ZeRO of any stage, in float32 or with autocast to bfloat16. Weights stay float32."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        how: EngineConfig,
        plan: BatchPlan,
        *,
        clip_grad: float | None = None,
        **common: Any,
    ) -> None:
        """Take what :class:`TorchEngine` takes; an EngineError says what DeepSpeed does not."""
        super().__init__(model, accumulate=plan.accumulate, **common)
        self.stage = how.stage
        self.name = f"DeepSpeed, ZeRO stage {self.stage}"
        self._settings = settings_of(how, plan, clip_grad=clip_grad, precision=self.precision)
        self._deepspeed = import_deepspeed(self.device)
        self._skeleton = model
        if self.stage == 3:  # a copy without weights
            empty = {
                id(p): nn.Parameter(p.new_empty(0), p.requires_grad) for p in model.parameters()
            }
            self._skeleton = copy.deepcopy(model, memo=dict(empty))
        make_sure_of_group()
        self._deepspeed.init_distributed(dist_init_required=False)
        with _linear_layers_by(F.linear):
            try:
                self._engine: Any = self._deepspeed.initialize(
                    model=model, optimizer=optimizer, config=self._settings
                )[0]
            except torch.OutOfMemoryError:
                raise
            except (AssertionError, ValueError, RuntimeError) as error:
                raise EngineError(f"DeepSpeed does not take these settings: {error}") from error
            self.optimizer = self._engine.optimizer
            self._linear = F.linear  # in stage 3 DeepSpeed's own, put there for the whole process

    @override
    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with _linear_layers_by(self._linear):
            return self._engine(*inputs, **options)

    @override
    def backward(self, loss: Tensor) -> None:
        with _linear_layers_by(self._linear):  # it may compute activations again
            self._engine.backward(loss)

    @override
    def step(self) -> bool:
        is_last = bool(self._engine.is_gradient_accumulation_boundary())
        if is_last and self.stage == 0:
            self.gradient_norm = self._norm_of_gradients()
        self._engine.step()
        if not is_last:
            return False
        if self.stage > 0:
            norm = self._engine.get_global_grad_norm()
            if self.optimizer.overflow:  # it has left the weights as they are
                norm = float("nan")
            self.gradient_norm = torch.as_tensor(norm, device=self.device, dtype=torch.float32)
        if self.stage == 3:  # blocks that are computed again leave entries there
            del self._deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK[1:]
        self.processes.average_(self._statistics)
        return True

    @override
    def shard(self, module: nn.Module) -> None:
        if self.stage == 3:
            with _linear_layers_by(F.linear):
                self._deepspeed.zero.Init(module=module, config_dict_or_path=self._settings)

    @override
    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[nn.Module]:
        if self.stage < 3:
            yield module
        elif module is self.model:
            skeleton = self._skeleton.train(module.training)
            places = dict(chain(skeleton.named_buffers(), skeleton.named_parameters()))
            for name, value in self._gathered_weights(module):
                places[name].data = value
            yield skeleton.to(self.device)
            for parameter in skeleton.parameters():
                parameter.data = parameter.data.new_empty(0)
        else:
            with self._deepspeed.zero.GatheredParameters(list(module.parameters())):
                yield module

    @override
    def ema_update(self, module: nn.Module, model: nn.Module, momentum: float) -> None:
        average, current = (
            [getattr(parameter, "ds_tensor", parameter) for parameter in each.parameters()]
            for each in (module, model)
        )
        ema_update(average, current, momentum)

    @override
    def weights(self, module: nn.Module) -> Tensors:
        return on_first(self.processes, self._gathered_weights(module))

    @override
    def optimizer_state(self) -> OptimizerState:
        if self.stage == 0:
            return super().optimizer_state()
        self._link_moments()
        state = next(iter(self.optimizer.optimizer.state.values()), {})
        moments = {
            kind: on_first(self.processes, self._gathered_moments(kind))
            for kind, value in state.items()
            if kind != "step" and value is not None
        }
        return OptimizerState(int(state.get("step", 0)), moments)

    @override
    def load_optimizer_state(self, state: OptimizerState) -> None:
        if self.stage == 0:
            super().load_optimizer_state(state)
            return
        zero, stage_3 = self.optimizer, self.stage == 3
        # What its inner optimizer updates on this process.
        for flat in (
            zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
        ):
            values: dict[str, Any] = {kind: torch.zeros_like(flat) for kind in state.moments}
            if state.step:
                values["step"] = torch.tensor(float(state.step), device=flat.device)
            zero.optimizer.state[flat] = values
        self._link_moments()
        for kind, of_parameters in state.moments.items():
            for name, parameter in self.model.named_parameters():
                if name in of_parameters:
                    self._put_moment(parameter, of_parameters[name].to(self.device), kind)

    def _link_moments(self) -> None:
        """Link parameters to their moments. DeepSpeed does that once, after the first group."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _put_moment(self, parameter: nn.Parameter, value: Tensor, kind: str) -> None:
        tools = self._deepspeed.utils
        if self.stage < 3:
            tools.safe_set_full_optimizer_state(parameter, value, kind)
            return
        length = tools.safe_get_local_optimizer_state(parameter, kind).numel()
        padded = F.pad(value.flatten(), (0, length * self.processes.count - value.numel()))
        own = padded[length * self.processes.rank :][:length]
        tools.safe_set_local_optimizer_state(parameter, own, kind)

    def _gathered_weights(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights, one by one; all processes must take all of them."""
        for name, value in module.state_dict(keep_vars=True).items():
            yield name, self._join(value) if hasattr(value, "ds_tensor") else value

    def _gathered_moments(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        moment_of = self._deepspeed.utils.safe_get_full_optimizer_state
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, moment_of(parameter, kind)

    def _join(self, parameter: Any) -> Tensor:
        joined = self.processes.gather_shards(parameter.ds_tensor.detach())
        return joined[: parameter.ds_numel].view(parameter.ds_shape)


def settings_of(
    how: EngineConfig, plan: BatchPlan, *, clip_grad: float | None, precision: Precision
) -> Settings:
    """Return the configuration that DeepSpeed gets.

    Raises:
        EngineError: the user's file cannot be read, or contradicts the run.
    """
    own = {} if how.deepspeed is None else _read_settings(Path(how.deepspeed).expanduser())
    decided: Settings = {
        "train_batch_size": plan.batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulate,
        "gradient_clipping": clip_grad or 0.0,  # it clips at 1 unless told otherwise
        "optimizer": {"type": None},  # it gets the recipe's
        "scheduler": {"type": None},
        "zero_optimization": {
            "stage": how.stage,
            # With a smaller ratio, a part of the optimizer's state could not be saved.
            "offload_optimizer": {"device": "none" if how.offload == "none" else "cpu", "ratio": 1},
            "offload_param": {"device": "cpu" if how.offload == "all" else "none"},
            # These shard or round weights in a way that a teacher cannot follow.
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": False,
        },
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }
    return _merged(_merged(USUAL, own), decided, refuse=True)


def _read_settings(path: Path) -> Settings:
    """Read the user's file, without what it leaves open as ``auto``."""

    def given(part: Settings) -> Settings:
        return {key: value for key, value in part.items() if value != "auto"}

    try:
        own = json.loads(path.read_text(encoding="utf-8"), object_hook=given)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read engine.deepspeed={path}: {error}") from error
    if not isinstance(own, dict):
        raise EngineError(f"engine.deepspeed={path} must hold a JSON object")
    return own


def _merged(below: Settings, above: Settings, *, refuse: bool = False, at: str = "") -> Settings:
    """Return the settings of both. Where they differ ``above`` wins, or that is refused."""
    merged = dict(below)
    for key, value in above.items():
        there = below.get(key, value)
        if isinstance(value, dict) and isinstance(there, dict):
            merged[key] = _merged(there, value, refuse=refuse, at=f"{at}{key}.")
        elif refuse and there != value:
            raise EngineError(
                f"engine.deepspeed says {at}{key}={there!r}, and the run {value!r}; leave it out "
                'of the file (or write "auto"): it follows from the recipe, the number of '
                "processes and engine.micro_batch, precision, zero_stage and offload of the config"
            )
        else:
            merged[key] = value
    return merged


@contextmanager
def _linear_layers_by(function: Any) -> Iterator[None]:
    """Let ``nn.Linear`` compute by ``function``, and afterwards as before."""
    before = F.linear
    F.linear = function
    try:
        yield
    finally:
        F.linear = before


def import_deepspeed(device: torch.device) -> Any:
    """Import the library, with its log at warnings.

    Raises:
        EngineError: it is not installed, does not import, or would take another device.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except Exception as error:
        raise EngineError(
            f"engine.name=deepspeed needs the package deepspeed, which does not import here "
            f"({error}): pip install --no-build-isolation deepspeed==0.19.8; or take "
            f"engine.name=torch, which computes the same"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = deepspeed.accelerator.get_accelerator()
    kind, number = accelerator.device_name(), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type != kind or device.index not in (None, number):  # it chooses by itself
        raise EngineError(
            f"DeepSpeed computes on {kind}:{number} here, not on engine.device={device}; take "
            f"engine.device=auto, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    # It would be compiled at the start of the first run on a CPU, and gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
