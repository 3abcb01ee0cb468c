"""DeepSpeed's ZeRO as an engine: optimizer, gradients and weights sharded over processes.

Stage 0 shards nothing, 1 the optimizer's moments, 2 the gradients as well, 3 the weights as well
(Rajbhandari et al., "ZeRO", SC 2020). What an update computes is what :class:`TorchEngine` does.
The only user of deepspeed.
"""

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.training import EngineConfig
from hpm_video.training.deepspeed_settings import settings_of
from hpm_video.training.distributed import make_sure_of_group
from hpm_video.training.ema import ema_update
from hpm_video.training.engine import Engine, EngineError, on_first
from hpm_video.training.optim import OptimizerState, Tensors


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
        """Take a model, the optimizer of its parameters, and what :class:`Engine` takes.

        Raises:
            EngineError: deepspeed is not installed, or does not take these settings.
        """
        super().__init__(model, accumulate=plan.accumulate, **common)
        self.stage = how.stage
        self.name = f"DeepSpeed, ZeRO stage {self.stage}"
        self._settings = settings_of(how, plan, clip_grad=clip_grad, precision=self.precision)
        self._deepspeed = import_deepspeed(self.device)
        self._skeleton = model
        if self.stage == 3:  # a copy without weights
            empty = {
                id(p): nn.Parameter(p.data.new_empty(0), p.requires_grad)
                for p in model.parameters()
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
        if self.stage < 3:
            super().ema_update(module, model, momentum)
            return
        both: Any = (module.parameters(), model.parameters())
        average, current = ([parameter.ds_tensor for parameter in held] for held in both)
        ema_update(average, current, momentum)

    @override
    def weights(self, module: nn.Module) -> Tensors:
        if self.stage < 3:
            return super().weights(module)
        return on_first(self.processes, self._gathered_weights(module))

    @override
    def optimizer_state(self) -> OptimizerState:
        if self.stage == 0:
            return super().optimizer_state()
        self._link_moments()
        states = list(self.optimizer.optimizer.state.values())
        step = int(states[0].get("step", 0)) if states else 0
        moments = {
            kind: on_first(self.processes, self._gathered_moments(kind))
            for kind, value in (states[0].items() if states else ())
            if kind != "step" and value is not None
        }
        return OptimizerState(step, moments)

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
        """Yield sharded parameters one by one; all processes must take all of them."""
        parameters: dict[str, Any] = dict(module.named_parameters())
        for name, value in module.state_dict().items():
            sharded = parameters.get(name)
            yield name, value if sharded is None else self._join(sharded.ds_tensor, sharded)

    def _gathered_moments(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        tools = self._deepspeed.utils
        for name, parameter in self.model.named_parameters():
            if self.stage < 3 and parameter.requires_grad:
                yield name, tools.safe_get_full_optimizer_state(parameter, kind)
            elif parameter.requires_grad:
                own = tools.safe_get_local_optimizer_state(parameter, kind)
                yield name, self._join(own, parameter)

    def _join(self, shard: Tensor, parameter: Any) -> Tensor:
        joined = self.processes.gather_shards(shard.detach())
        return joined[: parameter.ds_numel].view(parameter.ds_shape)


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
