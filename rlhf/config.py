"""Every option of the pipeline: typed, checked, with the sentence that `--help` prints."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

ZeroStage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "all"]
STEPS = ("demonstrations", "preferences", "prompts")  # what the three read, in data_split's order


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _not_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")


def _fraction(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (PEFT) instead of all weights, in every step."""

    r: int = 0
    """Rank of the adapters; 0: train all weights."""
    alpha: int = 16
    """Adapters are scaled by alpha / r."""
    dropout: float = 0.0
    """On the adapters' input, in SFT, reward model and DPO."""
    target_modules: list[str] | None = None
    """Names of the layers to adapt, such as [q_proj, v_proj]; default: every linear layer."""

    def __post_init__(self) -> None:
        _positive(self, "alpha")
        _fraction(self, "dropout")
        if self.r < 0:
            raise ValueError(f"lora.r must be 0 or more, got {self.r}")


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained model that the first step starts from."""

    path: str | None = None
    """Folder or hub name of a Hugging Face causal language model."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; default: the model's."""
    chat_template: str | None = None
    """Jinja template of dialogues, or a file that holds it; default: the tokenizer's own."""
    eos_token: str | None = None
    """The token that ends a response; default: the tokenizer's own."""
    init: dict[str, Any] | None = None
    """Instead of path: the config of a randomly initialised model, with its model_type."""
    vocab_size: int = 1024
    """With init and no tokenizer: size of a byte-level BPE trained on the SFT data."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters; r above 0 switches them on."""

    def __post_init__(self) -> None:
        if self.path is not None and self.init is not None:
            raise ValueError("model.path and model.init exclude each other; give one")
        if self.init is not None and "model_type" not in self.init:
            raise ValueError('model.init needs a model_type, such as {"model_type": "llama"}')


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a mix."""

    name: str = "synthetic"
    """`synthetic`, `arithmetic`, a .json, .jsonl, .parquet or .arrow file, a folder, a hub name."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    splits: dict[Literal["train", "test"], str] | None = None
    """The dataset's names for its splits, such as {train: train_prefs, test: test_prefs}."""
    columns: dict[str, str] | None = None
    """Our name for a column -> the dataset's, such as {prompt: instruction}."""
    weight: float | None = None
    """Share of the rows, in any unit; default: the number of rows it has."""

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}; leave the dataset out")


@dataclass(frozen=True)
class DataConfig:
    """The data of one step: a dataset, or several mixed."""

    name: str = "synthetic"
    """`synthetic`, `arithmetic`, a .json, .jsonl, .parquet or .arrow file, a folder, a hub name."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    splits: dict[Literal["train", "test"], str] | None = None
    """The dataset's names for its splits, such as {train: train_prefs, test: test_prefs}."""
    columns: dict[str, str] | None = None
    """Our name for a column -> the dataset's, such as {prompt: instruction}."""
    mix: list[SourceConfig] | None = None
    """Instead of name: several datasets, such as [{name: a, weight: 2}, {name: b, weight: 1}]."""
    rows: int | None = None
    """At most so many training rows; for `synthetic`, how many to generate."""
    heldout_rows: int = 500
    """At most so many rows held out for evaluation."""
    heldout_fraction: float = 0.05
    """Share of the prompts held out when the dataset has no such split."""
    max_length: int = 512
    """Tokens of prompt and completion together; a PPO prompt alone."""

    def __post_init__(self) -> None:
        _positive(self, "heldout_rows", "max_length")
        _fraction(self, "heldout_fraction")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows must be positive, got {self.rows}")
        if self.mix is not None and not self.mix:
            raise ValueError("mix is empty: give at least one dataset, or leave it out")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("mix: give every dataset a weight, or none")

    @property
    def sources(self) -> list[SourceConfig]:
        """The datasets to mix; one where there is no mix."""
        if self.mix is not None:
            return self.mix
        return [SourceConfig(self.name, self.subset, self.splits, self.columns)]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 1e-5
    """The highest learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up, to a tenth of its height."""
    warmup_fraction: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "max_grad_norm")
        _fraction(self, "warmup_fraction")


