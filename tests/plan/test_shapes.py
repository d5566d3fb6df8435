"""Shapes count what Hugging Face's models hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.plan import find_shape
from rlhf.plan.known import KNOWN, known_config


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(name))
    held = sum(parameter.numel() for parameter in model.parameters())
    bias_of_qkv = 2e-4 * held if name.startswith("qwen2.5") else 0  # not counted
    assert abs(find_shape(name).parameters - held) <= bias_of_qkv


def test_flops_agree_with_the_published_formula_for_opt() -> None:
    shape = find_shape("OPT-13B")  # any case
    assert shape.forward_flops(512) == pytest.approx(shape.published_flops(512), rel=0.01)


def test_flops_by_hand() -> None:
    shape = find_shape("tiny")
    matrices = 2 * 3 * (4 * (192 * 32 * (6 + 2 + 2) + 192 * 6 * 32 + 3 * 192 * 512))
    attention = 4 * 6 * 4 * 32 * (3 * 3 / 2)  # layers, heads; q k and p v; half of T^2
    assert shape.forward_flops(3, logits=False) == matrices + attention
    assert shape.forward_flops(3) - shape.forward_flops(3, logits=False) == 2 * 3 * 850 * 192


def test_a_folder_and_a_config_file_work_too(tmp_path: Path) -> None:
    config = known_config("15M")
    config.save_pretrained(tmp_path)
    from_folder, from_file = find_shape(str(tmp_path)), find_shape(str(tmp_path / "config.json"))
    assert from_folder == from_file
    assert from_folder.parameters == find_shape("15M").parameters
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == from_folder.hidden


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no model 'gpt-9': give a folder.*opt-1\.3b"):
        find_shape("gpt-9")
