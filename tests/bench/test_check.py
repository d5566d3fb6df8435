"""What gives wrong tokens is not timed, and what gives right ones is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rlhf.bench.check import (
    CHECKED_TOKENS,
    WrongTokens,
    check_tokens,
    logprob_gap,
    model_logits,
)
from rlhf.bench.generate import measure_generation
from rlhf.bench.peers import PEERS, Answer, Generator, Request, find_peer, hf
from rlhf.bench.subject import Subject, Workload

WORKLOAD = Workload(batch=3, prompt_tokens=12, new_tokens=6, natural=True)


def request_of(subject: Subject) -> Request:
    return Request(WORKLOAD.prompts(subject.shape.vocab), WORKLOAD.new_tokens)


@pytest.mark.parametrize("name", ["hf", "ours", "colossal", "trl"])
def test_greedy_tokens_of_ragged_prompts_pass(subject: Subject, name: str) -> None:
    with find_peer(name).generator(subject) as generate:
        check_tokens(name, generate, subject, request_of(subject))


def test_one_wrong_token_is_named(subject: Subject) -> None:
    def generate(request: Request) -> Answer:
        answer = hf.generate(subject.model, request)
        answer.tokens[1][4] = (answer.tokens[1][4] + 1) % subject.shape.vocab
        return answer

    with pytest.raises(WrongTokens, match="step 4 of prompt 1, HF's is"):
        check_tokens("other", generate, subject, request_of(subject))


def test_too_few_tokens_are_wrong_too(subject: Subject) -> None:
    def generate(request: Request) -> Answer:
        return Answer([row[:-1] for row in hf.generate(subject.model, request).tokens])

    with pytest.raises(WrongTokens, match="asked for 6 tokens, got \\[5\\]"):
        check_tokens("other", generate, subject, request_of(subject))


def test_a_wrong_peer_gets_a_note_and_no_row(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pick_last(logits: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.full(logits.shape[:-1], logits.shape[-1] - 1)

    monkeypatch.setattr("torch.Tensor.argmax", pick_last)  # what Coati's loop picks by
    notes: dict[str, str] = {}
    rows = measure_generation(
        subject, WORKLOAD, ["colossal"], repeats=1, read_bandwidth=1e10, notes=notes
    )
    assert rows == []
    assert notes["colossal"].startswith("WrongTokens: colossal: greedy token 849 at step 0")


def test_logprob_gap_is_that_of_the_hf_forward(subject: Subject) -> None:
    request = request_of(subject)
    with find_peer("ours").generator(subject) as generate:
        answer = generate(request)
    gap = logprob_gap(subject, request, answer)
    assert gap is not None
    assert gap[0] <= gap[1] < 1e-4
    assert answer.logprobs is not None
    answer.logprobs[0][0] += 0.5
    moved = logprob_gap(subject, request, answer)
    assert moved is not None
    assert moved[1] == pytest.approx(0.5, abs=1e-4)


def test_teacher_forced_logits_are_those_of_each_row_alone(subject: Subject) -> None:
    request = request_of(subject)
    answer = hf.generate(subject.model, request)
    for row, logits in enumerate(model_logits(subject, request.prompts, answer)):
        ids = torch.tensor([request.prompts[row] + answer.tokens[row]])
        alone = subject.model(ids).logits[0, len(request.prompts[row]) - 1 : -1]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_every_peer_says_what_it_is_and_why_it_cannot_run(subject: Subject) -> None:
    reasons = {name: find_peer(name).why_not(subject) for name in PEERS}
    assert all(find_peer(name).ABOUT for name in PEERS)
    assert reasons["ours"] is None
    assert reasons["hf"] is None
    assert reasons["deepspeed-he"] == "its injected kernels are CUDA only"
    assert "torchrun" in str(reasons["hf-ddp"])


def test_a_peer_is_a_small_adapter() -> None:
    """30 to 80 lines each: more would be a trainer of ours beside theirs."""
    for name in PEERS:
        source = find_peer(name).__file__  # type: ignore[attr-defined]
        assert 30 <= len(Path(source).read_text().splitlines()) <= 80, name


def test_an_unknown_peer_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no peer 'sglang': use some of ours, hf"):
        find_peer("sglang")


def test_natural_lengths_end_about_half_way(subject: Subject) -> None:
    workload = Workload(batch=48, prompt_tokens=8, new_tokens=24, natural=True)
    prompts = workload.prompts(subject.shape.vocab)
    assert {len(prompt) for prompt in prompts} <= set(range(2, 9))
    stop = workload.stop_token_ids(subject.shape.vocab)
    with find_peer("ours").generator(subject) as generate:
        answer = generate(Request(prompts, 24, 1.0, stop))
    lengths = [len(tokens) for tokens in answer.tokens]
    assert 5 < sum(lengths) / len(lengths) < 17
    ended = [tokens for tokens in answer.tokens if len(tokens) < 24]
    assert all(tokens[-1] in stop for tokens in ended)


def test_a_peer_that_fails_at_full_length_costs_no_other_its_row(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of its tokens is short; memory may not suffice for all of them."""
    module = find_peer("colossal")

    @contextmanager
    def short_of_memory(subject: Subject) -> Iterator[Generator]:
        def generate(request: Request) -> Answer:
            if request.new_tokens > CHECKED_TOKENS:
                raise torch.OutOfMemoryError
            return hf.generate(subject.model, request)

        yield generate

    monkeypatch.setattr(module, "generator", short_of_memory)
    notes: dict[str, str] = {}
    workload = Workload(batch=1, prompt_tokens=4, new_tokens=CHECKED_TOKENS + 1)
    rows = measure_generation(
        subject, workload, ["colossal", "ours"], repeats=1, read_bandwidth=1e10, notes=notes
    )
    assert [row["peer"] for row in rows] == ["ours"]
    assert notes == {"colossal": "OutOfMemoryError: "}