@dataclass(frozen=True)
class ShardingConfig:
    """How one model is spread over processes; what is not given is as for all models."""

    zero_stage: ZeroStage | None = None
    """ZeRO stage of this model."""
    offload: Offload | None = None
    """What of this model lies in the CPU's memory."""


@dataclass(frozen=True)
class TrainingConfig:
    """How models are spread over processes, and what memory their training takes."""

    offload: Offload = "none"
    """To the CPU's memory: the optimizer's state, or (all, with ZeRO 3) the weights too."""
    adam: Literal["fused", "cpu"] = "fused"
    """AdamW of torch, or DeepSpeed's for offload on a GPU, which is compiled when first used."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time. Not with ZeRO
    stage 3."""
    deepspeed_config: str | None = None
    """JSON file, merged over the DeepSpeed configuration that is made from these options."""
    actor: ShardingConfig = field(default_factory=ShardingConfig)
    """The model of SFT, and PPO's actor."""
    critic: ShardingConfig = field(default_factory=ShardingConfig)
    """The model of the reward step, and PPO's critic."""
    reference: ShardingConfig = field(default_factory=ShardingConfig)
    """PPO's reference."""
    reward: ShardingConfig = field(default_factory=ShardingConfig)
    """PPO's reward model."""
    ema: ShardingConfig = field(default_factory=ShardingConfig)
    """The actor's moving average, which is always divided among the processes."""


@dataclass(frozen=True)
class SFTConfig:
    """Step 1, supervised fine-tuning: cross-entropy on the completions."""

    data: DataConfig = field(default_factory=DataConfig)
    """Demonstrations."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    epochs: int = 1
    """Passes over the data."""
    batch_size: int = 32
    """Rows in an optimizer step."""
    micro_batch_size: int = 32
    """Rows in a forward pass; memory, not results, depends on it."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations on held-out rows; default: an epoch."""
    keep_best: bool = True
    """Keep the weights of the lowest held-out loss; false: the last."""

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "micro_batch_size")
        if self.eval_steps is not None:
            _positive(self, "eval_steps")


@dataclass(frozen=True)
class RewardConfig:
    """Step 2, the reward model: pairwise loss on preferences."""

    data: DataConfig = field(default_factory=DataConfig)
    """Preference pairs."""
    model_path: str | None = None
    """The model to start from; default: the SFT model in the output folder."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    epochs: int = 1
    """Passes over the data; more than one overfits on real preferences."""
    batch_size: int = 32
    """Pairs in an optimizer step."""
    micro_batch_size: int = 32
    """Pairs in a forward pass; memory, not results, depends on it."""
    centring_coef: float = 0.0
    """Weight of (chosen + rejected)^2 in the loss, which keeps scores about 0."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations on held-out rows; default: an epoch."""
    keep_best: bool = True
    """Keep the weights of the lowest held-out loss; false: the last."""

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "micro_batch_size")
        if self.eval_steps is not None:
            _positive(self, "eval_steps")
        _not_negative(self, "centring_coef")


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation, in place of reward model and PPO: arXiv 2305.18290."""

    data: DataConfig = field(default_factory=DataConfig)
    """Preference pairs."""
    model_path: str | None = None
    """The policy to start from, also the reference; default: the SFT model in the output folder."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's, or that of IPO (arXiv 2310.12036), which aims at a margin of 1 / (2 beta) nats."""
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round (sigmoid)."""
    epochs: int = 1
    """Passes over the data."""
    batch_size: int = 32
    """Pairs in an optimizer step."""
    micro_batch_size: int = 16
    """Pairs in a forward pass; memory, not results, depends on it."""
    max_new_tokens: int = 128
    """Longest response in the evaluation of the report."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations on held-out rows; default: an epoch."""
    keep_best: bool = True
    """Keep the weights of the lowest held-out loss; false: the last."""

    def __post_init__(self) -> None:
        _positive(self, "beta", "epochs", "batch_size", "micro_batch_size", "max_new_tokens")
        if self.eval_steps is not None:
            _positive(self, "eval_steps")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")


