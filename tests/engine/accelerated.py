"""The call that the tests of `accelerate` make, and how they count it."""

from __future__ import annotations

import torch
from torch import nn

import hybrid_engine as he

IDS = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 20, 21, 22]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
OPTIONS = {"attention_mask": MASK, "max_new_tokens": 12}


def served(model: nn.Module) -> int:
    state = he.acceleration(model)
    assert state is not None
    return state.served
