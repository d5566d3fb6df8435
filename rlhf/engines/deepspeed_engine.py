"""Training on several processes, or with weights and optimizer in the CPU's memory: DeepSpeed.

DeepSpeed does the work; here is what it needs to be told, and what it does not do by itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from rlhf import distributed
from rlhf.config import OptimizerConfig
from rlhf.engines.deepspeed_start import initialise, load_deepspeed
from rlhf.engines.interface import StepInfo
from rlhf.engines.schedule import ADAM_BETAS, ADAM_EPS, learning_rate_factor, parameter_groups
from rlhf.engines.single import check_finite, check_scale
from rlhf.engines.universal import ranks_of, universal

P = ParamSpec("P")
R = TypeVar("R")
TAG = "engine"  # the folder of DeepSpeed's files in a checkpoint
GATHER_NUMEL = 1 << 26  # elements that are gathered together for export


class FrozenDeepSpeedEngine:
    """A module whose weights lie in parts on the ranks; it is only read."""

    def __init__(self, module: nn.Module, config: dict[str, Any]) -> None:
        self.module = module
        self._zero_stage: int = config["zero_optimization"]["stage"]
        self._engine = initialise(module, config, None)

    def __call__(
        self, function: Callable[Concatenate[nn.Module, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return self._engine(function, *args, **kwargs)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        if self._zero_stage < 3:
            yield
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(self._engine):
            yield

    @contextlib.contextmanager
    def for_rollout(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def editing(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        if self._zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
            yield

    def weights(self) -> dict[str, Tensor]:
        """The module's state_dict in the CPU's memory of the first rank, {} on the others."""
        state = self.module.state_dict(keep_vars=True)
        distinct = {id(t): t for t in state.values() if isinstance(t, nn.Parameter)}
        whole: dict[int, Tensor] = {}
        for part in _of_size(list(distinct.values()), GATHER_NUMEL):
            with self._reading(part):
                if distributed.is_first():
                    whole |= {id(t): t.detach().to("cpu", copy=True) for t in part}
        if not distributed.is_first():
            return {}
        return {n: whole[id(t)] if id(t) in whole else t.cpu() for n, t in state.items()}

    @contextlib.contextmanager
    def _reading(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        if self._zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield


class DeepSpeedEngine(FrozenDeepSpeedEngine):
    """A module with its optimizer, both spread over the ranks as the ZeRO stage says."""

    def __init__(
        self,
        module: nn.Module,
        config: dict[str, Any],
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        adam: Literal["fused", "cpu"] = "fused",
    ) -> None:
        self.module = module
        self._zero_stage = config["zero_optimization"]["stage"]
        self._optimizer = optimizer
        self._total_steps = total_steps
        self._steps = 0  # taken
        self._grad_norm = float("nan")  # at stage 0 in fp32, where DeepSpeed keeps none
        self._engine = initialise(module, config, _adam(module, optimizer, adam))
        if self._zero_stage == 0 and hasattr(self._engine.optimizer, "initialize_optimizer_states"):
            # It took a step of zeros to allocate the state, which the bias correction would count.
            self._engine.optimizer.optimizer.state.clear()
        self._engine.clip_fp32_gradients = self._clip

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over the ranks where we add up; and at stage 0 it scales the gradients
        of fp16 down after the backward pass, but not the loss up before it."""
        factor: float = distributed.world_size()
        if self._zero_stage == 0 and self._engine.fp16_enabled():
            factor *= self._engine.optimizer.loss_scale
        self._engine.backward(loss * factor)

    def step(self) -> StepInfo:
        factor = learning_rate_factor(self._steps, self._total_steps, self._optimizer)
        learning_rate = self._optimizer.learning_rate * factor
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        scale = self._engine.optimizer.loss_scale if self._engine.fp16_enabled() else None
        self._engine.step()
        self._steps += 1
        norm = self._engine.get_global_grad_norm()
        norm = self._grad_norm if norm is None else float(norm)
        if scale is None:
            check_finite(norm)
            return StepInfo(learning_rate, norm)
        return self._scaled(learning_rate, norm / scale if self._zero_stage == 0 else norm)

    def save(self, folder: Path) -> None:
        """Each rank writes its part; frozen weights stay out, they are where the model came from.

        Returns when every rank has written.
        """
        self._engine.save_checkpoint(
            str(folder),
            tag=TAG,
            client_state={"steps": self._steps},
            save_latest=False,
            exclude_frozen_parameters=True,
        )

    def load(self, folder: Path) -> None:
        """On another number of ranks too, then equal up to rounding."""
        ranks = ranks_of(folder / TAG)
        if ranks is None or ranks == distributed.world_size():
            self._load(folder, TAG)
            return
        with universal(folder / TAG, zero_stage=self._zero_stage) as converted:
            self._engine._config.load_universal_checkpoint = True
            try:
                self._load(folder, converted.name)
            finally:
                self._engine._config.load_universal_checkpoint = False

    def _load(self, folder: Path, tag: str) -> None:
        path, state = self._engine.load_checkpoint(
            str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint")
        self._steps = state["steps"]

    def _scaled(self, learning_rate: float, norm: float) -> StepInfo:
        """Of a step in fp16, which too large a loss scale makes DeepSpeed skip."""
        scale = float(self._engine.optimizer.loss_scale)
        if not self._engine.was_step_applied():
            norm = math.inf
            check_scale(scale)
        return StepInfo(learning_rate, norm, scale, self._engine.skipped_steps)

    def _clip(self) -> None:
        """Instead of DeepSpeed's at stage 0 in fp32, which tells nobody the norm."""
        weights = [p for p in self.module.parameters() if p.grad is not None]
        self._grad_norm = float(nn.utils.clip_grad_norm_(weights, self._optimizer.max_grad_norm))
        check_finite(self._grad_norm)


def _adam(
    module: nn.Module, config: OptimizerConfig, adam: Literal["fused", "cpu"]
) -> torch.optim.Optimizer:
    weights = [p for p in module.parameters() if p.requires_grad]
    groups = parameter_groups(weights, config.weight_decay)
    options: dict[str, Any] = {"betas": ADAM_BETAS, "eps": ADAM_EPS}
    if adam == "cpu":
        return load_deepspeed().ops.adam.DeepSpeedCPUAdam(groups, lr=0.0, **options)
    return torch.optim.AdamW(groups, lr=0.0, fused=True, **options)


def _of_size(tensors: list[nn.Parameter], numel: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive parts of at most `numel` elements, or of one tensor."""
    part: list[nn.Parameter] = []
    size = 0
    for tensor in tensors:
        count = getattr(tensor, "ds_numel", tensor.numel())
        if part and size + count > numel:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += count
    if part:
        yield part
