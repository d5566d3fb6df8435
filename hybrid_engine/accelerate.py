"""`accelerate(model)`: HF's own `model.generate(...)` runs on the hybrid engine from here on.

HF's `generate` does all its own preparation and then calls the decoding loop that it finds on the
model's type. So the model gets a subclass of its class, of the same name, in which that loop is
the engine's. What the engine does not serve goes to HF's loop, with a warning that says why.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hybrid_engine.config import EngineConfig
from hybrid_engine.engine import HybridEngine
from hybrid_engine.generation import Rollout
from hybrid_engine.hf_output import LazyOutput, Replay, batch_outputs
from hybrid_engine.hf_request import NotServedError, Request, read_batch_request, read_request
from hybrid_engine.models import structure
from hybrid_engine.self_check import SelfCheck, self_check

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Acceleration:
    """What `accelerate` did to a model, and what came of it."""

    model: nn.Module = field(repr=False)
    engine: HybridEngine
    check: SelfCheck  # asked again when the model's modules have changed
    config: EngineConfig | None
    served: int = 0  # calls of `generate` that ran on the engine
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> calls that ran on HF
    _autocast: dict[torch.dtype, HybridEngine] = field(default_factory=dict, repr=False)
    _checked: list[Any] = field(init=False, repr=False)  # the structure that `check` is about

    def __post_init__(self) -> None:
        self._checked = structure(self.model)

    def generate(self, request: Request, device: torch.device, streamer: Any = None) -> Rollout:
        """Serve a request, and count it. Raises NotServedError if the model cannot be read now."""
        with contextlib.ExitStack() as stack:
            try:
                engine = self._serving(device)
                if not engine.in_rollout:
                    self._check_again()
                    stack.enter_context(engine.rollout())
            except ValueError as error:
                raise NotServedError(str(error)) from error
            if streamer is not None and engine.in_lockstep:
                raise NotServedError("a streamer, where ranks generate together")
            self.served += 1
            if streamer is not None:
                return _streamed(engine, request, streamer)
            return engine.generate(request.prompts, request.params, seeds=request.seeds())

    def _check_again(self) -> None:
        """Raises NotServedError if other modules made the model one that the engine is not."""
        if (found := structure(self.model)) != self._checked:
            self.check = self_check(self.model, self.engine)
            self._checked = found
        if not self.check.passed:
            raise NotServedError(f"the model was changed, the self-check failed: {self.check}")

    def _serving(self, device: torch.device) -> HybridEngine:
        """Under autocast, an engine of autocast's type."""
        config = self.config or EngineConfig()
        if config.dtype is not None or not torch.is_autocast_enabled(device.type):
            return self.engine
        dtype = torch.get_autocast_dtype(device.type)
        if dtype == self.engine.dtype:
            return self.engine
        if dtype not in self._autocast:
            name: Any = str(dtype).removeprefix("torch.")
            self._autocast[dtype] = HybridEngine(self.model, replace(config, dtype=name))
        return self._autocast[dtype]

    def release(self) -> None:
        """Leave the model's parameters as they were."""
        for engine in (self.engine, *self._autocast.values()):
            engine.release()
        self._autocast.clear()


_STATE = "_hybrid_engine_acceleration"  # the model's attribute, so that both live equally long


