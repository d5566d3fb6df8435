"""HybridEngine: the model that is being trained generates, on its live weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybrid_engine.cache import BlockAllocator, KVCache
from hybrid_engine.generation import GenerationLoop, Rollout, SamplingParams
from hybrid_engine.generation.rows import Rows
from hybrid_engine.generation.scheduler import Scheduler, Sequence
from hybrid_engine.models import Decoder, find_family


@dataclass(frozen=True)
class EngineConfig:
    """Limits of a rollout. The results do not depend on them, only memory and speed do."""

    max_running: int = 256  # sequences that decode together
    block_size: int = 16  # tokens in a block of the KV cache
    max_prefill_tokens: int = 8192  # prompt tokens that are prefilled in one pass
    max_cache_gb: float | None = None  # of the KV cache; None: what all running sequences need

    def __post_init__(self) -> None:
        for name in ("max_running", "block_size", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_cache_gb is not None and self.max_cache_gb <= 0:
            raise ValueError(f"max_cache_gb must be positive, got {self.max_cache_gb}")


class HybridEngine:
    """Generation for a Hugging Face causal language model in the middle of its training.

    The model keeps its parameters, its forward and its optimizer; the engine reads the same
    memory. A family that it does not know raises ValueError.
    """

    def __init__(self, model: nn.Module, config: EngineConfig | None = None) -> None:
        self._model = model
        self._config = config or EngineConfig()
        self._decoder = Decoder(model, find_family(model))
        self._cache: KVCache | None = None
        self._in_rollout = False

    @property
    def max_positions(self) -> int:
        """Tokens of prompt and response together that the model has positions for."""
        return self._decoder.max_positions

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        """Flip to generation: the weights as they are now, and a KV cache that lives until exit."""
        if self._in_rollout:
            raise RuntimeError("rollout() is entered already")
        self._decoder.refresh()
        self._in_rollout = True
        try:
            yield
        finally:
            self._in_rollout = False
            self._cache = None

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | None = None,
        *,
        on_finish: Callable[[int, list[int]], None] | None = None,
    ) -> Rollout:
        """Responses to token-id prompts of any lengths, sampled as `params` says.

        Outside `rollout()` the flip happens for this call alone. `on_finish` is called with the
        place in the rollout and the tokens of each response as it ends, while others decode.

        Raises ValueError for an empty prompt, or one that with max_new_tokens passes the model's
        positions.
        """
        params = params or SamplingParams()
        with contextlib.nullcontext() if self._in_rollout else self.rollout():
            loop = self._start([p for p in prompts for _ in range(params.n)], params)
            while not loop.done:
                loop.step()
                if on_finish is not None:
                    for place, response in loop.take_finished():
                        on_finish(place, response)
        return loop.rollout()

    def start(
        self, prompts: list[list[int]], params: SamplingParams | None = None
    ) -> GenerationLoop:
        """As `generate`, but the caller takes the steps, and may cancel responses between them.

        Valid inside `rollout()`: `step()` until `done`, `cancel(i)`, then `rollout()`.
        """
        if not self._in_rollout:
            raise RuntimeError("start() works inside `with engine.rollout():`")
        params = params or SamplingParams()
        loop = self._start([p for p in prompts for _ in range(params.n)], params)
        self._cache = None  # this loop's alone: other calls may come between two steps
        return loop

    def stream(self, prompt: list[int], params: SamplingParams | None = None) -> Iterator[int]:
        """The response to one prompt, token by token as they are sampled."""
        if params and params.n > 1:
            raise ValueError(f"a stream is one response, got n={params.n}; use generate or start")
        with contextlib.nullcontext() if self._in_rollout else self.rollout():
            loop = self.start([prompt], params)
            sent = 0
            while not loop.done:
                loop.step()
                for token in loop.tokens[0, sent : int(loop.lengths[0])].tolist():
                    yield token
                    sent += 1

    @torch.no_grad()
    def forward(self, tokens: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The decoder's forward of one sequence of T tokens, to be compared with the model's.

        Returns the logits (T, V), and the residual (T, D) after each layer.
        """
        with contextlib.nullcontext() if self._in_rollout else self.rollout():
            cache = self._cache_for([tokens], SamplingParams(max_new_tokens=1))
            sequence = Sequence(index=0, prompt=tokens)
            sequence.blocks = list(range(cache.num_blocks))
            rows = Rows(
                capacity=1, max_blocks=cache.num_blocks, block_size=cache.block_size,
                device=self._decoder.device,
            )  # fmt: skip
            rows.append(sequence)
            residuals: list[Tensor] = []
            hidden = self._decoder.hidden_states(
                rows.prefill_batch([sequence], [0]),
                cache,
                on_layer=lambda _, residual: residuals.append(residual.clone()),
            )
            return self._decoder.logits(hidden), residuals

    def release(self) -> None:
        """Leave the model as if the engine had never been there. The engine can be used again."""
        self._decoder.release()
        self._cache = None

    def _start(self, prompts: list[list[int]], params: SamplingParams) -> GenerationLoop:
        self._check(prompts, params)
        stop_token_ids = self._stop_token_ids(params)
        cache = self._cache_for(prompts, params)
        scheduler = Scheduler(
            prompts,
            BlockAllocator(cache.num_blocks),
            block_size=cache.block_size,
            max_running=self._config.max_running,
            max_prefill_tokens=self._config.max_prefill_tokens,
        )
        return GenerationLoop(
            self._decoder,
            cache,
            scheduler,
            params,
            prompts=prompts,
            capacity=max(1, min(len(prompts), self._config.max_running)),
            stop_token_ids=stop_token_ids,
            pad_token_id=self._pad_token_id(),
        )

    def _check(self, prompts: list[list[int]], params: SamplingParams) -> None:
        embedded: int = self._model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        vocab = self._decoder.vocab_size
        if vocab > embedded:
            raise ValueError(
                f"the head says {vocab} tokens, the embedding knows {embedded}; resize one of them"
            )
        limit = self._decoder.max_positions - params.max_new_tokens
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty; give it at least the BOS token")
            if len(prompt) > limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; with max_new_tokens="
                    f"{params.max_new_tokens} the model's {self._decoder.max_positions} positions "
                    f"leave room for {limit}"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab:
                raise ValueError(
                    f"prompt {i} has token ids outside [0, {vocab}), the rows of the model's head"
                )

    def _cache_for(self, prompts: list[list[int]], params: SamplingParams) -> KVCache:
        """A cache with room for the longest sequence at least, and for all that run if allowed."""
        decoder, config = self._decoder, self._config
        needs = sorted(-(-(len(p) + params.max_new_tokens) // config.block_size) for p in prompts)
        running = needs[-config.max_running :]
        wanted = sum(running) + len(running)  # the scheduler keeps one free for each that runs
        if config.max_cache_gb is not None:
            size = KVCache.bytes_per_block(
                layers=decoder.num_layers, kv_heads=decoder.kv_heads,
                block_size=config.block_size, head_dim=decoder.head_dim, dtype=decoder.dtype,
            )  # fmt: skip
            allowed = int(config.max_cache_gb * 1e9) // size
            if needs and allowed < needs[-1]:
                raise ValueError(
                    f"max_cache_gb={config.max_cache_gb} holds {allowed} blocks; the longest "
                    f"sequence alone needs {needs[-1]} ({needs[-1] * size / 1e9:.3g} GB)"
                )
            wanted = min(wanted, allowed)
        if self._cache is None or self._cache.num_blocks < wanted:
            self._cache = None  # free the old one first
            self._cache = KVCache(
                layers=decoder.num_layers, num_blocks=wanted, kv_heads=decoder.kv_heads,
                block_size=config.block_size, head_dim=decoder.head_dim, dtype=decoder.dtype,
                device=decoder.device,
            )  # fmt: skip
        return self._cache

    def _stop_token_ids(self, params: SamplingParams) -> tuple[int, ...]:
        vocab = self._decoder.vocab_size
        if params.stop_token_ids is None:  # a config may name one that the head cannot say
            ids = _as_list(self._generation_setting("eos_token_id"))
            return tuple(token for token in ids if 0 <= token < vocab)
        if outside := [token for token in params.stop_token_ids if not 0 <= token < vocab]:
            raise ValueError(f"stop_token_ids {outside} are outside the head's [0, {vocab})")
        return params.stop_token_ids

    def _pad_token_id(self) -> int:
        return (_as_list(self._generation_setting("pad_token_id")) or [0])[0]

    def _generation_setting(self, name: str) -> int | list[int] | None:
        for source in ("generation_config", "config"):
            value = getattr(getattr(self._model, source, None), name, None)
            if value is not None:
                return value
        return None


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
