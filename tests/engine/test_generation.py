"""What a rollout says does not depend on how it was batched, cached or read."""

from __future__ import annotations

import pytest
import torch

from hybrid_engine import EngineConfig, HybridEngine, Rollout, SamplingParams
from hybrid_engine.cache import KVCache
from hybrid_engine.generation.loop import GenerationLoop
from hybrid_engine.generation.scheduler import Scheduler

SAMPLED = SamplingParams(max_new_tokens=24, seed=7)
GREEDY = SamplingParams(max_new_tokens=24, temperature=0.0)
SMALL_BLOCKS = 4


def assert_same(found: Rollout, expected: Rollout) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    assert found.finish_reasons == expected.finish_reasons


def cache_gb(engine_blocks: int, block_size: int) -> float:
    """The limit that leaves room for exactly so many blocks of the Llama of these tests."""
    size = KVCache.bytes_per_block(
        layers=2, kv_heads=2, block_size=block_size, head_dim=16, dtype=torch.float32
    )
    return (engine_blocks + 0.5) * size / 1e9


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the responses that were preempted."""
    found: list[int] = []
    preempt_last = Scheduler.preempt_last

    def counted(self: Scheduler, response: list[int]) -> None:
        found.append(len(response))
        preempt_last(self, response)

    monkeypatch.setattr(Scheduler, "preempt_last", counted)
    return found


CONFIGS = {
    "one-at-a-time": EngineConfig(max_running=1),
    "two-at-a-time": EngineConfig(max_running=2),
    "block1": EngineConfig(block_size=1),
    "block7": EngineConfig(block_size=7),
    "block256": EngineConfig(block_size=256),
    "short-prefills": EngineConfig(max_prefill_tokens=1),
}


@pytest.mark.parametrize("params", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_limits_change_no_token(build, prompts, family: str, params: SamplingParams) -> None:
    model = build(family)
    model.generation_config.eos_token_id = [2, 9, 33]  # rows end at different times
    expected = HybridEngine(model).generate(prompts, params)
    assert len(set(expected.lengths.tolist())) > 2
    for name, config in CONFIGS.items():
        found = HybridEngine(model, config).generate(prompts, params)
        assert torch.equal(found.tokens, expected.tokens), name
        assert_same(found, expected)


@pytest.mark.parametrize("params", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_full_cache_preempts_and_changes_no_token(
    build, prompts, preemptions: list[int], params: SamplingParams
) -> None:
    model = build("llama")
    expected = HybridEngine(model).generate(prompts, params)
    assert not preemptions
    longest = -(-(len(prompts[4]) + params.max_new_tokens) // SMALL_BLOCKS)
    for spare in (0, 1, 3):
        preemptions.clear()
        limit = cache_gb(longest + spare, SMALL_BLOCKS)
        config = EngineConfig(block_size=SMALL_BLOCKS, max_cache_gb=limit)
        assert_same(HybridEngine(model, config).generate(prompts, params), expected)
        assert preemptions, "the cache was meant to be too small"
        assert all(length > 0 for length in preemptions)


def test_preemption_keeps_logprobs(build, prompts, preemptions: list[int]) -> None:
    """A recomputed prefix keeps the log-probs that were sampled under, and goes on from them."""
    model = build("llama")
    expected = HybridEngine(model).generate(prompts, SAMPLED)
    longest = -(-(len(prompts[4]) + SAMPLED.max_new_tokens) // SMALL_BLOCKS)
    config = EngineConfig(block_size=SMALL_BLOCKS, max_cache_gb=cache_gb(longest, SMALL_BLOCKS))
    found = HybridEngine(model, config).generate(prompts, SAMPLED)
    assert preemptions
    torch.testing.assert_close(found.logprobs, expected.logprobs)  # fp32 rounding


def test_fewer_prompts_change_no_token(build, prompts) -> None:
    engine = HybridEngine(build("llama"))
    whole = engine.generate(prompts, SAMPLED)
    for count in range(1, len(prompts)):
        part = engine.generate(prompts[:count], SAMPLED)
        assert torch.equal(part.tokens, whole.tokens[:count])


def test_seed_decides(build, prompts) -> None:
    engine = HybridEngine(build("llama"))
    first, again = engine.generate(prompts, SAMPLED), engine.generate(prompts, SAMPLED)
    other = engine.generate(prompts, SamplingParams(max_new_tokens=24, seed=8))
    assert_same(again, first)
    assert torch.equal(again.logprobs, first.logprobs)
    assert (other.tokens != first.tokens).float().mean() > 0.5


def test_equal_prompts_get_different_samples(build, prompts) -> None:
    rollout = HybridEngine(build("llama")).generate([prompts[0]] * 8, SAMPLED)
    assert len({tuple(rollout.response(i)) for i in range(8)}) == 8


def test_samples_follow_the_distribution(build) -> None:
    """First tokens of many equal prompts against the model's own probabilities, chi-squared."""
    model = build("llama")
    prompt, count = [1, 5, 9], 4000
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1) * count
    rollout = HybridEngine(model).generate([prompt] * count, SamplingParams(max_new_tokens=1))
    observed = torch.bincount(rollout.tokens[:, 0], minlength=len(expected)).float()
    rare = expected < 5
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    statistic = ((observed - expected).square() / expected).sum()
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_stream_equals_generate(build, prompts) -> None:
    engine = HybridEngine(build("llama"))
    for params in (SAMPLED, GREEDY, SamplingParams(max_new_tokens=1)):
        for prompt in prompts:
            expected = engine.generate([prompt], params).response(0)
            assert list(engine.stream(prompt, params)) == expected