@dataclass(frozen=True)
class PPOConfig:
    """Step 3, proximal policy optimisation and the group methods."""

    algorithm: Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp"] = "ppo"
    """Baseline of the advantages: a critic (ppo), or the other responses to the same prompt."""
    samples_per_prompt: int = 1
    """Responses to each prompt; group methods, all but ppo, need 2 or more."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    actor_path: str | None = None
    """The policy to start from, also the reference; default: the SFT model in the output folder."""
    reward_path: str | None = None
    """The reward model; default: the one in the output folder, or none with reward_functions."""
    reward_functions: list[str] = field(default_factory=list)
    """Python functions that score: module:function or path.py:function."""
    reward_weights: list[float] | None = None
    """Of the reward functions, in their order; default: 1 each."""
    reward_model_weight: float = 1.0
    """Of the reward model, where there are functions too."""
    reward_overlap: bool = True
    """Call functions on each response as it ends; false: once with the whole batch."""
    critic_path: str | None = None
    """The critic's start; default: the reward model, else the actor with a score head of zeros."""
    actor_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the actor."""
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the critic."""
    iterations: int = 100
    """Rounds of rollout and update."""
    batch_size: int = 64
    """Prompts in a rollout."""
    mini_batches: int = 1
    """Optimizer steps into which each epoch over a rollout is divided."""
    epochs: int = 1
    """Passes over each rollout."""
    micro_batch_size: int = 32
    """Sequences in a forward pass; memory, not results, depends on it."""
    max_new_tokens: int = 128
    """Longest response."""
    temperature: float = 1.0
    """Of sampling, and of every log-prob."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: all. Log-probs stay of the whole distribution."""
    top_p: float = 1.0
    """Sample from the fewest tokens with this mass; 1: all."""
    kl_coef: float = 0.05
    """Weight of the KL penalty."""
    kl_place: Literal["reward", "loss"] | None = None
    """Where the KL penalty goes; default: the loss for grpo and dr_grpo, else the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Of the KL from the reference; default: k1 in the reward, k3 in the loss."""
    kl_limit: float = 10.0
    """Nats from the reference per response token, mean of a rollout, above which a run stops."""
    kl_target: float | None = None
    """KL per response at which an adaptive kl_coef aims; default: kl_coef stays fixed."""
    kl_horizon: int = 10000
    """Responses over which the adaptive kl_coef moves."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    cliprange: float = 0.2
    """Clip of the probability ratio."""
    dual_clip: float | None = None
    """Bound, in advantages, of the loss of a token with a negative advantage; above 1."""
    aggregation: Literal["token", "sequence", "constant"] | None = None
    """Mean of the policy loss; default: sequence for grpo, constant for dr_grpo, else token."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    cliprange_value: float = 0.2
    """Clip of the value update."""
    reward_clip: float = 5.0
    """Scores are clipped to +- this."""
    whiten_rewards: bool = False
    """Scale the shaped rewards of a rollout to variance 1, keeping their mean; ppo only."""
    missing_eos_penalty: float = 1.0
    """Taken from the score of a response that does not end by itself."""
    critic_warmup: int = 0
    """First iterations in which only the critic learns."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """Old log-probs: as sampled, or from one more training forward."""
    importance_cap: float | None = None
    """Truncated importance sampling: most by which a token sampled too seldom is weighted up."""
    ptx_coef: float = 0.0
    """Weight of the language-model loss on ptx_data, as in InstructGPT's PPO-ptx."""
    ptx_data: DataConfig | None = None
    """Text or demonstrations for ptx_coef; default: those of SFT."""
    ema_decay: float | None = None
    """Of an fp32 moving average of the actor, saved as actor_ema; default: none."""

    def __post_init__(self) -> None:
        _positive(
            self, "iterations", "batch_size", "mini_batches", "epochs", "micro_batch_size",
            "max_new_tokens", "temperature", "cliprange", "cliprange_value", "reward_clip",
            "kl_horizon", "kl_limit", "samples_per_prompt",
        )  # fmt: skip
        _fraction(self, "gamma", "lam")
        _not_negative(self, "kl_coef", "entropy_coef", "ptx_coef", "top_k", "critic_warmup")
        if self.mini_batches > self.batch_size * self.samples_per_prompt:
            raise ValueError(
                f"mini_batches ({self.mini_batches}) must not exceed batch_size "
                f"({self.batch_size}) * samples_per_prompt ({self.samples_per_prompt})"
            )
        self._check_algorithm()
        self._check_options()

    def _check_algorithm(self) -> None:
        if self.algorithm == "ppo":
            return
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"{self.algorithm} compares the responses to one prompt: samples_per_prompt must "
                f"be 2 or more, got {self.samples_per_prompt}"
            )
        for name, off in (("whiten_rewards", False), ("critic_warmup", 0), ("critic_path", None)):
            if getattr(self, name) != off:
                raise ValueError(f"{name} is for ppo; {self.algorithm} has no critic")

    def _check_options(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.kl_estimator == "k1" and self.kl_place == "loss":
            raise ValueError("k1 as a loss has no gradient on average: take k2 or k3")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")
        if self.importance_cap is not None:
            _positive(self, "importance_cap")
            if self.old_logprobs != "recompute":
                raise ValueError(
                    "importance_cap compares the training forward with the rollout: set "
                    "old_logprobs to recompute"
                )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {self.ema_decay}")
        if self.reward_weights is not None and len(self.reward_weights) != len(
            self.reward_functions
        ):
            raise ValueError(
                f"{len(self.reward_weights)} reward_weights for {len(self.reward_functions)} "
                "reward_functions: give one for each"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """What the report measures on held-out prompts."""

    prompts: int = 256
    """Held-out prompts to answer, before and after PPO."""
    metric: str | None = None
    """module:function like a reward function: the true quality, where there is one."""
    samples: int = 5
    """Dialogues shown before and after."""
    compare_hf_generate: bool = True
    """Time plain HF generate next to the rollout, on the same model and prompts."""

    def __post_init__(self) -> None:
        _positive(self, "prompts", "samples")


@dataclass(frozen=True)
class ComparisonConfig:
    """`rlhf eval`: one policy measured, or two side by side, on held-out prompts."""

    policy: str
    """Folder or hub name of the model to judge, A."""
    against: str | None = None
    """Another model, B: how often A's answer is the better one."""
    reference: str | None = None
    """The model that the KL is measured from; default: against, else policy."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts; their held-out side."""
    prompts: int = 256
    """At most so many prompts."""
    reward_path: str | None = None
    """The reward model that judges."""
    reward_functions: list[str] = field(default_factory=list)
    """Python functions that judge: module:function or path.py:function."""
    reward_weights: list[float] | None = None
    """Of the reward functions, in their order; default: 1 each."""
    reward_model_weight: float = 1.0
    """Of the reward model, where there are functions too."""
    metric: str | None = None
    """Like a reward function: the true quality, where there is one."""
    max_new_tokens: int = 128
    """Longest answer."""
    temperature: float = 1.0
    """Of sampling; 0: always the likeliest token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    samples: int = 5
    """Answers shown side by side."""
    seed: int = 0
    """Of sampling."""
    output_dir: str = "runs/eval"
    """Where eval.md, eval.json and eval.png go."""

    def __post_init__(self) -> None:
        _positive(self, "prompts", "max_new_tokens", "samples")
        _not_negative(self, "temperature")
        if self.reward_path is None and not self.reward_functions:
            raise ValueError("nothing judges: give reward_path or reward_functions")


@dataclass(frozen=True)
class RolloutConfig:
    """Where the weights of a rollout are, and the memory that it may take."""

    inference_tp_size: int = 1
    """Processes that share one copy of the weights (tensor parallelism); divides all processes."""
    pin_parameters: bool | None = None
    """ZeRO 3: gather weights once a rollout; false: layer by layer; default: as memory allows."""
    dtype: Literal["bfloat16", "float16"] | None = None
    """Type that rollouts compute in; default: that of the weights."""
    max_cache_gb: float | None = None
    """Of the KV cache; default: most of the free memory."""

    def __post_init__(self) -> None:
        _positive(self, "inference_tp_size")
        if self.max_cache_gb is not None:
            _positive(self, "max_cache_gb")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a killed run goes on with --resume. Finished steps leave none."""

    every_steps: int = 200
    """Optimizer steps of SFT and the reward model from one to the next; 0: none."""
    every_iterations: int = 20
    """PPO iterations from one to the next; 0: none."""
    keep: int = 2
    """So many are kept."""

    def __post_init__(self) -> None:
        _not_negative(self, "every_steps", "every_iterations")
        _positive(self, "keep")


@dataclass(frozen=True)
class RunConfig:
    """One file for all steps; each step reads its own section."""

    output_dir: str = "runs/rlhf"
    """Where models, metrics and the report go."""
    seed: int = 0
    """Of everything random."""
    zero_stage: ZeroStage | None = None
    """ZeRO stage (0 to 3) of all models; default: 2 on several processes, plain torch on one."""
    data_path: list[str] | None = None
    """Datasets of all three steps, in place of the names in their sections."""
    data_split: list[float] | str | None = None
    """Shares of the prompts for SFT, reward model (or DPO) and PPO, such as 2,4,4: no prompt in two
    steps. Default: each step has all of its data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The pretrained model."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Memory and processes."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Step 1."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Step 2."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Step 3."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """In place of steps 2 and 3."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The report."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The actor's generation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints to resume from."""

    def __post_init__(self) -> None:
        fractions = self.fractions
        if fractions is not None and (
            len(fractions) != len(STEPS) or min(fractions) < 0 or sum(fractions) <= 0
        ):
            raise ValueError(
                "data_split must be three shares of 0 or more, such as 2,4,4 for SFT, reward model"
                f" and PPO, got {self.data_split!r}"
            )
        ppo = self.ppo
        mixes_sft = ppo.ptx_coef > 0 and ppo.ptx_data is None
        if mixes_sft and self.is_synthetic(self.sft.data) and not self.is_synthetic(ppo.data):
            raise ValueError(
                "ppo.ptx_coef would mix synthetic text into PPO on other prompts: give "
                "ppo.ptx_data or sft.data"
            )

    @property
    def fractions(self) -> list[float] | None:
        """data_split as numbers."""
        return None if self.data_split is None else _numbers(self.data_split)

    def data_of(self, section: DataConfig) -> DataConfig:
        """A step's data section, with the datasets of data_path where that is given."""
        if self.data_path is None:
            return section
        mix = [SourceConfig(name, columns=section.columns) for name in self.data_path]
        return dataclasses.replace(section, mix=mix)

    def is_synthetic(self, section: DataConfig) -> bool:
        """Whether all of a step's data are the made-up instructions, the default."""
        return all(source.name == "synthetic" for source in self.data_of(section).sources)


def _numbers(text: list[float] | str) -> list[float]:
    """The text "2,4,4" as numbers; [] if it holds something else."""
    try:
        return [float(x) for x in (text.split(",") if isinstance(text, str) else text)]
    except ValueError:
        return []
