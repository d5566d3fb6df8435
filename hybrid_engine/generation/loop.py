"""The generate loop: admit, prefill, decode, sample, retire, until nothing is left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_engine import ops
from hybrid_engine.cache import KVCache
from hybrid_engine.generation.device_step import (
    DeviceStep,
    GraphedSteps,
    Results,
    graphs_serve,
)
from hybrid_engine.generation.params import FinishReason, Rollout, SamplingParams
from hybrid_engine.generation.rows import Rows
from hybrid_engine.generation.scheduler import Scheduler, Sequence
from hybrid_engine.generation.stop_strings import StopStringWatch
from hybrid_engine.models import DecodeProgram, Decoder, why_not_native

# Tokens of each sequence that one native call decodes at most.
MOST_STEPS = 32


class GenerationLoop:
    """Generates for all prompts of one scheduler; `step` advances every running sequence.

    Where the decoder runs as one native call or as a CUDA graph, a step is several tokens;
    `why_step_by_step` says why there is no native call.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        scheduler: Scheduler,
        params: SamplingParams,
        *,
        prompts: list[list[int]],
        seeds: list[int],
        capacity: int,
        stop_token_ids: tuple[int, ...],
        pad_token_id: int,
    ) -> None:
        """`seeds` has the Philox key of each prompt's draws."""
        self._decoder = decoder
        self._cache = cache
        self._scheduler = scheduler
        self._params = params
        device = decoder.device
        self._rows = Rows(
            capacity=capacity,
            max_blocks=cache.num_blocks,
            block_size=cache.block_size,
            device=device,
            vocab_size=decoder.vocab_size if params.repetition_penalty != 1 else None,
        )
        self._sampling = _sampling_tensors(params, capacity, device)
        self._seeds = seeds
        self._stop = torch.tensor(stop_token_ids, dtype=torch.int64, device=device)
        self._stop_strings = (
            StopStringWatch(params.stop_strings, prompts, params.max_new_tokens, device)
            if params.stop_strings and prompts
            else None
        )
        self._pad_token_id = pad_token_id
        results = Results.empty(len(prompts), params.max_new_tokens, device)
        self.tokens = results.tokens[:-1]
        self.logprobs = results.logprobs[:-1]
        self.truncated_logprobs = results.truncated_logprobs[:-1]
        self.lengths = results.lengths[:-1]
        self.finish_reasons: list[FinishReason] = ["length"] * len(prompts)
        self._finished: list[int] = []  # places of ended sequences, until they are taken
        self.program: DecodeProgram | None = None
        self.why_step_by_step = why_not_native(decoder)
        if self.why_step_by_step is None:
            self.program = DecodeProgram(decoder, cache)
            self._bound = self._bind(self.program, stop_token_ids)
        self._graphed: GraphedSteps | None = None
        if graphs_serve(decoder):
            step = DeviceStep(
                decoder, cache, self._rows, results, self._sampling, self._stop,
                min_new_tokens=params.min_new_tokens,
            )  # fmt: skip
            self._graphed = GraphedSteps(step, capacity)

    @property
    def done(self) -> bool:
        return self._scheduler.done

    @property
    def free_blocks(self) -> int:
        """Blocks of the cache that no sequence holds."""
        return self._scheduler.free_blocks

    @torch.inference_mode()
    def step(self, most: int = 1) -> None:
        """1 to `most` tokens for every running sequence; new ones get their first before."""
        with torch.autocast(self._decoder.device.type, enabled=False):  # the weights' type decides
            if admitted := self._scheduler.admit():
                self._prefill(admitted)
            if self._rows.count:
                self._decode(most)

    def take_finished(self) -> list[tuple[int, list[int]]]:
        """Place and response of each sequence that has ended since the last call."""
        finished, self._finished = self._finished, []
        return [(i, self.tokens[i, : int(self.lengths[i])].tolist()) for i in finished]

    def cancel(self, index: int) -> None:
        """End a response where it is, at once; one that has ended already stays as it is."""
        was_there, row = self._scheduler.cancel(index)
        if row is not None:
            self._rows.remove(row)
        if was_there:
            self.finish_reasons[index] = "cancelled"
            self._finished.append(index)

    def rollout(self) -> Rollout:
        """What was generated so far, cut to the longest response."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        inside = torch.arange(longest, device=self.lengths.device) < self.lengths.unsqueeze(1)
        return Rollout(
            tokens=torch.where(inside, self.tokens[:, :longest], self._pad_token_id),
            logprobs=torch.where(inside, self.logprobs[:, :longest], 0.0),
            truncated_logprobs=torch.where(inside, self.truncated_logprobs[:, :longest], 0.0),
            lengths=self.lengths.clone(),
            finish_reasons=self.finish_reasons,
        )

    def _prefill(self, admitted: list[Sequence]) -> None:
        row_of = {}
        for sequence in admitted:
            row_of[sequence.index] = self._rows.count
            self._rows.append(sequence, seed=self._seeds[sequence.index])
        computed = [sequence for sequence in admitted if sequence.twin is None]
        batch = self._rows.prefill_batch(computed, [row_of[s.index] for s in computed])
        hidden = self._decoder.hidden_states(batch, self._cache)
        self._copy_partial_blocks(admitted)
        assert batch.cu_seqlens is not None
        last = (batch.cu_seqlens[1:] - 1).tolist()
        last_of = {s.index: place for s, place in zip(computed, last, strict=True)}
        # A recomputed sequence has its next token already; a twin's last hidden state is shared.
        fresh = [sequence for sequence in admitted if not sequence.response]
        if fresh:
            places = [last_of[(s.twin or s).index] for s in fresh]
            self._sample(hidden[places], [row_of[s.index] for s in fresh])

    def _copy_partial_blocks(self, admitted: list[Sequence]) -> None:
        """A twin writes its response into a last block of its own."""
        pairs = [
            (sequence.twin.blocks[-1], sequence.blocks[-1])
            for sequence in admitted
            if sequence.twin is not None and len(sequence.tokens) % self._cache.block_size
        ]
        if pairs:
            sources, destinations = zip(*pairs, strict=True)
            self._cache.copy_blocks(list(sources), list(destinations))

    def _decode(self, most: int) -> None:
        rows = self._rows
        for row in rows.needing_block():
            self._provide_block(row)
        if self.program is None and self._graphed is None:
            hidden = self._decoder.hidden_states(rows.decode_batch(), self._cache)
            rows.lengths[: rows.count] += 1
            self._sample(hidden, None)
            return
        if self._stop_strings:
            most = 1  # each token has to be looked at
        self._provide_ahead(most)
        if self._graphed:
            self._graphed.run(rows.count, most)
        elif self.program:
            self.program.run(self._bound, rows.count, most)
        indices, steps, tokens = (
            state[: rows.count] for state in (rows.indices, rows.steps, rows.tokens)
        )
        self._retire(self._stopped(indices, steps, tokens), steps, None)

    def _bind(self, program: DecodeProgram, stop_token_ids: tuple[int, ...]) -> Any:
        """The tensors that a native call reads and advances."""
        rows, sampling = self._rows, self._sampling
        return program.bind(
            tokens=rows.tokens, lengths=rows.lengths, steps=rows.steps, room=rows.room,
            indices=rows.indices, seeds=rows.seeds, block_tables=rows.block_tables,
            max_blocks=rows.block_tables.shape[1], block_size=self._cache.block_size,
            seen=rows.seen, temperature=sampling[0], top_k=sampling[1], top_p=sampling[2],
            min_p=sampling[3], repetition_penalty=sampling[4], stop_tokens=list(stop_token_ids),
            min_new_tokens=self._params.min_new_tokens,
            max_new_tokens=self._params.max_new_tokens, out_tokens=self.tokens,
            out_logprobs=self.logprobs, out_truncated=self.truncated_logprobs,
            out_lengths=self.lengths,
        )  # fmt: skip

    def _provide_ahead(self, most: int) -> None:
        """Blocks for the tokens to come, as long as nobody else needs them."""
        rows = self._rows
        left = (self._params.max_new_tokens - rows.steps[: rows.count]).clamp(max=most)
        lacking = (rows.lengths[: rows.count] + left - rows.room[: rows.count]).tolist()
        for row, tokens in enumerate(lacking):
            for _ in range(0, tokens, self._cache.block_size):
                if self._scheduler.spare_blocks == 0:
                    return
                block = self._scheduler.grow(row)
                assert block is not None
                rows.add_block(row, block)

    def _provide_block(self, row: int) -> None:
        while row < self._rows.count:
            if (block := self._scheduler.grow(row)) is not None:
                self._rows.add_block(row, block)
                return
            self._preempt_last()

    def _preempt_last(self) -> None:
        last = self._rows.count - 1
        index, steps = int(self._rows.indices[last]), int(self._rows.steps[last])
        self._scheduler.preempt_last(self.tokens[index, :steps].tolist())
        self._rows.remove(last)

    def _sample(self, hidden: Tensor, chosen: list[int] | None) -> None:
        """Sample for the chosen rows, or for all, and retire those that end."""
        rows = self._rows
        device = rows.tokens.device
        which = slice(rows.count) if chosen is None else torch.tensor(chosen, device=device)
        indices, steps = rows.indices[which], rows.steps[which]
        temperature, top_k, top_p, min_p, penalty = (t[: len(indices)] for t in self._sampling)
        logits = self._logits(hidden, steps)
        seen = None if rows.seen is None else rows.seen[which]
        tokens, logprobs, truncated = ops.sample(
            logits, temperature, top_k, top_p, min_p, rows.seeds[which], steps,
            None if seen is None else penalty, seen,
        )  # fmt: skip
        self.tokens[indices, steps] = tokens
        self.logprobs[indices, steps] = logprobs
        self.truncated_logprobs[indices, steps] = truncated
        lengths = steps + 1
        self.lengths[indices] = lengths
        rows.tokens[which] = tokens
        rows.steps[which] = lengths
        if rows.seen is not None:
            rows.seen[rows.numbers[which], tokens] = 1
        self._retire(self._stopped(indices, lengths, tokens), lengths, chosen)

    def _logits(self, hidden: Tensor, steps: Tensor) -> Tensor:
        """(B, V), with the stop tokens out of reach in the first min_new_tokens steps."""
        logits = self._decoder.logits(hidden)
        if self._params.min_new_tokens and len(self._stop):
            early = (steps < self._params.min_new_tokens).unsqueeze(1)
            logits[:, self._stop] = logits[:, self._stop].masked_fill(early, float("-inf"))
        return logits

    def _stopped(self, indices: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """(B,) bool: which sequences end with these tokens, or have none."""
        stopped = torch.isin(tokens, self._stop) | (tokens < 0)
        if self._stop_strings:
            stopped |= self._stop_strings.ended(indices, lengths, tokens)
        return stopped

    def _retire(self, stopped: Tensor, steps: Tensor, chosen: list[int] | None) -> None:
        ended = (stopped | (steps >= self._params.max_new_tokens)).nonzero().flatten().tolist()
        was_stop = stopped.tolist() if ended else []
        if ended:
            self._check_drawn()
        for i in reversed(ended):  # the last row moves into a hole, so from the end
            row = i if chosen is None else chosen[i]
            sequence = self._scheduler.finish(row)
            if was_stop[i]:
                self.finish_reasons[sequence.index] = "stop"
            self._finished.append(sequence.index)
            self._rows.remove(row)

    def _check_drawn(self) -> None:
        """A CUDA kernel cannot raise: the rows whose logits are bad are told by their token."""
        rows = self._rows
        bad = rows.indices[: rows.count][rows.tokens[: rows.count] < 0].tolist()
        if bad:
            raise ValueError(
                f"logits: NaN, or no finite maximum, for {len(bad)} of {rows.count} sequences, the "
                f"first of them prompt {min(bad)}; the weights or activations have overflowed"
            )


def _sampling_tensors(
    params: SamplingParams, rows: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Temperature, top_k, top_p, min_p and penalty of every row, as `ops.sample` takes them."""

    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return (
        full(params.temperature, torch.float32),
        full(params.top_k, torch.int64),
        full(params.top_p, torch.float32),
        full(params.min_p, torch.float32),
        full(params.repetition_penalty, torch.float32),
    )
