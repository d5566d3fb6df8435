"""The hybrid engine on the live weights of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import hybrid_engine as he
from rlhf.bench.peers import Answer, Generator, Request
from rlhf.bench.subject import Subject

ABOUT = "hybrid_engine on the training weights"


def why_not(subject: Subject) -> str | None:
    from hybrid_engine.models import find_family

    try:
        find_family(subject.model)
    except ValueError as error:
        return str(error)
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    engine = he.HybridEngine(subject.model)

    def generate(request: Request) -> Answer:
        params = he.SamplingParams(
            max_new_tokens=request.new_tokens,
            temperature=request.temperature,
            stop_token_ids=request.stop_token_ids,
        )
        rollout = engine.generate(request.prompts, params)
        rows = range(len(request.prompts))
        ends = rollout.lengths.tolist()
        logprobs = rollout.logprobs.tolist()
        return Answer([rollout.response(i) for i in rows], [logprobs[i][: ends[i]] for i in rows])

    try:
        yield generate
    finally:
        engine.release()
