"""`output_scores` and `output_logits` of an accelerated model: HF's, when they are read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import hybrid_engine as he
from hybrid_engine.models import FAMILIES
from tests.engine.accelerated import IDS, OPTIONS, served

SCORED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_hf(build, family: str) -> None:
    model = build(family)
    options = {**SCORED, **OPTIONS, "repetition_penalty": 1.3, "min_new_tokens": 6,
               "eos_token_id": list(range(0, 97, 5)), "do_sample": False}  # fmt: skip
    theirs = model.generate(IDS, **options)
    he.accelerate(model)
    mine = model.generate(IDS, **options)
    assert served(model) == 1
    assert torch.equal(mine.sequences, theirs.sequences)
    assert len(mine.scores) == len(theirs.scores) == mine.sequences.shape[1] - 5
    for name in ("scores", "logits"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-4)
    assert list(mine.keys()) == ["sequences", "scores", "logits"]
    transition = model.compute_transition_scores(mine.sequences, mine.scores)
    expected = model.compute_transition_scores(theirs.sequences, theirs.scores)
    torch.testing.assert_close(transition, expected, rtol=1e-4, atol=1e-4)


def test_scores_cost_nothing_until_they_are_read(model: Any, monkeypatch) -> None:
    he.accelerate(model)
    forwards: list[int] = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    output = model.generate(IDS, do_sample=False, **SCORED, **OPTIONS)
    assert torch.equal(output.sequences, model.generate(IDS, do_sample=False, **OPTIONS))
    assert not forwards
    assert output.scores is output.scores
    assert len(forwards) == 1
    assert len(output.to_tuple()) == 3


@pytest.mark.parametrize("view", ["keys", "values", "items", "to_tuple", "__iter__", "[1]"])
def test_no_view_of_the_output_misses_the_scores(model: Any, view: str) -> None:
    he.accelerate(model)
    output = model.generate(
        IDS, do_sample=False, return_dict_in_generate=True, output_scores=True, **OPTIONS
    )
    if view == "[1]":
        assert len(output[1]) == 12
    else:
        assert len(list(getattr(output, view)())) == 2


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_the_output_counts_as_hf_counts(model: Any, read: bool) -> None:
    he.accelerate(model)
    options = {"do_sample": False, "return_dict_in_generate": True, **OPTIONS}
    output = model.generate(IDS, output_scores=True, **options)
    scores = output.scores if read else None
    assert len(output) == 2
    assert "scores" in output
    assert "logits" not in output
    assert output.get("logits", 5) == 5
    assert output.get("scores") is (scores or output.scores)
    for copied in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert list(copied) == ["sequences", "scores"]
        assert torch.equal(torch.stack(copied.scores), torch.stack(output.scores))


def test_scores_have_no_dropout_in_train_mode(build) -> None:
    model = build("llama", attention_dropout=0.5)
    he.accelerate(model)
    first, second = (model.generate(IDS, do_sample=False, **SCORED, **OPTIONS) for _ in range(2))
    expected = torch.stack(first.scores)
    model.train()
    assert torch.equal(torch.stack(second.scores), expected)
    assert model.training


def test_scores_of_other_adapters_are_refused(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = he.accelerate(peft.get_peft_model(model, config).eval())
    with adapted.disable_adapter():
        output = adapted.generate(input_ids=IDS, do_sample=False, **SCORED, **OPTIONS)
        assert output.logits[0].isfinite().all()
    with pytest.raises(RuntimeError, match="or the active adapters"):
        _ = output.scores


def test_a_model_made_in_inference_mode_gives_scores(build) -> None:
    with torch.inference_mode():
        model = build("llama")
    expected = model.generate(IDS, do_sample=False, **SCORED, **OPTIONS)
    he.accelerate(model)
    output = model.generate(IDS, do_sample=False, **SCORED, **OPTIONS)
    assert served(model) == 1
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.scores, expected.scores, rtol=1e-4, atol=1e-4)


def test_scores_of_other_weights_are_refused(model: Any) -> None:
    he.accelerate(model)
    output = model.generate(IDS, do_sample=False, **SCORED, **OPTIONS)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weights have changed since this generation"):
        _ = output.scores
