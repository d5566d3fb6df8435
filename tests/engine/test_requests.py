"""What a request may ask for beside greedy tokens: texts that end it, its seed, being cancelled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import StopStringCriteria

from hybrid_engine import EngineConfig, HybridEngine, SamplingParams
from hybrid_engine.cache import KVCache
from rlhf.data import train_tokenizer

TEXTS = ["the cat sat on the mat", "add three and four", "a list of words: one, two"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocab_size=300)


def stop_strings_case(build, tokenizer, prompts: list[list[int]]) -> tuple[Any, list[str]]:
    """A model that speaks in letters, and texts that its greedy responses have."""
    model: Any = build("llama", vocab_size=len(tokenizer))
    for token in range(len(tokenizer)):
        if len(tokenizer.decode([token])) == 1 or token < 10:  # a byte, a special token
            model.lm_head.weight.data[token] = 0.0
    free = HybridEngine(model).generate(prompts, SamplingParams(max_new_tokens=24, temperature=0.0))
    return model, [*(_readable(tokenizer, free.response(i)) for i in (0, 2)), "never said"]


def _readable(tokenizer, response: list[int]) -> str:
    """A text over two tokens that starts within the first and ends within the second."""
    pairs = (tokenizer.decode(response[i : i + 2]) for i in range(4, len(response) - 1))
    return next(text[1:-1] for text in pairs if text.isascii())


def test_stop_strings_end_where_hf_ends(build, tokenizer, prompts) -> None:
    model, stops = stop_strings_case(build, tokenizer, prompts)
    criterion = StopStringCriteria(tokenizer, stops)
    params = SamplingParams(max_new_tokens=24, temperature=0.0, stop_strings=criterion)
    rollout = HybridEngine(model).generate(prompts, params)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            stop_strings=stops, tokenizer=tokenizer,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert rollout.response(i) == expected, f"prompt {i}"
        assert rollout.finish_reasons[i] == ("stop" if len(expected) < 24 else "length")
    assert rollout.finish_reasons[0] == rollout.finish_reasons[2] == "stop"
    assert any(stop in tokenizer.decode(rollout.response(0)) for stop in stops)


def test_stop_strings_survive_preemption(build, tokenizer, prompts) -> None:
    model, stops = stop_strings_case(build, tokenizer, prompts)
    criterion = StopStringCriteria(tokenizer, stops)
    params = SamplingParams(max_new_tokens=24, temperature=0.0, stop_strings=criterion)
    tight = EngineConfig(block_size=4, max_cache_gb=cache_gb(17))
    found = HybridEngine(model, tight).generate(prompts, params)
    assert torch.equal(found.tokens, HybridEngine(model).generate(prompts, params).tokens)


def test_a_stop_string_without_its_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"stop_strings must be.*StopStringCriteria.*'###'"):
        SamplingParams(stop_strings="###")  # type: ignore[arg-type]


def test_a_prompt_draws_the_same_wherever_it_stands(build, prompts) -> None:
    """Alone, among others, in any order; and its n samples are those of n equal prompts."""
    engine = HybridEngine(build("llama"))
    params = SamplingParams(max_new_tokens=24, seed=5, top_p=0.95)
    alone = [engine.generate([prompt], params).response(0) for prompt in prompts]
    backwards = engine.generate(prompts[::-1], params)
    assert [backwards.response(i) for i in range(len(prompts))] == alone[::-1]
    samples = engine.generate(prompts[:2], SamplingParams(max_new_tokens=24, seed=5, n=3))
    strided = engine.generate(prompts[:2] * 3, SamplingParams(max_new_tokens=24, seed=5))
    assert [samples.response(i) for i in range(6)] == [
        strided.response(2 * sample + prompt) for prompt in range(2) for sample in range(3)
    ]


def test_cancelled_responses_end_and_the_others_go_on(build, prompts) -> None:
    engine = HybridEngine(build("llama"), EngineConfig(max_running=4))
    params = SamplingParams(max_new_tokens=24, seed=5)
    expected = engine.generate(prompts, params)
    with engine.rollout():
        loop = engine.start(prompts, params)
        for _ in range(3):
            loop.step()
        loop.cancel(1)  # runs
        loop.cancel(5)  # waits
        while not loop.done:
            loop.step()
        loop.cancel(0)  # has ended
        found = loop.rollout()
    assert found.finish_reasons == ["length", "cancelled", *["length"] * 3, "cancelled"]
    assert 0 < int(found.lengths[1]) < 24
    assert int(found.lengths[5]) == 0
    for i in range(len(prompts)):
        length = int(found.lengths[i])
        assert found.response(i) == expected.response(i)[:length]
        assert (found.tokens[i, length:] == 0).all()


def test_start_wants_a_rollout(build) -> None:
    with pytest.raises(RuntimeError, match=r"with engine.rollout\(\)"):
        HybridEngine(build("llama")).start([[1]])


def cache_gb(blocks: int) -> float:
    size = KVCache.bytes_per_block(
        layers=2, kv_heads=2, block_size=4, head_dim=16, dtype=torch.float32
    )
    return (blocks + 0.5) * size / 1e9


@pytest.fixture
def tight_engine(build) -> HybridEngine:
    """Room for the longest request of the property test, and little more: it preempts."""
    config = EngineConfig(block_size=4, max_running=3, max_cache_gb=cache_gb(5))
    return HybridEngine(build("llama"), config)


REQUEST = st.lists(st.integers(1, 3), min_size=1, max_size=10)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompts=st.lists(REQUEST, min_size=1, max_size=6),
    max_new_tokens=st.integers(1, 6),
    cancelled=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4),
    abandoned_after=st.integers(0, 40),
)
def test_no_block_leaks(
    tight_engine: HybridEngine, prompts: list[list[int]], max_new_tokens: int,
    cancelled: list[tuple[int, int]], abandoned_after: int,
) -> None:  # fmt: skip
    """Random requests, some cancelled at random steps, and at last all that are left."""
    params = SamplingParams(max_new_tokens=max_new_tokens, seed=1)
    with tight_engine.rollout():
        loop = tight_engine.start(prompts, params)
        free = loop.free_blocks
        for step in range(abandoned_after):
            for when, index in cancelled:
                if when == step and index < len(prompts):
                    loop.cancel(index)
            if loop.done:
                break
            loop.step()
        for index in range(len(prompts)):
            loop.cancel(index)
        assert loop.done
        assert loop.free_blocks == free
    lengths = loop.rollout().lengths
    assert all(0 <= int(length) <= max_new_tokens for length in lengths)