def accelerate(model: Model, config: EngineConfig | None = None) -> Model:
    """Make `model.generate(...)` run on the hybrid engine; returns the model.

    The model may be wrapped by PEFT, DDP, DeepSpeed or torch.compile. It is left as it is, with a
    warning, when its family is unknown or when the engine's logits are not the model's. A call that
    the engine does not serve, such as beam search, runs on HF's loop; each reason is warned of once
    and counted in `acceleration(model).fallbacks`. `restore` undoes it.
    """
    target = unwrap(model)
    if _STATE in vars(target):
        return model
    try:
        engine = HybridEngine(target, config)
        check = self_check(target, engine)
    except ValueError as error:
        _warn(f"{type(target).__name__} is not accelerated: {error}")
        return model
    if not check.passed:
        engine.release()
        _warn(f"{type(target).__name__} is not accelerated, the self-check failed: {check}")
        return model
    vars(target)[_STATE] = Acceleration(target, engine, check, config)
    cls: Any = type(target)
    target.__class__ = _accelerated_class(cls)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` without a trace; returns the model."""
    target = unwrap(model)
    state = vars(target).pop(_STATE, None)
    if state is not None:
        state.release()
        target.__class__ = _plain_class(type(target))
    return model


def acceleration(model: nn.Module) -> Acceleration | None:
    """The state of an accelerated model: its engine, its self-check, how many calls were served."""
    return vars(unwrap(model)).get(_STATE)


@contextlib.contextmanager
def plain_generation(model: nn.Module) -> Iterator[None]:
    """Within, an accelerated model is as if it had never been one, and `generate` is HF's own."""
    target = unwrap(model)
    accelerated, state = type(target), vars(target).pop(_STATE, None)
    if state is None:
        yield
        return
    target.__class__ = _plain_class(accelerated)
    try:
        yield
    finally:
        target.__class__ = accelerated
        vars(target)[_STATE] = state


def unwrap(model: Any) -> nn.Module:
    """The causal language model inside PEFT, DDP, DeepSpeed or torch.compile's wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


class _AcceleratedGeneration:
    """What the subclass adds to an HF model's class."""

    @torch.no_grad()
    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        state = vars(self)[_STATE]
        try:
            request = read_request(
                self, input_ids, logits_processor, stopping_criteria, generation_config,
                streamer, model_kwargs, max_positions=state.engine.max_positions,
            )  # fmt: skip
            rollout = state.generate(request, input_ids.device, streamer)
        except NotServedError as error:
            _count_fallback(state, str(error))
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config,
                synced_gpus=synced_gpus, streamer=streamer, **model_kwargs,
            )  # fmt: skip
        sequences = _sequences(rollout, input_ids, request.pad_token_id)
        if not generation_config.return_dict_in_generate:
            return sequences
        replay = Replay(
            self, sequences, model_kwargs.get("attention_mask"), logits_processor,  # type: ignore[arg-type]
            input_ids.shape[1],
        )  # fmt: skip
        wanted = {"scores": generation_config.output_scores,
                  "logits": generation_config.output_logits}  # fmt: skip
        compute = {name: getattr(replay, name) for name, asked in wanted.items() if asked}
        return LazyOutput(sequences, **compute)

    @torch.no_grad()
    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        record_timestamps: bool = False,
        **options: Any,
    ) -> dict[str, GenerationOutput]:
        state = vars(self)[_STATE]
        config = generation_config or self.generation_config  # type: ignore[attr-defined]
        try:
            if record_timestamps:
                raise NotServedError("record_timestamps=True")
            request = read_batch_request(
                self, inputs, config, options.get("max_new_tokens"),
                max_positions=state.engine.max_positions,
            )  # fmt: skip
            rollout = state.generate(request, self.device)  # type: ignore[attr-defined]
        except NotServedError as error:
            _count_fallback(state, str(error))
            return super().generate_batch(  # type: ignore[misc]
                inputs, generation_config, continuous_batching_config, record_timestamps, **options
            )
        wants = (
            continuous_batching_config is not None and continuous_batching_config.return_logprobs
        )
        return batch_outputs(request.prompts, rollout, request.params, return_logprobs=wants)

    @functools.wraps(GenerationMixin._beam_search)  # HF looks at the signature
    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        _count_fallback(vars(self)[_STATE], "beam search")
        return super()._beam_search(*args, **kwargs)  # type: ignore[misc]

    @functools.wraps(GenerationMixin._assisted_decoding)  # HF looks at the signature
    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        _count_fallback(vars(self)[_STATE], "assisted decoding")
        return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The copy is accelerated too, on its own weights."""
        config = vars(self)[_STATE].config
        with plain_generation(self):  # type: ignore[arg-type]
            duplicate = copy.deepcopy(self, memo)
        return accelerate(duplicate, config)  # type: ignore[type-var]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the model as if it had never been accelerated."""
        state: Any = super().__reduce_ex__(protocol)
        attributes = {name: value for name, value in state[2].items() if name != _STATE}
        # pickle's usual constructor insists on the class that the object has now
        constructor = (copyreg._reconstructor, (_plain_class(type(self)), object, None))  # type: ignore[attr-defined]
        return (*constructor, attributes, *state[3:])


def _streamed(engine: HybridEngine, request: Request, streamer: Any) -> Rollout:
    """HF's streamer gets each token, (1,), as it is sampled."""
    loop = engine.start(request.prompts, request.params, seeds=request.seeds())
    sent = 0
    while not loop.done:
        loop.step()
        length = int(loop.lengths[0])
        for token in loop.tokens[0, sent:length].cpu().split(1):
            streamer.put(token)
        sent = length
    streamer.end()
    return loop.rollout()


def _sequences(rollout: Rollout, input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Left-padded prompts and right-padded responses, (B, P + T)."""
    steps = torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device)
    inside = steps < rollout.lengths.unsqueeze(1)
    responses = torch.where(inside, rollout.tokens, pad_token_id)
    return torch.cat((input_ids, responses.to(input_ids.device)), dim=1)


@functools.cache
def _accelerated_class(cls: Any) -> Any:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (_AcceleratedGeneration, cls), names)


def _plain_class(accelerated: type) -> type:
    return accelerated.__bases__[1]


def _count_fallback(state: Acceleration, reason: str) -> None:
    if reason not in state.fallbacks:
        _warn(f"generate runs on Hugging Face's own loop: {reason}")
    state.fallbacks[reason] = state.fallbacks.get(reason, 0) + 1


def _warn(message: str) -> None:
    warnings.warn(f"hybrid_engine: {message}", RuntimeWarning, stacklevel=4)
