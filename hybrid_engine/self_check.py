"""Does the engine say what the model says? Asked once, when a model is accelerated.

A table that puts a module in the wrong place gives fluent nonsense, not an error. So a short batch
goes through both forwards, and the engine is used only if they agree.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_engine.engine import HybridEngine
from hybrid_engine.eval_mode import eval_mode
from hybrid_engine.generation import SamplingParams
from hybrid_engine.models import find_family
from hybrid_engine.weights import whole_shape

PROMPT_LENGTHS = (11, 1, 5)
NEW_TOKENS = 4


@dataclass(frozen=True)
class SelfCheck:
    """The verdict on a short ragged batch of random tokens."""

    max_logit_error: float  # largest difference of logits, over the largest logit
    bound: float  # what it may be: sqrt(eps) of the engine's type
    tokens_compared: int  # greedy tokens
    tokens_agreed: int  # whose logit in the model's own forward is the largest, within the bound
    first_wrong_layer: int | None  # where the residual leaves the bound

    @property
    def passed(self) -> bool:
        agreed = self.tokens_agreed == self.tokens_compared
        return self.max_logit_error <= self.bound and agreed

    def __str__(self) -> str:
        where = ""
        if self.first_wrong_layer is not None:
            where = f", from layer {self.first_wrong_layer} on"
        elif not self.passed:
            where = ", after the last layer"
        return (
            f"logits differ by {self.max_logit_error:.2g} of the largest (bound {self.bound:.2g})"
            f"{where}; {self.tokens_agreed} of {self.tokens_compared} greedy tokens agree"
        )


@torch.no_grad()
def self_check(model: nn.Module, engine: HybridEngine) -> SelfCheck:
    """Compare the engine with the model's own forward, in eval mode and in the weights' type."""
    device = next(model.parameters()).device
    with eval_mode(model), torch.autocast(device.type, enabled=False):
        return _compare(model, engine)


def _compare(model: Any, engine: HybridEngine) -> SelfCheck:
    vocab = whole_shape(model.get_input_embeddings().weight)[0]
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(vocab, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS
    ]
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, stop_token_ids=())
    rollout = engine.generate(prompts, params)
    bound = math.sqrt(torch.finfo(engine.dtype).eps)
    error, agreed = 0.0, 0
    wrong_layers = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt, *rollout.response(i)]], device=device)
        with _layer_outputs(model) as outputs:
            theirs = model(ids, use_cache=False).logits[0]  # (T, V)
        logits, residuals = engine.forward(ids[0].tolist())
        error = max(error, _difference(logits, theirs))
        agreed += _agreeing(theirs[len(prompt) - 1 : -1], rollout.tokens[i], bound)
        for layer, (mine, output) in enumerate(zip(residuals, outputs, strict=True)):
            if _difference(mine, output) > bound:
                wrong_layers.append(layer)
                break
    return SelfCheck(
        max_logit_error=error,
        bound=bound,
        tokens_compared=rollout.tokens.numel(),
        tokens_agreed=agreed,
        first_wrong_layer=min(wrong_layers, default=None),
    )


@contextlib.contextmanager
def _layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """What each layer gives in the model's own forward of one sequence, (T, D) each."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    layers: Any = model.get_submodule(find_family(model).layers)
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest value; NaN on either side is infinite."""
    mine, theirs = mine.float(), theirs.float()
    scale = float(theirs.abs().max()) or 1.0
    found = float((mine - theirs).abs().max()) / scale
    return found if math.isfinite(found) else math.inf


def _agreeing(logits: Tensor, tokens: Tensor, bound: float) -> int:
    """How many tokens are the model's own choice, ties within the bound counted. (T, V), (T,)."""
    logits = logits.float()
    chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    slack = bound * logits.abs().amax(1)
    return int((chosen >= logits.amax(1) - slack).sum())
