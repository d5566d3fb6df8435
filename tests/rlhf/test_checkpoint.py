"""Checkpoints on one process: all that is needed to go on, whole or not there."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.checkpoint import Checkpoints, random_state, restore_random_state
from rlhf.config import (
    CheckpointConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
)
from rlhf.data import RowBatches
from rlhf.engines import SingleProcessEngine
from rlhf.pipeline import Pipeline
from rlhf.progress import Progress
from rlhf.tracking import Tracker
from rlhf.trainers import PPOTrainer, RewardTrainer, RLHFEngine, SFTTrainer
from rlhf.trainers.loop import BestWeights, best_folder

PROMPTS = [[1, 50, 60], [1], [1, *range(70, 82)], [1, 90, 91, 92, 93], [1, 33], [1, 44, 45]]
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


class Killed(BaseException):
    """Where a test ends a run."""


class Part:
    """Something with a state."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]

    def save(self, folder: Path) -> None:
        (folder / "part").write_text(str(self.value))

    def load(self, folder: Path) -> None:
        self.value = int((folder / "part").read_text())


def checkpoints(folder: Path, *, every: int = 1, keep: int = 2, resume: bool = False):
    return Checkpoints(folder, CheckpointConfig(keep=keep), every=every, resume=resume)


def written(folder: Path, *steps: int, **options: Any) -> None:
    """Checkpoints after these steps; the parts' values are the step's number."""
    part = Part(0)
    found = checkpoints(folder, **options)
    assert found.begin({"engine": part}, {"state": part}) == 0
    for step in steps:
        part.value = step
        found.after(step, last=steps[-1])


def resumed(folder: Path) -> tuple[int, int, int]:
    """The step, and the values of both parts."""
    parts = Part(-1), Part(-1)
    step = checkpoints(folder, resume=True).begin({"engine": parts[0]}, {"state": parts[1]})
    return step, parts[0].value, parts[1].value


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_resumed(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3)
    assert resumed(tmp_path) == (3, 3, 3)


def test_a_run_refuses_before_it_touches_anything(tmp_path: Path) -> None:
    """PPO did not end: the steps before it are not done again, and no metrics are lost."""
    written(tmp_path / "checkpoints" / "ppo", 1)
    (tmp_path / "sft.jsonl").write_text("metrics\n")
    for start in ("run", "ppo"):
        pipeline = Pipeline(RunConfig(output_dir=str(tmp_path)))
        with pytest.raises(ValueError, match="give --resume to go on from step-00000001"):
            getattr(pipeline, start)()
    assert names(tmp_path) == ["checkpoints", "sft.jsonl"]
    assert (tmp_path / "sft.jsonl").read_text() == "metrics\n"
    Progress(tmp_path, CheckpointConfig(), resume=True).begin("sft", "reward", "ppo")


def best_of(folder: Path, part: Part, saved: Checkpoints | None = None) -> BestWeights:
    return BestWeights(part, best_folder(folder, "sft"), saved)  # type: ignore[arg-type]


def offer(best: BestWeights, step: int, loss: float, *, last: bool = False) -> None:
    best.offer(step, {"eval/loss": loss}, last=last, keep=True)


def test_best_weights_outlive_a_model_that_could_not_be_saved(tmp_path: Path) -> None:
    first = best_of(tmp_path, part := Part(1))
    offer(first, 1, 1.0)
    second = best_of(tmp_path, again := Part(3))
    second.load_state_dict(first.state_dict())
    for weights in (first, second):
        weights.take_back()
    assert part.value == again.value == 1
    first.forget()
    assert not best_folder(tmp_path, "sft").exists()


def test_the_last_weights_are_the_best_without_being_written(tmp_path: Path) -> None:
    best = best_of(tmp_path, part := Part(1))
    offer(best, 1, 1.0)
    part.value = 2
    offer(best, 2, 0.5, last=True)
    best.take_back()
    assert part.value == 2
    assert best.metrics == {"eval/loss": 0.5, "eval/step": 2.0}


def bests(folder: Path) -> list[int]:
    return [int(name[5:]) for name in names(best_folder(folder, "sft"))]


def test_each_checkpoint_has_the_best_weights_of_its_time(tmp_path: Path) -> None:
    """Better ones that came later, of a run that was killed then, are not taken for them."""
    saved = checkpoints(tmp_path / "checkpoints", every=2)
    best = best_of(tmp_path, part := Part(0), saved)
    best.begin(saved.begin({"engine": part}, {"best": best}))
    for step, kept in ((1, [1]), (2, [2]), (3, [2, 3]), (4, [2, 4]), (5, [2, 4, 5])):
        part.value = step
        offer(best, step, 1 / step)
        assert bests(tmp_path) == kept
        saved.after(step, last=10)
    for checkpoint in (4, 2):
        again = checkpoints(tmp_path / "checkpoints", every=2, resume=True)
        best = best_of(tmp_path, part := Part(0), again)
        assert again.begin({"engine": part}, {"best": best}) == checkpoint
        best.begin(checkpoint)
        assert bests(tmp_path)[-1] == checkpoint
        part.value = -1
        best.take_back()
        assert part.value == checkpoint
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{checkpoint:08d}")