def test_stream_ends_with_the_stop_token(build, prompts) -> None:
    engine = HybridEngine(build("llama"))
    stop = engine.generate([prompts[0]], GREEDY).response(0)[5]
    params = SamplingParams(max_new_tokens=24, temperature=0.0, stop_token_ids=(stop,))
    streamed = list(engine.stream(prompts[0], params))
    assert streamed == engine.generate([prompts[0]], params).response(0)
    assert streamed[-1] == stop
    assert stop not in streamed[:-1]


def test_calls_between_two_streamed_tokens_disturb_nothing(build, prompts) -> None:
    engine = HybridEngine(build("llama"))
    expected = engine.generate(prompts, GREEDY)
    streams = [engine.stream(prompts[i], GREEDY) for i in (0, 4)]
    found: list[list[int]] = [[], []]
    for _ in range(GREEDY.max_new_tokens):
        for tokens, stream in zip(found, streams, strict=True):
            tokens.append(next(stream))
        assert_same(engine.generate(prompts, GREEDY), expected)
    assert found == [expected.response(0), expected.response(4)]


def test_a_stream_that_is_dropped_leaves_the_engine_usable(build, prompts) -> None:
    engine = HybridEngine(build("llama"))
    stream = engine.stream(prompts[0], GREEDY)
    next(stream)
    stream.close()
    with engine.rollout():
        pass


def test_one_flip_serves_many_calls(build, prompts) -> None:
    engine = HybridEngine(build("llama"))
    alone = [engine.generate([prompt], GREEDY).response(0) for prompt in prompts]
    with engine.rollout():
        together = [engine.generate([prompt], GREEDY).response(0) for prompt in prompts]
    assert together == alone


def test_truncated_sampling_keeps_both_logprobs(build, prompts) -> None:
    """Under the whole distribution and under what top-k left, which is more probable."""
    engine = HybridEngine(build("llama"))
    params = SamplingParams(max_new_tokens=24, top_k=3, seed=1)
    rollout = engine.generate(prompts, params)
    assert (rollout.truncated_logprobs > rollout.logprobs).all()
    likeliest = engine.generate(prompts, SamplingParams(max_new_tokens=24, top_k=1))
    assert torch.equal(likeliest.tokens, engine.generate(prompts, GREEDY).tokens)
    assert torch.equal(likeliest.truncated_logprobs, torch.zeros_like(likeliest.logprobs))


@pytest.mark.parametrize("max_running", [256, 2], ids=lambda m: f"running{m}")
def test_each_response_is_handed_over_as_it_ends(
    build, prompts, monkeypatch: pytest.MonkeyPatch, max_running: int
) -> None:
    steps: list[int] = []
    step = GenerationLoop.step
    monkeypatch.setattr(GenerationLoop, "step", lambda loop, _: (steps.append(1), step(loop)))
    model = build("llama")
    model.generation_config.eos_token_id = [2, 9, 33]
    taken: list[tuple[int, list[int], int]] = []
    found = HybridEngine(model, EngineConfig(max_running=max_running)).generate(
        prompts, SAMPLED, on_finish=lambda i, response: taken.append((i, response, len(steps)))
    )
    assert sorted(i for i, *_ in taken) == list(range(len(prompts)))
    assert all(response == found.response(i) for i, response, _ in taken)
    assert len({len(response) for _, response, _ in taken}) > 1
    if max_running >= len(prompts):  # all start together: prefill, and a token with each step
        assert all(at == max(1, len(response) - 1) for _, response, at in taken)


def test_a_call_from_on_finish_disturbs_nobody(build, prompts) -> None:
    model = build("llama")
    model.generation_config.eos_token_id = [2, 9, 33]
    engine = HybridEngine(model)
    expected, asked = engine.generate(prompts, SAMPLED), prompts[:1] * 2
    answer = engine.generate(asked, GREEDY)
    found: list[Rollout] = []
    rollout = engine.generate(
        prompts, SAMPLED, on_finish=lambda *_: found.append(engine.generate(asked, GREEDY))
    )
    assert_same(rollout, expected)
    for each in found:
        assert_same(each, answer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_the_default_dtype_changes_nothing(build, prompts, step_by_step, dtype) -> None:
    engine = HybridEngine(build("bloom"))
    expected = engine.generate(prompts, SAMPLED)
    torch.set_default_dtype(dtype)
    try:
        found = engine.generate(prompts, SAMPLED)
        in_python = step_by_step(lambda: engine.generate(prompts, SAMPLED))
    finally:
        torch.set_default_dtype(torch.float32)
    for rollout in (found, in_python):
        assert_same(rollout, expected)
        torch.testing.assert_close(rollout.logprobs, expected.logprobs)
