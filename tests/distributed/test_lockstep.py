"""No rank waits in vain: ranks that end early, have nothing to do, or fail."""

from __future__ import annotations

import itertools
import os
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import hybrid_engine as he
from hybrid_engine.generation import GenerationLoop
from hybrid_engine.generation.scheduler import Scheduler
from hybrid_engine.models import Decoder
from hybrid_engine.parallel import PeerError
from hybrid_engine.weights.pieces import Unpacking
from tests.distributed.ranks import RankError, run_ranks
from tests.distributed.test_gather import whole_model
from tests.distributed.zero import initialize
from tests.engine.conftest import _build as build

STREAM = {"pin_parameters": False}
SHARE = {"inference_tp_size": 2}
PIN = {"pin_parameters": True}
BOTH = STREAM | SHARE


def engine_of(config, stage=3):
    return he.HybridEngine(
        initialize(build("llama"), stage=stage).module, he.EngineConfig(**config)
    )


def _uneven(config, prompts, lengths):
    """Prompts and new tokens by rank; the sampling is the same within a tensor-parallel group."""
    rank = dist.get_rank()
    engine = engine_of(config)
    params = he.SamplingParams(max_new_tokens=lengths[rank], temperature=0.0)
    alone = he.HybridEngine(whole_model(engine._model)).generate(prompts[rank], params)
    with engine.rollout():
        for _ in range(2):
            assert torch.equal(engine.generate(prompts[rank], params).tokens, alone.tokens)
    dist.barrier()


SHORT, LONG, NONE = [[5, 6]], [[7] * 30, [8] * 3, [9]], []


@pytest.mark.parametrize(
    ("config", "prompts", "lengths"),
    [
        (STREAM, [SHORT, LONG], [2, 9]),
        (STREAM, [LONG, SHORT], [2, 9]),
        (STREAM, [NONE, LONG], [9, 9]),
        (STREAM, [NONE, NONE], [9, 9]),
        (STREAM | {"max_running": 1}, [LONG, LONG], [3, 5]),
        (PIN, [NONE, LONG], [2, 9]),
        (BOTH, [LONG, NONE], [7, 7]),
        (BOTH, [LONG, NONE, SHORT, SHORT], [9, 9, 2, 2]),
    ],
    ids=[
        "longer", "more", "none", "none_anywhere", "one_at_a_time", "pinned", "shared",
        "two_groups",
    ],
)  # fmt: skip
def test_ranks_end_together_whatever_they_have_to_do(config, prompts, lengths):
    run_ranks(_uneven, config, prompts, lengths, world=len(prompts), collective_timeout=10)


class Trouble(Exception):
    """What goes wrong on one rank."""


PLACES = {
    "flip": (Unpacking, "run", 2),
    "before any pass": (Scheduler, "admit", 1),
    "prefill": (Decoder, "_attend", 1),
    "second layer of a later pass": (Decoder, "_attend", 4),
    "before the logits": (GenerationLoop, "_sample", 2),
    "between passes": (GenerationLoop, "step", 3),
}


def _fails(config, stage, places, victim):
    """What a rank raises when the victim's method does at its nth call, by place."""
    engine, prompts = engine_of(config, stage), [[5, 6, 7], [8]]
    found = {}
    for place in places:
        owner, method, call = PLACES[place]
        real, calls = getattr(owner, method), itertools.count(1)

        def troubled(*args, real=real, calls=calls, call=call, **kwargs):
            if next(calls) == call and dist.get_rank() == victim:
                raise Trouble("out of luck")
            return real(*args, **kwargs)

        started = time.monotonic()
        with mock.patch.object(owner, method, troubled), pytest.raises(Exception) as raised:
            engine.generate(prompts, he.SamplingParams(max_new_tokens=6))
        assert time.monotonic() - started < 5
        found[place] = raised.type, str(raised.value)
        again = engine.generate(prompts, he.SamplingParams(max_new_tokens=2))
        assert again.lengths.tolist() == [2, 2]
    return found


@pytest.mark.parametrize(
    ("config", "stage"),
    [(STREAM, 3), (SHARE, 0), (BOTH, 3)],
    ids=["stream", "share", "stream_and_share"],
)
def test_what_one_rank_raises_ends_all_and_the_next_rollout_works(config, stage):
    places = [place for place in PLACES if stage == 3 or place != "flip"]  # nobody waits in that
    others, victim = run_ranks(_fails, config, stage, places, 1, collective_timeout=10)
    for place in places:
        assert victim[place] == (Trouble, "out of luck"), place
        kind, message = others[place]
        assert kind is PeerError, place
        assert message.startswith("rank 1 failed: "), place
        assert message.endswith("Trouble: out of luck"), place


def _bad_prompt(config, stage):
    engine = engine_of(config, stage)
    prompt = [5, 6, 7] if dist.get_rank() else [5, 600]
    with pytest.raises((ValueError, PeerError)) as raised:
        engine.generate([prompt], he.SamplingParams(max_new_tokens=4))
    return str(raised.value)


@pytest.mark.parametrize(("config", "stage"), [(STREAM, 3), (SHARE, 0)], ids=["stream", "share"])
def test_one_ranks_bad_prompt_is_told_to_all(config, stage):
    message = "prompt 0 has token ids outside [0, 97), the rows of the model's head"
    own, other = run_ranks(_bad_prompt, config, stage, collective_timeout=10)
    assert own == message
    assert other == f"rank 0 failed: ValueError: {message}"


def _different_sampling():
    engine = engine_of(SHARE, 0)
    with pytest.raises(ValueError, match="sample alike, all but the seed") as raised:
        engine.generate([[5]], he.SamplingParams(max_new_tokens=4 + dist.get_rank()))
    return str(raised.value)


def test_ranks_that_share_a_copy_sample_alike():
    assert all("'max_new_tokens': 5" in text for text in run_ranks(_different_sampling))


def _dies(config, stage, folder):
    engine = engine_of(config, stage)
    real = Decoder._attend

    def deadly(self, *args):
        if dist.get_rank() == 1:
            os._exit(1)
        return real(self, *args)

    with mock.patch.object(Decoder, "_attend", deadly):
        try:
            engine.generate([[5, 6, 7]], he.SamplingParams(max_new_tokens=6))
        except RuntimeError as error:
            (folder / "error").write_text(str(error))
            raise


@pytest.mark.parametrize(("config", "stage"), [(STREAM, 3), (SHARE, 0)], ids=["stream", "share"])
def test_a_rank_that_is_killed_ends_the_others(config, stage, tmp_path):
    started = time.monotonic()
    with pytest.raises(RankError):
        run_ranks(_dies, config, stage, tmp_path, collective_timeout=15)
    assert time.monotonic() - started < 12


def _alone_only():
    engine = engine_of(SHARE, 0)
    with engine.rollout(), pytest.raises(RuntimeError, match="call generate"):
        engine.start([[5]])


def test_steps_of_ones_own_need_a_rank_that_generates_alone():
    run_ranks(_alone_only)
