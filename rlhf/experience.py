"""What one rollout leaves behind for the update."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Experience:
    """B sequences. T counts response tokens: column t belongs to the t-th token generated."""

    input_ids: Tensor  # (B, P + T) int64, prompt and response, right-padded
    prompt_lengths: Tensor  # (B,) int64
    response_lengths: Tensor  # (B,) int64, the stop token included
    old_logprobs: Tensor  # (B, T) fp32, of the policy that generated
    sampling_logprobs: Tensor  # (B, T) fp32, in the (truncated) distribution sampled from
    ref_logprobs: Tensor  # (B, T) fp32
    values: Tensor  # (B, T) fp32, of the critic at the position that predicts token t, or zeros
    scores: Tensor  # (B,) fp32, of the reward, the missing-EOS penalty taken off
    rewards: Tensor  # (B, T) fp32, per token, KL penalty included
    advantages: Tensor  # (B, T) fp32
    returns: Tensor  # (B, T) fp32
    ended: Tensor  # (B,) bool, the response stopped by itself
    groups: Tensor  # (B,) int64, the number of its prompt

    @property
    def response_mask(self) -> Tensor:
        """(B, T) bool, True up to and including the first stop token."""
        columns = torch.arange(self.old_logprobs.shape[1], device=self.input_ids.device)
        return columns < self.response_lengths.unsqueeze(1)

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, rows: Tensor) -> Experience:
        """The rows, cut to their longest sequence and response."""
        part = Experience(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})
        width, responses = int(part.lengths.max()), int(part.response_lengths.max())
        part.input_ids = part.input_ids[:, :width]
        for f in fields(part):
            tensor = getattr(part, f.name)
            if tensor.dim() == 2 and f.name != "input_ids":
                setattr(part, f.name, tensor[:, :responses])
        return part
