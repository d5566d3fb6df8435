"""What a rollout takes of the memory: the cache that it needs, while it lasts."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator

import pytest
import torch

from hybrid_engine import EngineConfig, HybridEngine, SamplingParams
from hybrid_engine.cache import KVCache, memory
from hybrid_engine.generation.scheduler import Scheduler

PARAMS = SamplingParams(max_new_tokens=12, seed=3)
BLOCK_BYTES = KVCache.bytes_per_block(
    layers=2, kv_heads=2, block_size=4, head_dim=16, dtype=torch.float32
)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[KVCache]]]:
    """Every cache that is made."""
    made: list[weakref.ref[KVCache]] = []
    make = KVCache.__init__

    def counted(self: KVCache, **options) -> None:
        make(self, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", counted)
    return made


def alive(caches: list[weakref.ref[KVCache]]) -> int:
    gc.collect()
    return sum(cache() is not None for cache in caches)


def test_cache_lives_as_long_as_the_rollout(build, prompts, caches) -> None:
    engine = HybridEngine(build("llama"))
    with engine.rollout():
        engine.generate(prompts, PARAMS)
        engine.generate(prompts[:2], PARAMS)
        assert len(caches) == alive(caches) == 1
    assert alive(caches) == 0


def test_cache_that_is_kept_serves_the_next_rollout(build, prompts, caches) -> None:
    engine = HybridEngine(build("llama"), EngineConfig(release_inference_cache=False))
    first = engine.generate(prompts, PARAMS)
    assert torch.equal(engine.generate(prompts, PARAMS).tokens, first.tokens)
    assert len(caches) == alive(caches) == 1
    engine.release()
    assert alive(caches) == 0


def test_cache_that_is_kept_follows_the_weights_type(build, prompts) -> None:
    model = build("llama")
    engine = HybridEngine(model, EngineConfig(release_inference_cache=False))
    engine.generate(prompts, PARAMS)
    model.to(torch.bfloat16)
    expected = HybridEngine(build("llama").to(torch.bfloat16)).generate(prompts, PARAMS)
    assert torch.equal(engine.generate(prompts, PARAMS).tokens, expected.tokens)


def test_cache_takes_what_it_needs_of_the_free_memory(
    build, prompts, caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plenty: a block for every token that may come. Little: what there is, and preemption."""
    preempted: list[int] = []
    preempt_last = Scheduler.preempt_last
    monkeypatch.setattr(
        Scheduler,
        "preempt_last",
        lambda self, response: (preempted.append(1), preempt_last(self, response)),
    )
    config = EngineConfig(block_size=4)
    needed = [-(-(len(prompt) + 12) // 4) for prompt in prompts]
    engine = HybridEngine(build("llama"), config)
    with engine.rollout():
        expected = engine.generate(prompts, PARAMS)
        assert caches[-1]().num_blocks == sum(needed) + len(needed)  # type: ignore[union-attr]
    assert not preempted

    free = int(BLOCK_BYTES * (max(needed) + 1.5) / memory.SHARE_OF_FREE_MEMORY)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with engine.rollout():
        found = engine.generate(prompts, PARAMS)
        assert caches[-1]().num_blocks == max(needed) + 1  # type: ignore[union-attr]
    assert preempted
    assert torch.equal(found.tokens, expected.tokens)

    monkeypatch.setattr(memory, "free_bytes", lambda device: BLOCK_BYTES)
    with pytest.raises(ValueError, match=r"free memory of cpu.* 0 blocks.*alone needs 13"):
        engine.generate(prompts, PARAMS)


def test_free_memory_is_part_of_the_machines() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.free_bytes(torch.device("cpu")) < total  # type: ignore[operator]


def test_free_memory_heeds_a_container(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes(torch.device("cpu")) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(torch.device("cpu")) != 3000
    assert memory.free_bytes(torch.device("meta")) is None


def test_max_out_tokens_limits_prompt_and_response(build) -> None:
    engine = HybridEngine(build("llama"), EngineConfig(max_out_tokens=30))
    assert engine.max_positions == 30
    assert engine.generate([[1] * 18], PARAMS).lengths.tolist() == [12]
    with pytest.raises(ValueError, match=r"19 tokens.*max_out_tokens=30 leave room for 18"):
        engine.generate([[1] * 19], PARAMS)


DEEPSPEED = {
    "train_batch_size": 8,
    "hybrid_engine": {
        "enabled": True, "max_out_tokens": 64, "inference_tp_size": 1,
        "release_inference_cache": True, "pin_parameters": False, "tp_gather_partition_size": 4,
    },
}  # fmt: skip


def test_deepspeed_section() -> None:
    assert EngineConfig.from_deepspeed(DEEPSPEED, max_running=8) == EngineConfig(
        max_running=8, max_out_tokens=64, inference_tp_size=1, release_inference_cache=True,
        pin_parameters=False, tp_gather_partition_size=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no key max_tokens; it has enable_cuda_graph, enabled"):
        EngineConfig.from_deepspeed({"hybrid_engine": {"max_tokens": 1}})


def test_deepspeed_defaults_are_deepspeeds() -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    theirs = config.HybridEngineConfig()
    for section in ({}, {"hybrid_engine": {}}):
        mine = EngineConfig.from_deepspeed(section)
        for name in type(theirs).model_fields:
            if name not in ("enabled", "enable_cuda_graph"):
                assert getattr(mine, name) == getattr(theirs, name), name
    assert set(config.HybridEngineConfig.model_fields) == {
        *DEEPSPEED["hybrid_engine"],  # type: ignore[misc]
        "enable_cuda_graph",
    }


def test_tensor_parallel_without_ranks(build) -> None:
    with pytest.raises(ValueError, match=r"inference_tp_size=2 needs that many ranks.*torchrun"):
        HybridEngine(build("llama"), EngineConfig(inference_tp_size=2))
