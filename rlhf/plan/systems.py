"""What share of the hardware's peaks a trainer reaches: the constants behind every second."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A trainer, as the time model sees it. Shares are of the device's peaks."""

    name: str
    source: str  # where the constants come from
    layer_seconds: float  # host time of one decoder layer in a decode step, where it waits for it
    weight_read: float  # share of the bandwidth at which decode reads the weights
    cache_read: float  # share of the bandwidth at which decode reads the KV cache
    decode: float  # share of the FLOP/s in the products of a decode step
    forward: float  # share of the FLOP/s in prefill and scoring
    update: float  # share of the FLOP/s in forward and backward
    optimizer: float  # share of the bandwidth at which its step reads and writes its state
    links: float = 0.7  # share of the links' bandwidth that collectives reach
    overlap: float = 0.5  # share of the compute time under which communication can hide
    collective_seconds: float = 2e-5  # latency of one collective inside a node
    rescore_actor: bool = False  # old log-probs cost one more forward of the actor
    logit_bytes: int = 0  # of one (B, T, V) element in training


# The aims that docs/performance.md states; a record of `rlhf bench` replaces them.
HYBRID = System(
    name="hybrid-rlhf",
    source="assumed, not measured: calibrate with records of `rlhf bench`",
    layer_seconds=0.0,  # the decode step is one CUDA graph
    weight_read=0.75,
    cache_read=0.6,
    decode=0.45,
    forward=0.45,
    update=0.4,
    optimizer=0.75,
)

# Published: docs/planner.md says which constant comes from which row.
DEEPSPEED_CHAT = System(
    name="deepspeed-chat",
    source="arXiv 2308.01320, throughput of each model; the rest from its 64-GPU rows",
    layer_seconds=0.9e-3,
    weight_read=0.7,
    cache_read=0.2,
    decode=0.4,
    forward=0.4,
    update=0.35,
    optimizer=0.7,
    links=0.09,
    overlap=0.0,
    rescore_actor=True,
    logit_bytes=10,
)

SYSTEMS = {system.name: system for system in (HYBRID, DEEPSPEED_CHAT)}
