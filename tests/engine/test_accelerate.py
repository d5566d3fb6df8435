"""HF's own `generate`, accelerated: same tokens, same options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import hybrid_engine as he
from rlhf.data import train_tokenizer
from tests.engine.accelerated import IDS, MASK, OPTIONS, served

GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "eos": {"eos_token_id": list(range(0, 97, 7))},
    "min_new_tokens": {"eos_token_id": list(range(0, 97, 3)), "min_new_tokens": 6},
    "min_length": {"eos_token_id": list(range(0, 97, 3)), "min_length": 9},
    "max_length": {"max_new_tokens": None, "max_length": 11},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "min_p": {"do_sample": True, "min_p": 1.0},
    "top_p": {"do_sample": True, "top_p": 1e-6, "temperature": 0.7},
    "top_p_0": {"do_sample": True, "top_p": 0.0},
    "greedy_filters": {"logits_processor": [TemperatureLogitsWarper(3.0), TopPLogitsWarper(0.5)]},
    "renormalize": {"renormalize_logits": True, "remove_invalid_values": True},
    "eos_out_of_vocabulary": {"eos_token_id": 50_000},
    "pad_is_eos": {"eos_token_id": list(range(0, 97, 7)), "pad_token_id": 7},
    "static_cache": {"cache_implementation": "static"},
    "position_ids": {"position_ids": torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])},
    "num_return_sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
}


@pytest.mark.parametrize("name", GREEDY)
def test_tokens_are_those_of_hf(model: Any, name: str) -> None:
    options = {"do_sample": False, **OPTIONS, **GREEDY[name]}
    expected = model.generate(IDS, **options)
    he.accelerate(model)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert served(model) == 1


def test_sampling_follows_the_global_seed(model: Any) -> None:
    he.accelerate(model)
    options = {"do_sample": True, "top_p": 0.9, "temperature": 1.3, **OPTIONS}
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(IDS, **options))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_sampling_is_from_the_distribution_of_hf(model: Any) -> None:
    """All parameters at once: each token's log-prob is that of HF's processors' scores.

    Without padding, which HF's repetition penalty takes for tokens that were said.
    """
    ids = torch.tensor([[1, 5, 9, 30, 31], IDS[1].tolist()])
    he.accelerate(model)
    torch.manual_seed(3)
    options = {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02,
               "repetition_penalty": 1.2, "min_new_tokens": 4,
               "eos_token_id": list(range(0, 97, 9))}  # fmt: skip
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=True,
        num_return_sequences=16, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    assert served(model) == 1
    theirs = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    stops = tuple(options.pop("eos_token_id"))
    torch.manual_seed(3)
    seed = int(torch.randint(2**31 - 1, ()))  # as the accelerated call drew it
    params = he.SamplingParams(max_new_tokens=12, n=16, seed=seed, stop_token_ids=stops, **options)
    rollout = he.HybridEngine(model).generate(ids.tolist(), params)
    mine = rollout.truncated_logprobs
    inside = torch.arange(mine.shape[1]) < rollout.lengths.unsqueeze(1)
    assert torch.equal(torch.where(inside, rollout.tokens, 0), output.sequences[:, 5:])
    torch.testing.assert_close(mine[inside], theirs[inside], rtol=1e-3, atol=1e-3)
    assert inside.sum() > 32 * 4


def test_sampled_tokens_stay_inside_top_k(model: Any) -> None:
    he.accelerate(model)
    torch.manual_seed(0)
    output = model.generate(IDS[1:], do_sample=True, top_k=2, num_return_sequences=64,
                            max_new_tokens=1)  # fmt: skip
    allowed = model(IDS[1:]).logits[0, -1].topk(2).indices.tolist()
    assert set(output[:, -1].tolist()) == set(allowed)


def test_return_dict(model: Any) -> None:
    he.accelerate(model)
    output = model.generate(IDS, do_sample=False, return_dict_in_generate=True, **OPTIONS)
    assert torch.equal(output.sequences, model.generate(IDS, do_sample=False, **OPTIONS))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the cat sat on the mat", "a list of words"] * 4, vocab_size=290)


def test_stop_strings_are_those_of_hf(build, tokenizer: Any) -> None:
    model = build("llama", vocab_size=len(tokenizer))
    for token in range(len(tokenizer)):
        if len(tokenizer.decode([token])) == 1 or token < 10:  # a byte, a special token
            model.lm_head.weight.data[token] = 0.0
    options = {"do_sample": False, **OPTIONS, "max_new_tokens": 24}
    free = model.generate(IDS, **options)
    stops = [tokenizer.decode(free[i, 10:11]) for i in range(2)]
    options |= {"stop_strings": stops, "tokenizer": tokenizer}
    expected = model.generate(IDS, **options)
    assert expected.shape[1] < free.shape[1]
    he.accelerate(model)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert served(model) == 1


BATCH = [[1, 5, 9], [1, 7, 20, 21, 22], [1]]


@pytest.mark.parametrize("eos", [None, list(range(0, 97, 7))], ids=["free", "eos"])
def test_generate_batch(model: Any, eos: list[int] | None) -> None:
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)
    expected = []
    for prompt in BATCH:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected.append(output[0, len(prompt) :].tolist())
    he.accelerate(model)
    outputs = model.generate_batch(BATCH, generation_config=config, progress_bar=False)
    assert list(outputs) == ["req_0", "req_1", "req_2"]
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert [output.prompt_ids for output in outputs.values()] == BATCH
    assert all(output.is_finished() and output.logprobs == [] for output in outputs.values())
    assert served(model) == 1


def test_generate_batch_samples_with_logprobs(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=6, do_sample=True, num_return_sequences=3, top_k=5)
    he.accelerate(model)
    torch.manual_seed(0)
    outputs = model.generate_batch(
        BATCH, generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(return_logprobs=True),
    )  # fmt: skip
    assert len(outputs) == 9
    assert len({tuple(output.generated_tokens) for output in outputs.values()}) == 9
    for output in outputs.values():
        with torch.no_grad():
            logits = model(torch.tensor([output.prompt_ids + output.generated_tokens])).logits[0]
        kept = logits[len(output.prompt_ids) - 1 : -1].topk(5).values.logsumexp(-1)
        chosen = logits[len(output.prompt_ids) - 1 : -1].gather(
            1, torch.tensor(output.generated_tokens)[:, None]
        )
        torch.testing.assert_close(
            torch.tensor(output.logprobs), chosen[:, 0] - kept, rtol=1e-3, atol=1e-3
        )


def test_a_call_inside_an_open_rollout(model: Any) -> None:
    he.accelerate(model)
    expected = model.generate(IDS, do_sample=False, **OPTIONS)
    with he.acceleration(model).engine.rollout():  # type: ignore[union-attr]
        assert torch.equal(model.generate(IDS, do_sample=False, **OPTIONS), expected)
    assert served(model) == 2


def test_autocast_generates_in_its_type(model: Any) -> None:
    """The weights stay in fp32; the engine's are a copy in bf16, as autocast's own are."""
    he.accelerate(model)
    plain = model.generate(IDS, do_sample=False, **OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.generate(IDS, do_sample=False, **OPTIONS)
        output = model.generate(
            IDS, do_sample=False, return_dict_in_generate=True, output_logits=True, **OPTIONS
        )
        scores = model(found[:, :-1], attention_mask=(found > 0)[:, :-1].long()).logits
    engine = he.HybridEngine(he.restore(model), he.EngineConfig(dtype="bfloat16"))
    prompts = [[1, 5, 9], IDS[1].tolist()]
    expected = engine.generate(prompts, he.SamplingParams(max_new_tokens=12, temperature=0.0))
    assert torch.equal(found[:, 5:], expected.tokens)
    assert not torch.equal(found, plain)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    first = scores[1, 4].float()  # the same logits as under autocast, not those in fp32
    assert torch.equal(output.logits[0][1], first)


def test_engine_ignores_an_autocast_of_another_type(build) -> None:
    engine = he.HybridEngine(build("llama"))
    params = he.SamplingParams(max_new_tokens=12, temperature=0.0)
    expected = engine.generate([[1, 5, 9]], params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(engine.generate([[1, 5, 9]], params).logprobs, expected.logprobs)
        assert list(engine.stream([1, 5, 9], params)) == expected.response(0)


def test_deepspeed_chat_call(model: Any) -> None:
    """The shape of the call that a step-3 script makes on the unwrapped module."""
    options = {"max_length": IDS.shape[1] + 8, "pad_token_id": 0, "synced_gpus": False}
    expected = model.generate(IDS, attention_mask=MASK, do_sample=False, **options)
    he.accelerate(model)
    output = model.generate(IDS, attention_mask=MASK, do_sample=False, **options)
    assert torch.equal(output, expected)
    assert served(model) == 1


class Collected(list[int]):
    """A streamer, as HF's `generate` calls it."""

    def put(self, tokens: torch.Tensor) -> None:
        self.extend(tokens.flatten().tolist())

    def end(self) -> None:
        self.append(-1)


@pytest.mark.parametrize("eos", [None, list(range(0, 97, 7))], ids=["free", "eos"])
def test_a_streamer_gets_what_hf_gives_it(model: Any, eos: list[int] | None) -> None:
    options = {**OPTIONS, "attention_mask": MASK[1:], "do_sample": False, "eos_token_id": eos}
    expected, found = Collected(), Collected()
    model.generate(IDS[1:], streamer=expected, **options)
    he.accelerate(model)
    sequences = model.generate(IDS[1:], streamer=found, **options)
    assert found == expected == [*sequences[0].tolist(), -1]
    assert served(model) == 1


def test_tokens_are_streamed_as_they_are_sampled(model: Any) -> None:
    """A streamer that ends the generation by an exception, as chat programs do."""

    class Enough(Exception):
        pass

    class Three(Collected):
        def put(self, tokens: torch.Tensor) -> None:
            super().put(tokens)
            if len(self) == 5 + 3:
                raise Enough

    he.accelerate(model)
    with pytest.raises(Enough):
        model.generate(IDS[1:], streamer=Three(), do_sample=False, max_new_tokens=100)
    model.generate(IDS, do_sample=False, **OPTIONS)
    assert served(model) == 2
