"""Bytes on each GPU in each phase of a PPO iteration, in closed form.

States follow ZeRO (arXiv 1910.02054, section 3): with mixed precision and Adam, 2 bytes a parameter
for the weight, 2 for its gradient, 12 for the fp32 master and the two moments; stage 1 divides the
optimizer, 2 the gradients too, 3 the weights too. Activations follow arXiv 2205.05198, eq. 1
without the attention matrices, which fused attention does not keep; with checkpointing a layer
keeps its input, and one layer is recomputed at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.plan.devices import Device
from rlhf.plan.shapes import ModelShape

HALF = 2  # bytes of a weight, gradient or activation
OPTIMIZER = 12  # bytes a parameter: fp32 master, two moments
HOST_OPTIMIZER = 16  # with offload: and the fp32 gradient
CONTEXT = 1.0e9  # bytes of the CUDA context and of libraries' workspaces
RESERVE = 0.1  # share of the memory lost to fragmentation, not planned with


@dataclass(frozen=True)
class Recipe:
    """What is trained: the numbers that do not depend on the machine."""

    prompt: int = 256  # tokens
    response: int = 256  # tokens generated for each prompt, at most
    batch: int = 1024  # sequences of an iteration, over all GPUs
    samples: int = 264_292  # prompts in all
    epochs: int = 1  # passes over each iteration's experience

    def __post_init__(self) -> None:
        for name in ("prompt", "response", "batch", "samples", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def sequence(self) -> int:
        return self.prompt + self.response

    @property
    def iterations(self) -> float:
        return self.samples / self.batch


@dataclass(frozen=True)
class Models:
    """The four models; reference and reward have the shapes of actor and critic."""

    actor: ModelShape
    critic: ModelShape


@dataclass(frozen=True)
class Strategy:
    """How the work is laid over the GPUs."""

    stage: int = 0  # of ZeRO
    offload: bool = False  # optimizer states, and gradients from stage 2 on, live on the host
    tp: int = 1  # GPUs that share one copy of the weights in the rollout
    lora: int | None = None  # rank of adapters on every matrix of the actor
    checkpointing: bool = True  # of activations
    micro_batch: int = 1  # sequences a GPU takes through forward and backward
    rollout_batch: int = 1  # sequences a GPU has in its KV cache

    def __str__(self) -> str:
        parts = [f"ZeRO-{self.stage}"]
        parts += ["offload"] if self.offload else []
        parts += [f"TP {self.tp}"] if self.tp > 1 else []
        parts += [f"LoRA {self.lora}"] if self.lora else []
        parts += [] if self.checkpointing else ["all activations"]
        return " + ".join(parts)


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Of adapters on every matrix of every layer: rank times inputs and outputs."""
    heads = shape.head_dim * shape.heads
    kv_heads = shape.head_dim * shape.kv_heads
    sizes = [shape.hidden + heads] * 2 + [shape.hidden + kv_heads] * 2
    sizes += [shape.hidden + shape.intermediate] * (3 if shape.gated else 2)
    return shape.layers * rank * sum(sizes)


def _trained(parameters: float, base: float, strategy: Strategy, gpus: int) -> dict[str, float]:
    """States of a trained model: `parameters` are trained, on top of `base` frozen ones."""
    weights = HALF * (parameters + base) / (gpus if strategy.stage >= 3 else 1)
    gradients = HALF * parameters / (gpus if strategy.stage >= 2 else 1)
    if strategy.offload and strategy.stage >= 2:
        gradients = 0.0  # they go to the host as the backward makes them
    optimizer = OPTIMIZER * parameters / (gpus if strategy.stage >= 1 else 1)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 0.0 if strategy.offload else optimizer,
    }


def _activations(shape: ModelShape, strategy: Strategy, tokens: int) -> float:
    """Of the forward of `tokens` tokens that a backward follows."""
    mlp = (3 if shape.gated else 2) * shape.intermediate
    layer = HALF * tokens * (8 * shape.hidden + mlp)
    if not strategy.checkpointing:
        return shape.layers * layer
    return HALF * tokens * shape.hidden * shape.layers + layer


def _gathered(shape: ModelShape, strategy: Strategy, gpus: int) -> float:
    """Under ZeRO-3 a forward or backward holds two layers, and the embedding."""
    if strategy.stage < 3 or gpus == 1:
        return 0.0
    return HALF * (2.0 * shape.layer_parameters + shape.vocab * shape.hidden)


def phases(
    models: Models, recipe: Recipe, strategy: Strategy, gpus: int, *, logit_bytes: int = 0
) -> dict[str, dict[str, float]]:
    """Phase -> what -> bytes on one GPU.

    `logit_bytes` is what a (B, T, V) element costs a trainer that keeps logits in training; the
    fused log-prob keeps none.
    """
    actor, critic = models.actor, models.critic
    adapters = lora_parameters(actor, strategy.lora) if strategy.lora else 0
    trained = adapters or actor.parameters
    base = actor.parameters if strategy.lora else 0
    actor_states = _trained(trained, base, strategy, gpus)
    critic_states = _trained(critic.parameters, 0, strategy, gpus)
    frozen_share = gpus if strategy.stage >= 3 else 1
    reference = 0.0 if strategy.lora else HALF * actor.parameters / frozen_share
    always = {
        "weights": actor_states["weights"] + critic_states["weights"],
        "reference": reference,
        "reward": HALF * critic.parameters / frozen_share,
        "optimizer": actor_states["optimizer"] + critic_states["optimizer"],
    }
    rows, tokens = strategy.rollout_batch, strategy.micro_batch * recipe.sequence
    whole = HALF * actor.parameters / strategy.tp if strategy.stage >= 3 and gpus > 1 else 0.0
    kv_cache = HALF * rows * recipe.sequence * actor.kv_elements
    return {
        "rollout": {
            **always, "gathered": whole, "KV cache": kv_cache,
            "logits": 6.0 * rows * actor.vocab,
        },
        "score": {
            **always, "gathered": _gathered(actor, strategy, gpus),
            "activations": 4.0 * HALF * tokens * max(actor.hidden, actor.intermediate),
            "logits": float(logit_bytes * tokens * actor.vocab),
        },
        "update actor": {
            **always, "gathered": _gathered(actor, strategy, gpus),
            "gradients": actor_states["gradients"],
            "activations": _activations(actor, strategy, tokens),
            "logits": float(logit_bytes * tokens * actor.vocab),
        },
        "update critic": {
            **always, "gathered": _gathered(critic, strategy, gpus),
            "gradients": critic_states["gradients"],
            "activations": _activations(critic, strategy, tokens),
        },
    }  # fmt: skip


def peak(phase_bytes: dict[str, dict[str, float]]) -> tuple[str, float]:
    """The phase that needs most, and its bytes."""
    totals = {name: sum(parts.values()) for name, parts in phase_bytes.items()}
    worst = max(totals, key=totals.__getitem__)
    return worst, totals[worst]


def usable(device: Device) -> float:
    """Bytes of one GPU that a plan may fill."""
    return device.memory * (1 - RESERVE) - CONTEXT


def host_bytes(models: Models, strategy: Strategy, gpus: int) -> float:
    """Bytes of host memory for each GPU."""
    if not strategy.offload:
        return 0.0
    actor = lora_parameters(models.actor, strategy.lora) if strategy.lora else None
    trained = (actor or models.actor.parameters) + models.critic.parameters
    return HOST_OPTIMIZER * trained / (gpus if strategy.stage >= 1 else 1)