def test_best_weights_of_another_run_are_not_taken(tmp_path: Path) -> None:
    """Nor what killed writing of them left."""
    offer(best_of(tmp_path, Part(7)), 7, 0.1)
    (best_folder(tmp_path, "sft") / "step-00000009.unfinished").mkdir()
    best = best_of(tmp_path, Part(1))
    best.begin(0)
    assert names(best_folder(tmp_path, "sft")) == []
    offer(best, 1, 1.0)
    assert bests(tmp_path) == [1]


@pytest.mark.parametrize("how", ["torn", "missing", "no manifest", "foreign manifest", "renamed"])
def test_damaged_best_weights_are_told_when_resuming(tmp_path: Path, how: str) -> None:
    best = best_of(tmp_path, Part(1))
    offer(best, 1, 1.0)
    folder = best_folder(tmp_path, "sft") / "step-00000001"
    if how == "torn":
        (folder / "part").write_text("")
    elif how == "missing":
        shutil.rmtree(folder)
    elif how == "renamed":
        offer(best, 2, 0.5)
        (folder.parent / "step-00000002").rename(folder)
        best.step = 1
    else:
        damage(folder, how)
    with pytest.raises(ValueError, match=r"step-00000001.*best weights so far; remove") as error:
        best_of(tmp_path, Part(0)).load_state_dict(best.state_dict())
    assert "\n" not in str(error.value)


def test_nothing_to_resume_is_a_start(tmp_path: Path) -> None:
    assert resumed(tmp_path / "nowhere") == (0, -1, -1)


def test_every_so_many_steps_and_the_last(tmp_path: Path) -> None:
    written(tmp_path, *range(1, 12), every=4, keep=100)
    assert names(tmp_path) == ["step-00000004", "step-00000008", "step-00000011"]


def test_the_last_n_are_kept(tmp_path: Path) -> None:
    written(tmp_path, *range(1, 12), keep=3)
    assert names(tmp_path) == [f"step-{n:08d}" for n in (9, 10, 11)]


def test_none_are_written_when_switched_off(tmp_path: Path) -> None:
    written(tmp_path / "off", 1, 2, every=0)
    assert not (tmp_path / "off").exists()


def test_a_run_that_did_not_end_is_not_begun_anew(tmp_path: Path) -> None:
    written(tmp_path, 1)
    with pytest.raises(ValueError, match=r"give --resume to go on from step-00000001, or remove"):
        written(tmp_path, 1)
    assert resumed(tmp_path) == (1, 1, 1)


def test_leftovers_of_a_killed_save_are_passed_over(tmp_path: Path) -> None:
    written(tmp_path, 1)
    for name in ("step-00000002.unfinished", "step-00000000.removed"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    assert resumed(tmp_path) == (1, 1, 1)
    assert names(tmp_path) == ["step-00000001"]


def damage(folder: Path, how: str) -> None:
    if how == "torn":
        (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:-1])
    elif how == "missing":
        (folder / "engine" / "part").unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "foreign manifest":
        (folder / "manifest.json").write_text('{"format": "another"}')


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("torn", r"torn: .*state\.pt has \d+ bytes, \d+ expected"),
        ("missing", r"torn: .*part is missing"),
        ("no manifest", "is no checkpoint of rlhf"),
        ("foreign manifest", "is no checkpoint of rlhf"),
    ],
)
def test_damage_is_told_and_the_one_before_is_there(tmp_path: Path, how: str, message: str) -> None:
    written(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002", how)
    with pytest.raises(ValueError, match=rf"{message}.*remove .*step-00000002") as error:
        resumed(tmp_path)
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "step-00000002")
    assert resumed(tmp_path) == (1, 1, 1)


def test_another_training_step(tmp_path: Path) -> None:
    written(tmp_path, 1)
    with pytest.raises(ValueError, match="another training step: it has no critic"):
        checkpoints(tmp_path, resume=True).begin({"engine": Part(0), "critic": Part(0)}, {})


def test_another_model(causal_lm, tmp_path: Path) -> None:
    """Nothing of it is loaded."""
    engine = SingleProcessEngine(causal_lm(), OPTIMIZER, total_steps=1)
    engine.save(tmp_path)
    for options in ({"num_hidden_layers": 1}, {"intermediate_size": 32}):
        other = SingleProcessEngine(causal_lm(**options), OPTIMIZER, total_steps=1)
        before = {name: weight.clone() for name, weight in other.weights().items()}
        with pytest.raises(ValueError, match=r"checkpoint of another model: model\.layers"):
            other.load(tmp_path)
        assert_same(other.weights(), before)


