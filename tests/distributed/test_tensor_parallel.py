"""Ranks that share one copy of the weights say what each would say alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import hybrid_engine as he
from tests.distributed.ranks import run_ranks
from tests.engine.conftest import _build as build


def prompts_of(rank, count=3):
    """Ragged, different on every rank."""
    generator = torch.Generator().manual_seed(rank)
    lengths = [5, 1, 17, 2, 33][: count + rank % 2]
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def _compare_with_one_rank(family, options, config, sampling, prompts=None):
    """Worst difference of log-probs; the tokens must be equal."""
    rank = dist.get_rank()
    prompts = prompts_of(rank) if prompts is None else prompts[rank]
    params = he.SamplingParams(**sampling, seed=rank)
    alone = he.HybridEngine(build(family, **options)).generate(prompts, params)
    model = build(family, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shared = he.HybridEngine(model, he.EngineConfig(**config)).generate(prompts, params)
    assert torch.equal(shared.tokens, alone.tokens)
    assert torch.equal(shared.lengths, alone.lengths)
    assert shared.finish_reasons == alone.finish_reasons
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return float((shared.logprobs - alone.logprobs).abs().max()) if prompts else 0.0


GREEDY = {"max_new_tokens": 12, "temperature": 0.0}
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "opt", "gpt2", "gpt_neox", "bloom"],
)
def test_greedy_tokens_equal_one_rank(family):
    config = {"inference_tp_size": 2}
    for error in run_ranks(_compare_with_one_rank, family, {}, config, GREEDY):
        assert error < 1000 * EPS


@pytest.mark.parametrize(
    ("world", "heads", "kv_heads"),
    [(2, 6, 1), (3, 6, 3), (4, 8, 2), (4, 4, 4)],
    ids=["one_kv_head", "one_each", "two_ranks_a_kv_head", "one_head_each"],
)
def test_kv_heads_are_divided_or_repeated(world, heads, kv_heads):
    options = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    options["intermediate_size"] = 96
    config = {"inference_tp_size": world}
    run_ranks(_compare_with_one_rank, "llama", options, config, GREEDY, world=world)


SAMPLED = {
    "max_new_tokens": 12,
    "temperature": 0.8,
    "top_p": 0.9,
    "n": 3,
    "repetition_penalty": 1.1,
}


def test_a_seed_gives_the_samples_of_one_rank():
    config = {"inference_tp_size": 2, "max_running": 4, "max_cache_gb": 2e-4}
    run_ranks(_compare_with_one_rank, "llama", {}, config, SAMPLED)


def _responses(config):
    """To one prompt, twice on each rank: by their own seeds, and by their parts of one batch's."""
    engine, prompts = he.HybridEngine(build("llama"), he.EngineConfig(**config)), [[5, 6, 7]] * 2
    part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    seeds = [None, he.sequence_seeds(prompts * 2, 0)[part]]
    params = he.SamplingParams(max_new_tokens=12)
    rollouts = [engine.generate(prompts, params, seeds=s) for s in seeds]
    return [[rollout.response(i) for i in range(2)] for rollout in rollouts]


@pytest.mark.parametrize("config", [{}, {"inference_tp_size": 2}], ids=["tp1", "tp2"])
def test_equal_prompts_on_two_ranks_draw_differently(config):
    """Each rank for itself; or, with their parts of a batch's seeds, as one process does."""
    engine, params = he.HybridEngine(build("llama")), he.SamplingParams(max_new_tokens=12)
    rollout = engine.generate([[5, 6, 7]] * 4, params)
    expected = [rollout.response(i) for i in range(4)]
    (own, divided), (others, rest) = run_ranks(_responses, config)
    assert own == expected[:2]
    assert len({tuple(response) for response in own + others}) == 4
    assert divided + rest == expected


@pytest.mark.parametrize(
    "prompts", [[[[5, 6, 7]], []], [[], [[5, 6, 7]]], [[], []]], ids=["second", "first", "both"]
)
def test_a_rank_may_have_no_prompts(prompts):
    config = {"inference_tp_size": 2}
    run_ranks(_compare_with_one_rank, "llama", {}, config, GREEDY, prompts)


def test_two_groups_of_two_ranks():
    config = {"inference_tp_size": 2}
    run_ranks(_compare_with_one_rank, "qwen2", {}, config, GREEDY, world=4)


def _memory():
    model = build("llama", vocab_size=97)
    engine = he.HybridEngine(model, he.EngineConfig(inference_tp_size=2))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    with engine.rollout():
        mine = sum(p.numel() * p.element_size() for p in engine.rollout_parameters().values())
    left = sum(p.numel() for p in engine.rollout_parameters().values())
    return mine / whole, left


def test_a_rank_holds_half_and_gives_it_back():
    for share, left in run_ranks(_memory):
        assert share < 0.55
        assert left == 0


def _refused(family, options, config):
    try:
        he.HybridEngine(build(family, **options), he.EngineConfig(**config))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("world", "size", "options", "message"),
    [
        (3, 2, {}, "does not divide the 3 ranks"),
        (2, 2, {"num_attention_heads": 3, "num_key_value_heads": 3}, "3 attention heads and 3 key"),
        (4, 4, {"num_attention_heads": 12, "num_key_value_heads": 6}, "12 attention heads and 6"),
        (2, 2, {"intermediate_size": 81}, "MLP's width 81"),
    ],
    ids=["world", "heads", "kv_heads", "mlp"],
)
def test_what_cannot_be_divided_is_refused(world, size, options, message):
    errors = run_ranks(_refused, "llama", options, {"inference_tp_size": size}, world=world)
    assert all(message in error for error in errors)
