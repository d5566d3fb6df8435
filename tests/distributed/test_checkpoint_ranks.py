"""Checkpoints of several ranks: a kill at any moment leaves a whole one; other worlds load it."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlhf.checkpoint import Checkpoints
from rlhf.config import CheckpointConfig
from tests.distributed import training
from tests.distributed.ranks import RankError, run_ranks


def kill_at(places: int, victim: int) -> None:
    """Kill this process at the given call among those that a save consists of."""
    if dist.get_rank() != victim:
        return
    left = [places]

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    dist.barrier = counted(dist.barrier)
    torch.save = counted(torch.save)
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    shutil.rmtree = counted(shutil.rmtree)


def train(folder: Path, options: dict[str, Any], *, stage: int, resume: bool, kill: Any = None):
    """Six steps, a checkpoint after each; the losses, and the step that they begin after."""
    engine = training.engine_of(training.llama(), stage, steps=6, **options)
    saved = Checkpoints(folder, CheckpointConfig(), every=1, resume=resume)
    done = saved.begin({"model": engine}, {})
    losses = []
    for step in range(done + 1, 7):
        losses.append(training.train_step(engine, step)["loss"])
        if kill is not None and step == 4:
            kill_at(*kill)
        saved.after(step, last=6)
    return done, losses


def _train(folder: Path, options: dict[str, Any], stage: int, resume: bool, kill: Any) -> Any:
    return train(folder, options, stage=stage, resume=resume, kill=kill)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("deepspeed") / "config.json"
    path.write_text(training.PERSIST_NOTHING)
    return {"deepspeed_config": str(path)}


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def whole(request: pytest.FixtureRequest, options, tmp_path_factory) -> tuple[int, list[float]]:
    folder = tmp_path_factory.mktemp("whole")
    (_, losses), _ = run_ranks(_train, folder, options, request.param, False, None)
    return request.param, losses


@pytest.mark.parametrize("victim", [0, 1], ids=["rank0", "rank1"])
def test_killed_while_it_saves(whole, options, tmp_path: Path, victim: int) -> None:
    """At some place in the save after step 4: step 3 or 4 is there, and goes on exactly."""
    stage, losses = whole
    places = random.Random(10 * stage + victim).randrange(20)
    patience: dict[str, Any] = {"timeout": 150.0, "collective_timeout": 60.0}
    with pytest.raises(RankError, match=rf"rank {victim} died|losed by peer|reset by peer"):
        run_ranks(_train, tmp_path, options, stage, False, (places, victim), **patience)
    for done, found in run_ranks(_train, tmp_path, options, stage, True, None, **patience):
        assert done in (3, 4), places
        assert found == losses[done:], places
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000005", "step-00000006"]


def _resume(folder: Path, options: dict[str, Any], stage: int) -> Any:
    engine = training.engine_of(training.llama(), stage, steps=6, **options)
    saved = Checkpoints(folder, CheckpointConfig(), every=0, resume=True)
    done = saved.begin({"model": engine}, {})
    return done, [training.train_step(engine, step)["loss"] for step in (7, 8)], engine.weights()


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [
        pytest.param(0, 2, 1, id="zero0-W2-W1", marks=pytest.mark.slow),
        pytest.param(2, 1, 2, id="zero2-W1-W2"),
        pytest.param(2, 2, 1, id="zero2-W2-W1", marks=pytest.mark.slow),
        pytest.param(3, 1, 2, id="zero3-W1-W2", marks=pytest.mark.slow),
        pytest.param(3, 2, 1, id="zero3-W2-W1"),
    ],
)
def test_resumed_on_another_number_of_ranks(
    options, tmp_path: Path, stage: int, before: int, after: int
) -> None:
    run_ranks(_train, tmp_path, options, stage, False, None, world=before)
    same = run_ranks(_resume, tmp_path, options, stage, world=before)[0]
    other = run_ranks(_resume, tmp_path, options, stage, world=after)[0]
    assert same[0] == other[0] == 6
    assert other[1] == pytest.approx(same[1], rel=1e-5)
    for name, weight in same[2].items():
        torch.testing.assert_close(other[2][name], weight, rtol=1e-4, atol=1e-5)
