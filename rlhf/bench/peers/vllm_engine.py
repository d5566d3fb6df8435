"""vLLM: a serving engine beside the training model, with a second copy of the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.bench.measure import versions
from rlhf.bench.peers import Answer, Generator, Request
from rlhf.bench.subject import Subject

ABOUT = "vLLM on a second copy of the weights"
MEMORY_SHARE = 0.45  # of the GPU; the training model and its peers have the rest


def why_not(subject: Subject) -> str | None:
    if "vllm" not in versions(["vllm"]):
        return "vllm is not installed: pip install vllm"
    if subject.device.type != "cuda":
        return "vllm's wheel wants a GPU"
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        engine = LLM(
            folder, skip_tokenizer_init=True, gpu_memory_utilization=MEMORY_SHARE,
            dtype=str(subject.dtype).removeprefix("torch."), enable_prefix_caching=False,
        )  # fmt: skip

        def generate(request: Request) -> Answer:
            params = SamplingParams(
                max_tokens=request.new_tokens, temperature=request.temperature,
                ignore_eos=True, stop_token_ids=list(request.stop_token_ids), detokenize=False,
            )  # fmt: skip
            prompts = [{"prompt_token_ids": prompt} for prompt in request.prompts]
            outputs = engine.generate(prompts, params, use_tqdm=False)
            return Answer([list(output.outputs[0].token_ids) for output in outputs])

        yield generate
