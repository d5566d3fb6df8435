"""HybridEngine: the model that is being trained generates, on its live weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_engine.cache import BlockAllocator, KVCache, affordable_blocks
from hybrid_engine.config import EngineConfig
from hybrid_engine.generation import GenerationLoop, Rollout, SamplingParams
from hybrid_engine.generation.checks import check_prompts
from hybrid_engine.generation.loop import MOST_STEPS
from hybrid_engine.generation.rows import Rows
from hybrid_engine.generation.scheduler import Scheduler, Sequence
from hybrid_engine.joint import Requests, joint_rollout
from hybrid_engine.models import Decoder, find_family
from hybrid_engine.weights import Shadow


class HybridEngine:
    """Generation for a Hugging Face causal language model in the middle of its training.

    The model keeps its parameters, its forward and its optimizer; the engine reads the same
    memory. Where that is not possible, a rollout has a copy: of parameters that ZeRO-3 spreads over
    the ranks, of the slices that a tensor-parallel rank holds, and of another dtype.
    """

    def __init__(
        self, model: nn.Module, config: EngineConfig | None = None, *, tp_group: Any = None
    ) -> None:
        """`tp_group` has the `inference_tp_size` ranks that generate together, this one among
        them; None: consecutive ranks of the world.

        With ZeRO-3 and with tensor parallelism every rank makes an engine, and every rank enters a
        rollout; a tensor-parallel group generates together.

        Raises ValueError for a family that it does not know, and for ranks that do not divide.
        """
        self._model = model
        self._config = config or EngineConfig()
        dtype, family = self._config.rollout_dtype, find_family(model)
        self._joint = joint_rollout(model, family, self._config, tp_group)
        self._shadow = Shadow(model, dtype) if dtype and not self._joint else None
        if self._joint:
            self._decoder = self._joint.decoder
        else:
            self._decoder = Decoder(self._shadow.model if self._shadow else model, family)
        self._cache: KVCache | None = None
        self._in_rollout = False

    @property
    def max_positions(self) -> int:
        """Tokens of prompt and response together that the model has positions for."""
        return min(self._decoder.max_positions, self._config.max_out_tokens or sys.maxsize)

    @property
    def dtype(self) -> torch.dtype:
        """The type that rollouts compute in."""
        return self._decoder.dtype

    @property
    def in_rollout(self) -> bool:
        """Whether `rollout()` is entered."""
        return self._in_rollout

    @property
    def in_lockstep(self) -> bool:
        """Whether ranks that share or stream their weights generate together in this rollout."""
        return self._joint is not None and self._joint.in_lockstep

    def rollout_parameters(self) -> dict[str, nn.Parameter]:
        """What a rollout reads, by the model's names: the live parameters, or a copy of them.

        A copy is empty outside of `rollout()`; with tensor parallelism it has this rank's slices.
        """
        return dict(self._decoder.named_parameters())

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        """Flip to generation: the weights as they are now, and a KV cache that lives until exit."""
        if self._in_rollout:
            raise RuntimeError("rollout() is entered already")
        if self._joint:
            self._decoder = self._joint.flip()
        else:
            if self._shadow:
                self._shadow.refresh()
            self._decoder.refresh()
        self._in_rollout = True
        try:
            yield
        finally:
            self._in_rollout = False
            if self._joint:
                self._joint.end()
            if self._config.release_inference_cache:
                self._cache = None

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | None = None,
        *,
        seeds: list[int] | None = None,
        on_finish: Callable[[int, list[int]], None] | None = None,
    ) -> Rollout:
        """Responses to token-id prompts of any lengths, sampled as `params` says.

        Outside `rollout()` the flip happens for this call alone. `seeds` has the key of each
        response's draws, n for each prompt; default: `sequence_seeds` of params.seed and this rank.
        `on_finish` is called with the place in the rollout and the tokens of each response as it
        ends, while others decode.

        Raises ValueError for an empty prompt, one that with max_new_tokens passes the model's
        positions, token ids outside the head, and a sequence that the KV cache may not hold; where
        ranks generate together, PeerError if another one fails.
        """
        params = params or SamplingParams()
        with (
            contextlib.nullcontext() if self._in_rollout else self.rollout(),
            self._together(),
        ):
            requests = self._requests(prompts, params, seeds)
            loop = self._start(requests, params)
            cache, self._cache = self._cache, None  # not for a call that `on_finish` makes
            while not loop.done:
                loop.step(MOST_STEPS)
                if on_finish is not None:
                    for place, response in loop.take_finished():
                        if (own := requests.own_place(place)) is not None:
                            on_finish(own, response)
            self._cache = cache
        return requests.own_part(loop.rollout())

    def start(
        self,
        prompts: list[list[int]],
        params: SamplingParams | None = None,
        *,
        seeds: list[int] | None = None,
    ) -> GenerationLoop:
        """As `generate`, but the caller takes the steps, and may cancel responses between them.

        Valid inside `rollout()`: `step()` until `done`, `cancel(i)`, then `rollout()`.
        """
        if not self._in_rollout:
            raise RuntimeError("start() works inside `with engine.rollout():`")
        if self.in_lockstep:
            raise RuntimeError(
                "start() and stream() are for a rank that generates alone; ranks that share or "
                "stream their weights generate together: call generate()"
            )
        params = params or SamplingParams()
        loop = self._start(self._requests(prompts, params, seeds), params)
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
        with contextlib.nullcontext() if self._in_rollout else self.rollout(), self._together():
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
        if self._shadow:
            self._shadow.release()
        self._cache = None

    def _together(self) -> contextlib.AbstractContextManager[None]:
        """Ranks whose passes meet leave only together."""
        return self._joint.together() if self._joint else contextlib.nullcontext()

    def _requests(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int] | None = None
    ) -> Requests:
        own = [p for p in prompts for _ in range(params.n)]
        self._check(own, params)
        alone = Requests.alone(own, params, seeds)
        return self._joint.share(alone, params) if self._joint else alone

    def _start(self, requests: Requests, params: SamplingParams) -> GenerationLoop:
        prompts = requests.prompts
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
            seeds=requests.seeds,
            capacity=max(1, min(len(prompts), self._config.max_running)),
            stop_token_ids=stop_token_ids,
            pad_token_id=self._pad_token_id(),
        )

    def _check(self, prompts: list[list[int]], params: SamplingParams) -> None:
        vocab, embedded = self._decoder.vocab_size, self._decoder.embedded_tokens
        if vocab > embedded:
            raise ValueError(
                f"the head says {vocab} tokens, the embedding knows {embedded}; resize one of them"
            )
        own = self.max_positions == self._decoder.max_positions
        check_prompts(
            prompts,
            max_new_tokens=params.max_new_tokens,
            vocab=vocab,
            positions=self.max_positions,
            limited_by=f"the model's {self.max_positions} positions" if own
            else f"max_out_tokens={self.max_positions}",
        )  # fmt: skip

    def _cache_for(self, prompts: list[list[int]], params: SamplingParams) -> KVCache:
        """A cache with room for the longest sequence at least, and for all that run if allowed."""
        decoder, config = self._decoder, self._config
        needs = sorted(-(-(len(p) + params.max_new_tokens) // config.block_size) for p in prompts)
        running = needs[-config.max_running :]
        wanted = sum(running) + len(running)  # the scheduler keeps one free for each that runs
        cache, place = self._cache, (decoder.dtype, decoder.device)
        if cache is None or cache.num_blocks < wanted or (cache.dtype, cache.device) != place:
            cache = self._cache = None  # free the old one first
            most = self._most_blocks(needs[-1] if needs else 0)
            self._cache = KVCache(
                layers=decoder.num_layers, num_blocks=min(wanted, most),
                kv_heads=decoder.kv_heads, block_size=config.block_size,
                head_dim=decoder.head_dim, dtype=decoder.dtype, device=decoder.device,
            )  # fmt: skip
        return self._cache  # type: ignore[return-value]

    def _most_blocks(self, longest: int) -> int:
        """The blocks that a cache may have; an error if `longest` sequence does not fit."""
        decoder, config = self._decoder, self._config
        size = KVCache.bytes_per_block(
            layers=decoder.num_layers, kv_heads=decoder.kv_heads, block_size=config.block_size,
            head_dim=decoder.head_dim, dtype=decoder.dtype,
        )  # fmt: skip
        blocks, limit = affordable_blocks(size, decoder.device, config.max_cache_gb)
        if self._joint:
            blocks = self._joint.least(blocks)
        if blocks < longest:
            raise ValueError(
                f"{limit} holds {blocks} blocks; the longest sequence alone needs {longest} "
                f"({longest * size / 1e9:.3g} GB)"
            )
        return blocks

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
