"""Who generates in `benchmarks/generation.py`: each a call (prompts) -> tokens (B, new_tokens)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hybrid_engine as he

Call = Callable[[list[list[int]]], Tensor]
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "top_p": {"top_p": 0.9}}


def ours(model: Any, sampling: str, new_tokens: int) -> Call:
    engine = he.HybridEngine(model)
    params = he.SamplingParams(max_new_tokens=new_tokens, stop_token_ids=(), **SAMPLING[sampling])
    return lambda prompts: engine.generate(prompts, params).tokens


def hugging_face(model: Any, sampling: str, new_tokens: int, **options: Any) -> Call:
    """`options` of generate, such as cache_implementation."""
    greedy = sampling == "greedy"
    filters = {} if greedy else {"top_k": 0, "top_p": SAMPLING[sampling]["top_p"]}

    def call(prompts: list[list[int]]) -> Tensor:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
            eos_token_id=None, do_sample=not greedy, **filters, **options,
        )  # fmt: skip
        return output[:, ids.shape[1] :]

    return call


class CTranslate2:
    """The same weights in CTranslate2, which computes bf16 models in fp32 on a CPU."""

    def __init__(self, model: Any) -> None:
        """Raises ImportError where the package is missing."""
        import ctranslate2

        self._folder = tempfile.TemporaryDirectory()
        path = self._folder.name
        model.save_pretrained(path)
        _tokenizer(model.config.vocab_size).save_pretrained(path)
        converter = ctranslate2.converters.TransformersConverter(path)
        self._generator = ctranslate2.Generator(
            converter.convert(f"{path}/converted", force=True), device="cpu",
            compute_type="float32", intra_threads=torch.get_num_threads(), inter_threads=1,
        )  # fmt: skip

    def call(self, sampling: str, new_tokens: int) -> Call:
        if sampling == "greedy":
            options: dict[str, Any] = {"sampling_topk": 1}
        else:
            options = {"sampling_topk": 0, "sampling_topp": SAMPLING[sampling]["top_p"]}

        def generate(prompts: list[list[int]]) -> Tensor:
            results = self._generator.generate_batch(
                [[f"t{token}" for token in prompt] for prompt in prompts],
                min_length=new_tokens, max_length=new_tokens, end_token=[],
                include_prompt_in_result=False, **options,
            )  # fmt: skip
            return torch.tensor([result.sequences_ids[0] for result in results])

        return generate


def _tokenizer(vocabulary: int) -> Any:
    """The token `t5` is number 5."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="t0", pad_token="t0", bos_token="t1",
        eos_token="t2",
    )  # fmt: skip
