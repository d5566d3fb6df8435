"""`accelerate` on a model that DeepSpeed trains: HF's generate, gathered once."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

import hybrid_engine as he
from tests.distributed.ranks import run_ranks
from tests.distributed.test_gather import whole_model
from tests.distributed.zero import initialize, train_one_step
from tests.engine.conftest import _build as build


def _generates(config):
    trainer = initialize(build("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        he.accelerate(trainer, he.EngineConfig(**config))
    rank = dist.get_rank()
    prompts = torch.arange(3 * (4 + rank)).view(3, -1) + 5  # other lengths on the other rank
    options = {"max_new_tokens": 3 + 4 * rank, "do_sample": False, "pad_token_id": 0}
    if config:
        options["max_new_tokens"] = 6
    for _ in range(2):
        expected = whole_model(trainer.module).generate(prompts, **options)
        assert torch.equal(trainer.module.generate(prompts, **options), expected)
        trainer.module.train()
        train_one_step(trainer)
    state = he.acceleration(trainer)
    assert state.check.passed
    return state.served, state.fallbacks


@pytest.mark.parametrize("config", [{}, {"inference_tp_size": 2}], ids=["zero3", "zero3-tp2"])
def test_hf_generate_of_a_partitioned_model_is_served(config):
    assert run_ranks(_generates, config) == [(2, {})] * 2


def _scores():
    trainer = initialize(build("llama"))
    he.accelerate(trainer)
    with pytest.warns(RuntimeWarning, match="scores of a model that ZeRO-3 partitions"):
        output = trainer.module.generate(
            torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, synced_gpus=True,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    return len(output.scores)


def test_scores_come_from_hf():
    assert run_ranks(_scores) == [3, 3]
