"""Rollouts that several ranks make together, or each on a copy that all had to gather."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hybrid_engine.cache import free_bytes
from hybrid_engine.config import EngineConfig
from hybrid_engine.generation import Rollout, SamplingParams
from hybrid_engine.generation.seeds import sequence_seeds
from hybrid_engine.models import Decoder, Family, Mode, ParallelDecoder, RolloutCopy
from hybrid_engine.parallel import Lockstep, TensorParallel, tensor_parallel, world_rank
from hybrid_engine.weights import ShardedParameters, sharded_parameters

_SHARE_OF_FREE_MEMORY = 0.8  # that a pinned copy may take; the KV cache needs some too


@dataclass(frozen=True)
class Requests:
    """The prompts that are generated for, and which of them are this rank's own."""

    prompts: list[list[int]]
    seeds: list[int]  # of each prompt's draws, as each rank would have them alone
    first: int  # place of this rank's
    count: int

    @classmethod
    def alone(
        cls, prompts: list[list[int]], params: SamplingParams, seeds: list[int] | None = None
    ) -> Requests:
        """Raises ValueError unless there is a seed for each prompt, or none at all."""
        if seeds is None:
            seeds = sequence_seeds(prompts, params.seed, rank=world_rank())
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected one for each of {len(prompts)}, got {len(seeds)}")
        return cls(prompts, seeds, 0, len(prompts))

    def own_place(self, place: int) -> int | None:
        """Where a response is in this rank's own part; None for other ranks' responses."""
        own = place - self.first
        return own if 0 <= own < self.count else None

    def own_part(self, rollout: Rollout) -> Rollout:
        """This rank's responses, cut to the longest of them."""
        if self.count == len(self.prompts):
            return rollout
        own = slice(self.first, self.first + self.count)
        lengths = rollout.lengths[own].clone()
        longest = int(lengths.max()) if self.count else 0

        def cut(x: Tensor) -> Tensor:
            return x[own, :longest].clone()

        return Rollout(
            tokens=cut(rollout.tokens),
            logprobs=cut(rollout.logprobs),
            truncated_logprobs=cut(rollout.truncated_logprobs),
            lengths=lengths,
            finish_reasons=rollout.finish_reasons[own],
        )


def joint_rollout(
    model: nn.Module, family: Family, config: EngineConfig, tp_group: Any = None
) -> JointRollout | None:
    """None where this rank has all weights, and generates alone on them."""
    shards = sharded_parameters(model)
    parallel = tensor_parallel(config.inference_tp_size, tp_group)
    if shards is None and parallel is None:
        return None
    return JointRollout(model, family, config, shards=shards, parallel=parallel)


class JointRollout:
    """What a rollout needs when its ranks depend on each other.

    ZeRO-3: each rank generates for itself, once the weights are gathered; or, streaming, with the
    others in lockstep. Tensor parallel: the ranks of a group generate for all their prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        config: EngineConfig,
        *,
        shards: ShardedParameters | None,
        parallel: TensorParallel | None,
    ) -> None:
        self._pin = config.pin_parameters
        self._parallel = parallel
        self._copy = RolloutCopy(
            model, family, shards=shards, parallel=parallel, dtype=config.rollout_dtype,
            layers_together=config.tp_gather_partition_size,
        )  # fmt: skip
        self._owed: deque[Callable[[], object]] = deque()
        device = self._copy.device
        self._everyone = Lockstep(shards.group, device, self._owed) if shards else None
        self._peers = Lockstep(parallel.group, device, self._owed) if parallel else None
        self._pinned = self._decoder(streaming=False)
        self._streaming = self._decoder(streaming=True) if shards else None
        self._is_streaming = False

    @property
    def decoder(self) -> Decoder:
        """Of the rollout that goes on."""
        if self._is_streaming:
            assert self._streaming is not None
            return self._streaming
        return self._pinned

    @property
    def in_lockstep(self) -> bool:
        """Whether the passes of this rollout have to meet those of other ranks."""
        return isinstance(self.decoder, ParallelDecoder)

    def flip(self) -> Decoder:
        """Copy the weights as they are now. Every rank that holds a part of them calls it."""
        self._copy.rebuild_if_changed()
        with contextlib.ExitStack() as stack:
            if self._everyone:
                stack.enter_context(self._everyone.together())
                self._is_streaming = self._wants_to_stream(self._everyone)
            mode: Mode = "stream" if self._is_streaming else "pin"
            self._owed.extend(self._copy.collectives(mode))
            stream = self._copy.refresh(mode, on_start=self._owed.popleft)
        if isinstance(self.decoder, ParallelDecoder):
            self.decoder.stream = stream
        self.decoder.refresh()
        return self.decoder

    def end(self) -> None:
        """Free the copy."""
        self.decoder.release()
        self._copy.drop()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Nobody leaves before all that are in lockstep do; one that fails ends all."""
        with contextlib.ExitStack() as stack:
            decoder = self.decoder
            if self._is_streaming and self._everyone and isinstance(decoder, ParallelDecoder):
                stack.enter_context(self._everyone.together(decoder.skip_pass))
            if self._peers:
                stack.enter_context(self._peers.together())
            yield

    def share(self, alone: Requests, params: SamplingParams) -> Requests:
        """The prompts of all ranks that share this one's copy, in the order of ranks.

        Raises ValueError when the ranks ask for different sampling.
        """
        if self._parallel is None or self._peers is None:
            return alone
        self._peers.begin()
        asked = self._parallel.gather_objects((alone.prompts, alone.seeds, _comparable(params)))
        first = asked[0][2]
        for rank, (_, _, other) in enumerate(asked):
            if other != first:
                raise ValueError(
                    "the ranks of a tensor-parallel group sample alike, all but the seed; its rank "
                    f"0 asks for {first}, its rank {rank} for {other}"
                )
        return Requests(
            prompts=[prompt for theirs, _, _ in asked for prompt in theirs],
            seeds=[seed for _, theirs, _ in asked for seed in theirs],
            first=sum(len(theirs) for theirs, _, _ in asked[: self._parallel.rank]),
            count=alone.count,
        )

    def least(self, value: int) -> int:
        """The smallest value of the ranks that share a copy; all of them call it."""
        return self._parallel.least(value, self._copy.device) if self._parallel else value

    def _decoder(self, *, streaming: bool) -> Decoder:
        if not streaming and self._parallel is None:
            return Decoder(self._copy.model, self._copy.family)
        return ParallelDecoder(
            self._copy,
            peers=self._peers,
            streamers=self._everyone if streaming else None,
            owed=self._owed,
        )

    def _wants_to_stream(self, everyone: Lockstep) -> bool:
        """As the config says, or because on some rank the memory is short."""
        if self._pin is not None:
            return not self._pin
        free = free_bytes(self._copy.device)
        most = float("inf") if free is None else _SHARE_OF_FREE_MEMORY * free
        return everyone.begin(vote=self._copy.bytes("pin") > most)


def _comparable(params: SamplingParams) -> dict[str, Any]:
    """Everything but the seed, as plain values."""
    values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    del values["seed"]
    if params.stop_strings is not None:
        values["stop_strings"] = params.stop_strings.stop_strings
    return values
