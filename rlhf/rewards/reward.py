"""A weighted sum of a reward model and functions, which run beside the decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import collate_right, decode_completion, encode_answers, to_completion
from rlhf.engines import Engine, Engines, PlainEngine
from rlhf.models import positions_of, sequence_scores
from rlhf.rewards.functions import RewardFunction, call_function, function_name

# Scores of B sequences from right-padded ids (B, L), prompt lengths and total lengths (B,).
Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]

WORKERS = 4  # threads that run reward functions
MODEL_PART = "reward_model"  # the model's name among the parts of a score


@dataclass(frozen=True)
class Scores:
    """B scores and the parts that they are the weighted sum of."""

    total: Tensor  # (B,) fp32; NaN where every part skipped the response
    parts: dict[str, Tensor]  # name -> (B,) fp32, unweighted; NaN where skipped


class Reward:
    """The score of a response: `model_weight * model + sum of weights[i] * functions[i]`.

    A part that skips a response (None) counts as 0 in the sum; a response that all parts skip has
    no score and is not learned from.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction] = (),
        *,
        weights: Sequence[float] | None = None,
        model: nn.Module | Scorer | None = None,
        model_weight: float = 1.0,
        model_tokenizer: PreTrainedTokenizerBase | None = None,
        overlap: bool = True,
    ) -> None:
        """
        Args:
            model: a classifier with one label, or any `Scorer`.
            model_tokenizer: of a model that does not share the actor's: it reads the text, encoded
                with its own tokenizer and chat template.
            overlap: call each function with one response as soon as it ends; False: once with the
                whole batch, for functions that compare its responses.
        """
        if not functions and model is None:
            raise ValueError("a reward needs a model or a function")
        if weights is not None and len(weights) != len(functions):
            raise ValueError(
                f"{len(weights)} weights for {len(functions)} reward functions: give one for each"
            )
        self.functions = list(functions)
        self.weights = [1.0] * len(functions) if weights is None else list(weights)
        self.model = model if isinstance(model, nn.Module) else None
        self.model_weight = model_weight
        self.model_tokenizer = model_tokenizer
        self._scorer = model_scorer(PlainEngine(model)) if isinstance(model, nn.Module) else model
        self._overlap = overlap
        self._names = _distinct([function_name(f) for f in functions], taken={MODEL_PART})

    def place_model(self, engines: Engines) -> None:
        """Compute the model's scores as `engines` has it, spread over ranks or whole."""
        if self.model is not None:
            self._scorer = model_scorer(engines.frozen(self.model, role="reward"))

    def start(
        self,
        prompts: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> PendingScores:
        """Scores of B responses to come; prompts and columns have B entries each."""
        return PendingScores(self, prompts, columns, tokenizer)

    @torch.no_grad()
    def model_scores(
        self, input_ids: Tensor, prompt_lengths: Tensor, lengths: Tensor, *, micro_batch_size: int
    ) -> Tensor | None:
        """(B,) of the model alone, from right-padded ids (B, L); None without a model.

        Raises ValueError if a score is NaN or infinite.
        """
        if self._scorer is None:
            return None
        parts = [
            self._scorer(ids, prompt, total)
            for ids, prompt, total in zip(
                *(x.split(micro_batch_size) for x in (input_ids, prompt_lengths, lengths)),
                strict=True,
            )
        ]
        scores = torch.cat(parts).float()
        if not scores.isfinite().all():
            raise ValueError(
                "the reward model's scores are not finite: it has diverged, train anew"
            )
        return scores


class PendingScores:
    """Functions at work on one rollout: `submit` each response as it ends, then ask for all."""

    def __init__(
        self,
        reward: Reward,
        prompts: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._reward = reward
        self._prompts = prompts
        self._columns = columns
        self._tokenizer = tokenizer
        self._responses: dict[int, list[int]] = {}
        self._calls: list[tuple[int, list[int], Future[list[float]]]] = []
        self._pool = ThreadPoolExecutor(WORKERS) if reward.functions else None

    def submit(self, index: int, response: list[int]) -> None:
        """The tokens of one response."""
        self._responses[index] = response
        if self._reward._overlap:
            self._call([index])

    def model_scores(
        self, input_ids: Tensor, prompt_lengths: Tensor, lengths: Tensor, *, micro_batch_size: int
    ) -> Tensor | None:
        """What `Reward.model_scores` gives for the responses as the model wants to read them.

        A reward model has learned to score at EOS: it gets one after a response that was cut off,
        too. Another tokenizer than the actor's encodes the text anew.
        """
        reward = self._reward
        if reward.model is not None:
            if reward.model_tokenizer is None:
                sequences = [row[:n].tolist() for row, n in zip(input_ids, lengths, strict=True)]
                pad_id, eos_id = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
                limit = positions_of(reward.model)
                sequences = [_ended(s, int(eos_id), limit=limit) for s in sequences]
            else:
                pad_id = reward.model_tokenizer.pad_token_id
                sequences = self._encoded_anew(reward.model_tokenizer, reward.model)
            input_ids, lengths = (
                x.to(input_ids.device) for x in collate_right(sequences, int(pad_id))
            )
        return reward.model_scores(
            input_ids, prompt_lengths, lengths, micro_batch_size=micro_batch_size
        )

    def _encoded_anew(
        self, tokenizer: PreTrainedTokenizerBase, model: nn.Module
    ) -> list[list[int]]:
        """Prompts and responses in the words of another tokenizer, the most recent that fit."""
        texts = [
            decode_completion(self._responses[i], self._tokenizer)
            for i in range(len(self._prompts))
        ]
        rows = [
            {"prompt": prompt, "completion": to_completion(text, prompt)}
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]
        limit = positions_of(model)
        return [ids[-limit:] for ids in encode_answers(rows, tokenizer)]

    def scores(self, model_scores: Tensor | None, *, device: torch.device) -> Scores:
        """Wait for the functions and add everything up.

        Raises FunctionError with the name of a function that failed.
        """
        reward = self._reward
        if not reward._overlap:
            self._call(sorted(self._responses))
        found = torch.zeros(len(reward.functions), len(self._prompts))
        try:
            for number, indices, call in self._calls:
                found[number, indices] = torch.tensor(call.result(), dtype=torch.float32)
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
        parts = dict(zip(reward._names, found.to(device), strict=True))
        weights = list(reward.weights)
        if model_scores is not None:
            parts[MODEL_PART] = model_scores
            weights.append(reward.model_weight)
        stacked = torch.stack(list(parts.values()))  # (parts, B)
        total = torch.tensor(weights, device=device) @ stacked.nan_to_num(0.0)
        return Scores(torch.where(stacked.isnan().all(0), torch.nan, total), parts)

    def _call(self, indices: list[int]) -> None:
        for number, function in enumerate(self._reward.functions):
            assert self._pool is not None
            self._calls.append((number, indices, self._pool.submit(self._run, function, indices)))

    def _run(self, function: RewardFunction, indices: list[int]) -> list[float]:
        prompts = [self._prompts[i] for i in indices]
        texts = [decode_completion(self._responses[i], self._tokenizer) for i in indices]
        completions = [to_completion(t, p) for t, p in zip(texts, prompts, strict=True)]
        columns = {name: [column[i] for i in indices] for name, column in self._columns.items()}
        return call_function(function, prompts, completions, columns)


def _ended(ids: list[int], eos_id: int, *, limit: int) -> list[int]:
    """The most recent tokens that fit, with EOS at the end, in place of the last where it must."""
    ids = ids[-limit:]
    return ids if ids[-1] == eos_id else [*ids[: limit - 1], eos_id]


def model_scorer(reward: Engine) -> Scorer:
    """The scores of a reward model that shares the actor's tokenizer."""
    reward.module.eval().requires_grad_(False)
    return lambda ids, prompt_lengths, lengths: reward(sequence_scores, ids, lengths)


def _distinct(names: list[str], *, taken: set[str]) -> list[str]:
    """Names with the next free number where one is taken already."""
    distinct: list[str] = []
    for name in names:
        choices = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
        distinct.append(next(c for c in choices if c not in taken and c not in distinct))
    return distinct
