"""Texts that end a response, watched for in the tokens as they come."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StopStringCriteria

_NO_TOKEN = torch.iinfo(torch.int32).max  # the criterion takes an unknown token for no text


class StopStringWatch:
    """Hugging Face's criterion on the last tokens of each sequence, the prompt's end included."""

    def __init__(
        self,
        criterion: StopStringCriteria,
        prompts: list[list[int]],
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        self._criterion = criterion
        width: int = criterion.maximum_token_len  # a token is at least a character
        ends = [prompt[-width:] for prompt in prompts]
        padded = [[_NO_TOKEN] * (width - len(end)) + end for end in ends]
        self._tokens = torch.full((len(prompts), width + max_new_tokens), _NO_TOKEN, device=device)
        self._tokens[:, :width] = torch.tensor(padded, device=device)
        self._width = width
        self._window = torch.arange(width, device=device)

    def ended(self, indices: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """(B,) bool: whether the responses `indices`, now `lengths` long with `tokens`, end."""
        self._tokens[indices, self._width + lengths - 1] = tokens
        window = self._tokens[indices.unsqueeze(1), lengths.unsqueeze(1) + self._window]  # (B, W)
        return self._criterion(window, None)