def test_every_random_number_generator_goes_on(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), random.gauss(), np.random.normal()

    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    draw()  # leaves the second of a pair of normals behind
    torch.save(random_state(), tmp_path / "state.pt")
    expected = [draw(), draw()]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw(), draw()] == expected


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {n: v for n, v in record.items() if not n.startswith(("timing_s/", "perf/"))}
        for record in history
    ]


PPO: dict[str, dict[str, Any]] = {
    "ppo": {"kl_target": 0.05, "kl_horizon": 50, "mini_batches": 2, "epochs": 2},
    "ema-ptx": {"ema_decay": 0.9, "ptx_coef": 0.1},
    "grpo": {"algorithm": "grpo", "samples_per_prompt": 3},
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("name", PPO)
def test_ppo_goes_on_bit_for_bit(
    causal_lm, scorer, tokenizer, demonstrations, tmp_path: Path, one_thread, name: str, dtype
) -> None:
    """Killed after two of four iterations, and resumed on models of other weights."""

    def run(folder: Path, seed: int, *, resume: bool, kill: int = 0):
        actor, reward = causal_lm(seed=seed).to(dtype), scorer(seed=2).to(dtype)
        critic = scorer(seed=1 + seed).to(dtype) if name != "grpo" else None
        config = PPOConfig(
            batch_size=3, iterations=4, max_new_tokens=8, actor_optimizer=OPTIMIZER,
            critic_optimizer=OPTIMIZER, **PPO[name],
        )  # fmt: skip
        engine = RLHFEngine(actor, critic, reward, tokenizer)
        trainer = PPOTrainer(engine, config, seed=3, mixture=demonstrations)
        trainer.reference.module.load_state_dict(causal_lm(seed=0).state_dict())
        batches = RowBatches(len(PROMPTS), 3, whole=True, seed=1)
        saved = checkpoints(folder, resume=resume)
        done = saved.begin(trainer.saved, {"trainer": trainer, "data": batches})
        history = []
        for step in range(done + 1, 5):
            experience = trainer.generate_experience([PROMPTS[i] for i in next(batches)])
            trainer.train_rlhf(experience)
            history.append(dict(trainer.metrics))
            saved.after(step, last=4)
            if step == kill:
                return history, {}
        weights = trainer.actor.weights()
        if trainer.critic is not None:
            weights |= {f"critic.{n}": w for n, w in trainer.critic.weights().items()}
        if trainer.average is not None:
            weights |= {f"average.{n}": w for n, w in trainer.average.weights().items()}
        return history, weights

    whole, weights = run(tmp_path / "whole", 0, resume=False)
    first, _ = run(tmp_path / "killed", 0, resume=False, kill=2)
    rest, found = run(tmp_path / "killed", 7, resume=True)
    assert without_time(first + rest) == without_time(whole)
    assert_same(found, weights)


@pytest.fixture
def demonstrations(sequences):
    import datasets

    masks = [[0, *[1] * (len(row) - 1)] for row in sequences]
    return datasets.Dataset.from_dict({"input_ids": sequences, "loss_mask": masks})


@pytest.mark.parametrize("step", ["sft", "reward"])
def test_sft_and_reward_go_on_bit_for_bit(
    causal_lm, scorer, tokenizer, demonstrations, tmp_path: Path, console, one_thread, step: str
) -> None:
    """With dropout, whose generator is part of the state; the log has each step once."""
    import datasets

    ids = demonstrations["input_ids"]
    pairs = datasets.Dataset.from_dict({"chosen_ids": ids, "rejected_ids": ids[::-1]})
    options = {"epochs": 3, "batch_size": 2, "optimizer": OPTIMIZER}

    def run(folder: Path, seed: int, *, resume: bool, kill: int = 0):
        model = (causal_lm if step == "sft" else scorer)("opt", seed=seed, dropout=0.3)
        kind, config = (
            (SFTTrainer, SFTConfig(**options))
            if step == "sft"
            else (RewardTrainer, RewardConfig(**options))
        )
        trainer: Any = kind(model, tokenizer, config, seed=1)
        saved = checkpoints(folder / "checkpoints", resume=resume)
        after, counter = saved.after, itertools.count(1)

        def kill_after(step: int, *, last: int) -> None:
            after(step, last=last)
            if next(counter) == kill:
                raise Killed

        saved.after = kill_after  # type: ignore[method-assign]
        torch.manual_seed(seed)
        rows = demonstrations if step == "sft" else pairs
        with Tracker(folder, step, resume=resume) as tracker:
            trainer.train(rows, tracker=tracker, console=console, checkpoints=saved)
        return tracker.history, (folder / f"{step}.jsonl").read_text(), trainer.engine.weights()

    whole = run(tmp_path / "whole", 0, resume=False)
    with pytest.raises(Killed):
        run(tmp_path / "killed", 0, resume=False, kill=3)
    (tmp_path / "killed" / f"{step}.jsonl").open("a").write('{"step": 4, "torn')
    history, lines, weights = run(tmp_path / "killed", 7, resume=True)
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5, 6]
    assert history == whole[0]
    assert lines == whole[1]
    assert_same(weights, whole[2])
