"""The steps as they run from the command line: folders in, folders and a report out."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hybrid_engine import EngineConfig
from rlhf import distributed
from rlhf.checkpoint import Checkpoints
from rlhf.config import STEPS, DataConfig, DPOConfig, PPOConfig, RunConfig
from rlhf.data import (
    DataBlend,
    Purpose,
    RowBatches,
    Split,
    load_tokenizer,
    read_chat_template,
    shares_of,
    texts_of,
    tokenizer_digest,
    train_tokenizer,
)
from rlhf.data.formats import last_content
from rlhf.engines import Engine, Engines
from rlhf.evaluation import (
    RunReport,
    compare_with_hf_generate,
    evaluate_policy,
    write_report,
)
from rlhf.models import (
    add_adapters,
    build_causal_lm,
    check_positions,
    load_causal_lm,
    load_critic,
    load_scorer,
    parameter_count,
    positions_of,
    save_model,
)
from rlhf.progress import Progress
from rlhf.rewards import Reward, load_function
from rlhf.tracking import ProgressBar, Stopwatch, Tracker, read_history
from rlhf.trainers import (
    DPOTrainer,
    PPOTrainer,
    RewardTrainer,
    RLHFEngine,
    SFTTrainer,
    calibration,
)
from rlhf.trainers.loop import best_folder

NORMALISATION_ROWS = 512  # demonstrations on which the reward model is set to mean 0, std 1


class Pipeline:
    """One run: each step reads what it needs from disk and leaves its model in `output_dir`."""

    def __init__(
        self, config: RunConfig, console: Console | None = None, *, resume: bool = False
    ) -> None:
        self.config = config
        self._engines = Engines(config.training, zero_stage=config.zero_stage)
        self.folder = Path(config.output_dir)
        self._progress = Progress(self.folder, config.checkpoint, resume=resume)
        self.report = RunReport()
        self._console = console or Console(quiet=not distributed.is_first())
        self._watch = Stopwatch()
        metric = config.evaluation.metric
        self._metric = load_function(metric, option="evaluation.metric") if metric else None
        self._dtype = getattr(torch, config.model.dtype)

    def run(self) -> RunReport:
        """All three steps, then the report."""
        self._progress.begin("sft", "reward", "ppo")
        for name, step in (("sft", self.sft), ("reward", self.reward)):
            if not self._restore(name):
                step()
        self.ppo()
        return self.finish()

    def finish(self, name: str = "report") -> RunReport:
        """Write and print the report on the steps that were run."""
        self.report.seconds |= self._watch.seconds
        distributed.decided_by_first(
            lambda: write_report(self.report, self.folder, self._console, name=name)
        )
        if self.report.after and not self.report.dpo:  # now PPO too has nothing left to resume
            self._end("ppo")
        return self.report

    def sft(self) -> None:
        self._progress.begin("sft")
        config = self.config.sft
        with self._watch("SFT"):
            self._seed()
            data = self._data(config.data, "demonstrations")
            model, tokenizer = self._first_model(data)
            self.report.parameters = parameter_count(model)
            self._seed_ranks()
            trainer = SFTTrainer(
                model, tokenizer, config, seed=self.config.seed, engines=self._engines
            )
            with Tracker(self.folder, "sft", resume=self._progress.resume) as tracker:
                self.report.sft = trainer.train(
                    _readable(model, data, "train", tokenizer, option="sft.data"),
                    heldout=_readable(model, data, "test", tokenizer, option="sft.data"),
                    tracker=tracker,
                    console=self._console,
                    checkpoints=self._progress.checkpoints("sft"),
                )
                self.report.histories["sft"] = tracker.history
            self._save(trainer.engine, tokenizer, "sft", base=self.config.model.path)
        self._end("sft", sft=self.report.sft)

    def reward(self) -> None:
        self._progress.begin("reward")
        config = self.config.reward
        with self._watch("reward model"):
            self._seed()
            path = config.model_path or self._from_step("sft", "reward.model_path")
            tokenizer = load_tokenizer(path)
            model = load_scorer(path, tokenizer, dtype=self._dtype, fresh_head=True)
            add_adapters(model, self.config.model.lora)
            self.report.parameters = parameter_count(model)
            self._seed_ranks()
            data = self._data(config.data, "preferences")
            trainer = RewardTrainer(
                model, tokenizer, config, seed=self.config.seed, engines=self._engines
            )
            with Tracker(self.folder, "reward", resume=self._progress.resume) as tracker:
                heldout = _readable(model, data, "test", tokenizer, option="reward.data")
                self.report.reward = trainer.train(
                    _readable(model, data, "train", tokenizer, option="reward.data"),
                    heldout=heldout,
                    tracker=tracker,
                    console=self._console,
                    checkpoints=self._progress.checkpoints("reward"),
                )
                self.report.calibration = calibration(trainer.differences(heldout))
                self.report.histories["reward"] = tracker.history
            sample = self._good_answers(data, tokenizer, positions_of(model))
            self.report.reward |= trainer.normalise(sample)
            self._save(trainer.engine, tokenizer, "reward", base=path)
        self._end("reward", reward=self.report.reward, calibration=self.report.calibration)

    def ppo(self) -> None:
        self._progress.begin("ppo")
        config = self.config.ppo
        actor_path = config.actor_path or self._from_step("sft", "ppo.actor_path")
        with self._watch("PPO"):
            self._seed()
            tokenizer = load_tokenizer(actor_path)
            actor = load_causal_lm(actor_path, tokenizer, dtype=self._dtype)
            self.report.parameters = parameter_count(actor)
            reward = self._reward(tokenizer)
            critic = self._critic(actor_path, tokenizer)
            for trained in (actor, critic):
                if trained is not None:
                    add_adapters(trained, self.config.model.lora)
            self._seed_ranks()
            engine = RLHFEngine(
                actor, critic, reward, tokenizer, engines=self._engines,
                engine_config=EngineConfig(**dataclasses.asdict(self.config.rollout)),
            )  # fmt: skip
            mixture = self._mixture(actor, tokenizer) if config.ptx_coef else None
            rows = self._prompts(config, "train", tokenizer, "ppo", actor, critic)
            self._prompts(
                config, "test", tokenizer, "ppo", actor, critic
            )  # fail now, not at the end
            trainer = PPOTrainer(engine, config, seed=self.config.seed, mixture=mixture)
            self._train_ppo(trainer, rows, self._progress.checkpoints("ppo"))
            engine.rollout_engine.release()
            self._save(trainer.actor, tokenizer, "actor", base=actor_path)
            if trainer.critic is not None:
                base = self._critic_path(actor_path, tokenizer)
                self._save(trainer.critic, tokenizer, "critic", base=base)
            if trainer.average is not None:
                averages = trainer.average.weights()
                self._save(trainer.actor, tokenizer, "actor_ema", base=actor_path, over=averages)
        with self._watch("evaluation"):
            self._evaluate(trainer.actor, trainer.reference, reward, tokenizer, config)

    def dpo(self) -> None:
        self._progress.begin("dpo")
        config = self.config.dpo
        path = config.model_path or self._from_step("sft", "dpo.model_path")
        with self._watch("DPO"):
            self._seed()
            tokenizer = load_tokenizer(path)
            model = load_causal_lm(path, tokenizer, dtype=self._dtype)
            add_adapters(model, self.config.model.lora)
            self.report.parameters = parameter_count(model)
            self._seed_ranks()
            if self._metric is not None:
                self._prompts(config, "test", tokenizer, "dpo", model)  # fail now, not at the end
            data = self._data(config.data, "preferences")
            trainer = DPOTrainer(
                model, tokenizer, config, seed=self.config.seed, engines=self._engines
            )
            with Tracker(self.folder, "dpo", resume=self._progress.resume) as tracker:
                self.report.dpo = trainer.train(
                    _readable(model, data, "train", tokenizer, option="dpo.data"),
                    heldout=_readable(model, data, "test", tokenizer, option="dpo.data"),
                    tracker=tracker,
                    console=self._console,
                    checkpoints=self._progress.checkpoints("dpo"),
                )
                self.report.histories["dpo"] = tracker.history
            self._save(trainer.engine, tokenizer, "dpo", base=path)
        if self._metric is not None:
            with self._watch("evaluation"):
                reward = Reward([self._metric])
                sft = load_causal_lm(path, tokenizer, dtype=self._dtype)
                reference = self._engines.frozen(sft, role="reference")
                self._evaluate(trainer.engine, reference, reward, tokenizer, config)
        self._end("dpo", dpo=self.report.dpo)

    def _reward_path(self) -> str | None:
        """Of the reward model; None where functions alone score."""
        config = self.config.ppo
        if config.reward_path is None and config.reward_functions:
            return None
        return config.reward_path or self._from_step("reward", "ppo.reward_path")

    def _reward(self, tokenizer: PreTrainedTokenizerBase) -> Reward:
        config, path = self.config.ppo, self._reward_path()
        model, own = None, None
        if path is not None:
            own = self._other_tokenizer(path, tokenizer)
            model = load_scorer(path, own or tokenizer, dtype=self._dtype)
        return Reward(
            [
                load_function(path, option="ppo.reward_functions")
                for path in config.reward_functions
            ],
            weights=config.reward_weights,
            model=model,
            model_weight=config.reward_model_weight if config.reward_functions else 1.0,
            model_tokenizer=own,
            overlap=config.reward_overlap,
        )

    def _critic(self, actor_path: str, tokenizer: PreTrainedTokenizerBase) -> nn.Module | None:
        if self.config.ppo.algorithm != "ppo":
            return None
        path = self._critic_path(actor_path, tokenizer)
        return load_critic(path, tokenizer, dtype=self._dtype)

    def _critic_path(self, actor_path: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The given one, else the reward model if it reads the actor's tokens, else the actor."""
        if given := self.config.ppo.critic_path:
            if self._other_tokenizer(given, tokenizer) is not None:
                raise ValueError(
                    f"the critic {given} has another tokenizer than the actor {actor_path}: it has "
                    "to read the actor's tokens; give one from the same base model, or none"
                )
            return given
        path = self._reward_path()
        if path is None or self._other_tokenizer(path, tokenizer) is not None:
            return actor_path
        return path

    def _other_tokenizer(
        self, path: str, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedTokenizerBase | None:
        """The tokenizer in a folder; None if it gives the same ids as this one."""
        own = load_tokenizer(path)
        return None if tokenizer_digest(own) == tokenizer_digest(tokenizer) else own

    def _mixture(self, actor: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        given = self.config.ppo.ptx_data
        data = self._data(given or self.config.sft.data, "demonstrations")
        option = "ppo.ptx_data" if given else "sft.data"
        return _readable(actor, data, "train", tokenizer, option=option)

    def _good_answers(
        self, pairs: DataBlend, tokenizer: PreTrainedTokenizerBase, positions: int
    ) -> list[list[int]]:
        """What the reward model is to score 0 on average: demonstrations, or the pairs' better
        sides where there are no demonstrations but made-up ones."""
        section = self.config.sft.data
        if self.config.is_synthetic(section) and not self.config.is_synthetic(
            self.config.reward.data
        ):
            return _encoded(pairs, "train", tokenizer)[:NORMALISATION_ROWS]["chosen_ids"]
        rows = _encoded(self._data(section, "demonstrations"), "train", tokenizer)
        return [ids[-positions:] for ids in rows[:NORMALISATION_ROWS]["input_ids"]]

    def _prompts(
        self,
        config: PPOConfig | DPOConfig,
        split: Split,
        tokenizer: PreTrainedTokenizerBase,
        step: str,
        *models: nn.Module | None,
    ) -> Dataset:
        """Prompts to which all the models can read a whole response."""
        rows = _encoded(self._data(config.data, "prompts"), split, tokenizer)
        for model in models:
            if model is not None:
                check_positions(
                    rows, model, option=f"{step}.data", max_new_tokens=config.max_new_tokens
                )
        return rows

    def _train_ppo(self, trainer: PPOTrainer, rows: Dataset, checkpoints: Checkpoints) -> None:
        config = self.config.ppo
        batches = RowBatches(len(rows), config.batch_size, whole=True, seed=self.config.seed)
        done = checkpoints.begin(trainer.saved, {"trainer": trainer, "data": batches})
        with (
            Tracker(self.folder, "ppo", resume=self._progress.resume) as tracker,
            ProgressBar("PPO", config.iterations, self._console, done=done) as bar,
        ):
            tracker.rewind(done)
            for step in range(done + 1, config.iterations + 1):
                columns = rows[next(batches)]
                experience = trainer.generate_experience(columns.pop("input_ids"), columns)
                trainer.train_rlhf(experience)
                metrics = trainer.metrics
                tracker.log(step, metrics)
                bar.advance(
                    tokens=int(experience.lengths.sum()),
                    score=metrics["objective/scores"],
                    kl=metrics["objective/kl"],
                )
                checkpoints.after(step, last=config.iterations)
            self.report.histories["ppo"] = tracker.history

    def _evaluate(
        self,
        actor: Engine,
        sft: Engine,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        step: PPOConfig | DPOConfig,
    ) -> None:
        evaluation = self.config.evaluation
        rows = _encoded(self._data(step.data, "prompts"), "test", tokenizer)
        rows = rows.select(range(min(evaluation.prompts, len(rows))))
        options: dict[str, Any] = {
            "max_new_tokens": step.max_new_tokens,
            "metric": self._metric,
            "engine_config": EngineConfig(**dataclasses.asdict(self.config.rollout)),
        }
        self.report.before = evaluate_policy(sft, sft, reward, tokenizer, rows, **options)
        self.report.after = evaluate_policy(actor, sft, reward, tokenizer, rows, **options)
        answers = zip(
            rows["prompt"], self.report.before.completions, self.report.after.completions,
            strict=False,
        )  # fmt: skip
        self.report.samples = [
            (last_content(prompt).strip(), before.strip(), after.strip())
            for prompt, before, after in list(answers)[: evaluation.samples]
        ]
        if evaluation.compare_hf_generate:
            prompts = list(rows["input_ids"])[: step.batch_size]
            with actor.gathered():  # for HF's generate; ranks may share the weights of ours
                self.report.throughput = compare_with_hf_generate(
                    actor.module, tokenizer, prompts, max_new_tokens=step.max_new_tokens
                )

    # ---- what the steps share --------------------------------------------------------------------

    def _save(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        base: str | None,
        over: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A model's folder in the output folder; `over` are weights to take in place of its own."""
        weights = engine.weights()
        dtypes = {n: weights[n].dtype for n in over or ()}
        weights |= {n: weight.to(dtypes[n]) for n, weight in (over or {}).items()}
        path = self.folder / name
        distributed.decided_by_first(
            lambda: save_model(engine.module, tokenizer, path, base=base, weights=weights)
        )

    def _end(self, step: str, **results: Any) -> None:
        seconds, parameters = self._watch.seconds, self.report.parameters
        self._progress.end(step, seconds=seconds, parameters=parameters, **results)
        if distributed.is_first():
            shutil.rmtree(best_folder(self.folder, step), ignore_errors=True)

    def _restore(self, step: str) -> bool:
        """Whether the run that is resumed had ended a step; its results are in the report then."""
        results = self._progress.results(step)
        if results is None:
            return False
        self.report.seconds |= results.pop("seconds")
        for name, value in results.items():
            setattr(self.report, name, value)
        self.report.histories[step] = read_history(self.folder / f"{step}.jsonl")
        return True

    def _first_model(self, data: DataBlend) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model = self.config.model
        if model.path is None and model.init is None:
            raise ValueError(
                "no model: give model.path, a folder or hub name, or model.init, a config for "
                "random weights"
            )
        tokenizer: PreTrainedTokenizerBase
        if source := model.tokenizer or model.path:
            tokenizer = load_tokenizer(
                source, chat_template=model.chat_template, eos_token=model.eos_token
            )
        else:
            texts = texts_of(row for part in data.parts("train") for row in part)
            template = model.chat_template and read_chat_template(model.chat_template)
            tokenizer = distributed.decided_by_first(
                lambda: train_tokenizer(texts, vocab_size=model.vocab_size, chat_template=template)
            )
        if model.init is not None:
            return build_causal_lm(model.init, tokenizer, dtype=self._dtype), tokenizer
        assert model.path is not None
        pretrained = load_causal_lm(model.path, tokenizer, dtype=self._dtype)
        return add_adapters(pretrained, model.lora), tokenizer

    def _data(self, section: DataConfig, purpose: Purpose) -> DataBlend:
        fractions = self.config.fractions
        share = shares_of(fractions)[STEPS.index(purpose)] if fractions else (0.0, 1.0)
        data = self.config.data_of(section)
        return DataBlend(data, purpose, share=share, seed=self.config.seed)

    def _from_step(self, step: str, option: str) -> str:
        folder = self.folder / step
        if not (folder / "config.json").exists():
            raise ValueError(
                f"no {step} model in {folder}: run `rlhf {step}` with this output_dir first, or "
                f"give --{option}"
            )
        return str(folder)

    def _seed(self) -> None:
        torch.manual_seed(self.config.seed)
        random.seed(self.config.seed)

    def _seed_ranks(self) -> None:
        """Once the models are the same on all ranks: chance, such as dropout, is to differ."""
        if distributed.rank():
            torch.manual_seed(self.config.seed + 1_000_003 * distributed.rank())


def _readable(
    model: nn.Module,
    data: DataBlend,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    *,
    option: str,
) -> Dataset:
    """Encoded rows for whose tokens the model has positions; else ValueError."""
    return check_positions(_encoded(data, split, tokenizer), model, option=option)


def _encoded(data: DataBlend, split: Split, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """One rank fills the cache, the others read it."""
    with distributed.first_rank_first():
        return data.encoded(split, tokenizer)
