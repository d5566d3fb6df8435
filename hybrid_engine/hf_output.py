"""Give what the engine generated in the forms that Hugging Face's callers expect."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hybrid_engine.eval_mode import eval_mode
from hybrid_engine.generation import Rollout, SamplingParams
from hybrid_engine.models.lora import active_adapters, is_lora

PerStep = tuple[Tensor, ...]  # T tensors (B, V)


class LazyOutput(GenerateDecoderOnlyOutput):
    """HF's output, whose scores and logits are computed when somebody looks at them."""

    def __init__(self, sequences: Tensor, **compute: Callable[[], PerStep]) -> None:
        """`compute` may have `scores` and `logits`."""
        self.__dict__["_compute"] = compute
        super().__init__(sequences=sequences)  # type: ignore[arg-type]

    def _materialise(self, *names: str) -> None:
        compute = self.__dict__["_compute"]
        for name in names or tuple(compute):
            if name in compute:
                self[name] = compute.pop(name)()

    def __getattribute__(self, name: str) -> Any:
        if name in ("scores", "logits") and self.__dict__.get("_compute"):
            self._materialise(name)
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        self._materialise(*([key] if isinstance(key, str) else []))
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self._materialise()
        return super().__iter__()

    def keys(self) -> Any:
        self._materialise()
        return super().keys()

    def items(self) -> Any:
        self._materialise()
        return super().items()

    def values(self) -> Any:
        self._materialise()
        return super().values()

    def to_tuple(self) -> tuple[Any, ...]:
        self._materialise()
        return super().to_tuple()

    def __contains__(self, key: Any) -> bool:
        return key in self.__dict__["_compute"] or super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __len__(self) -> int:
        return super().__len__() + len(self.__dict__["_compute"])

    def __reduce__(self) -> Any:
        """A copy, or a pickle, is HF's own output."""
        return GenerateDecoderOnlyOutput(**dict(self.items())).__reduce__()


class Replay:
    """The logits of generated tokens, by one forward of the model over whole sequences.

    Holds no logits itself. Raises RuntimeError if the weights have moved since the generation, or
    other adapters are active.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: Tensor,  # (B, P + T), left-padded prompts and right-padded responses
        prompt_mask: Tensor | None,  # (B, P)
        processors: LogitsProcessorList,
        prompt_width: int,
    ) -> None:
        self._model: Any = model
        self._sequences = sequences
        self._processors = processors
        self._width = prompt_width
        mask = torch.ones_like(sequences)
        if prompt_mask is not None:
            mask[:, :prompt_width] = prompt_mask
        self._mask = mask
        device = sequences.device.type
        self._autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        self._state = self._weights()

    def logits(self) -> PerStep:
        """T tensors (B, V) fp32, as the model gives them."""
        if self._weights() != self._state:
            raise RuntimeError(
                "the weights have changed since this generation, or the active adapters: read "
                "scores and logits before the optimizer's step, and inside of disable_adapter()"
            )
        steps = self._sequences.shape[1] - self._width
        options: dict[str, Any] = {}
        if self._model._supports_logits_to_keep():
            options["logits_to_keep"] = steps
        with torch.no_grad(), eval_mode(self._model), self._as_generated():
            output = self._model(
                input_ids=self._sequences[:, :-1], attention_mask=self._mask[:, :-1],
                position_ids=(self._mask.cumsum(1) - 1).clamp(min=0)[:, :-1], use_cache=False,
                **options,
            )  # fmt: skip
        return output.logits[:, -steps:].float().unbind(1)

    def scores(self) -> PerStep:
        """The logits after the processors."""
        return tuple(
            self._processors(self._sequences[:, : self._width + step], logits.clone())  # type: ignore[arg-type]
            for step, logits in enumerate(self.logits())
        )

    def _as_generated(self) -> contextlib.AbstractContextManager[Any]:
        device = self._sequences.device.type
        if not self._autocast:
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, dtype=self._autocast)

    def _weights(self) -> list[Any]:
        """What differs when the weights do: which they are, their versions, active adapters."""
        versions = [
            (id(parameter), 0 if parameter.is_inference() else parameter._version)
            for parameter in self._model.parameters()
        ]
        return versions + [active_adapters(m) for m in self._model.modules() if is_lora(m)]


def batch_outputs(
    prompts: list[list[int]], rollout: Rollout, params: SamplingParams, *, return_logprobs: bool
) -> dict[str, GenerationOutput]:
    """The result of `generate_batch`: a request of each prompt, and n - 1 children."""
    n = params.n
    logprobs = rollout.truncated_logprobs if params.temperature else rollout.logprobs
    outputs = {}
    for i, prompt in enumerate(prompts):
        for sample in range(n):
            name = f"req_{i}" if sample == 0 else f"req_{i}__child#{sample - 1}"
            place = i * n + sample
            response = rollout.response(place)
            outputs[name] = GenerationOutput(
                request_id=name,
                prompt_ids=list(prompt),
                generated_tokens=response,
                logprobs=logprobs[place, : len(response)].tolist() if return_logprobs else [],
                status=RequestStatus.FINISHED,
            )
    return outputs
