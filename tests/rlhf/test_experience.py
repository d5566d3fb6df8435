"""The stored batch and its parts."""

from __future__ import annotations

import torch

from rlhf.experience import Experience

PROMPTS, RESPONSES = [3, 1, 2], [2, 5, 1]


def experience() -> Experience:
    """Every cell of every (B, T) tensor has its own value."""
    batch, width = 3, 5
    cells = torch.arange(float(batch * width)).view(batch, width)
    return Experience(
        input_ids=torch.arange(18).view(3, 6),
        prompt_lengths=torch.tensor(PROMPTS),
        response_lengths=torch.tensor(RESPONSES),
        old_logprobs=cells,
        sampling_logprobs=cells + 600,
        ref_logprobs=cells + 100,
        values=cells + 200,
        scores=torch.tensor([1.0, 2.0, 3.0]),
        rewards=cells + 300,
        advantages=cells + 400,
        returns=cells + 500,
        ended=torch.tensor([True, False, True]),
        groups=torch.tensor([7, 7, 8]),
    )


def test_mask_is_1_up_to_and_including_the_first_stop_token() -> None:
    """Found by length, so that a pad or stop token inside the text does not matter."""
    assert experience().response_mask.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0],
    ]


def test_lengths_are_prompt_and_response() -> None:
    assert experience().lengths.tolist() == [5, 6, 3]
    assert len(experience()) == 3


def test_select_takes_whole_rows_and_cuts_to_the_longest() -> None:
    whole = experience()
    part = whole.select(torch.tensor([2, 0]))
    assert part.input_ids.tolist() == [[12, 13, 14, 15, 16], [0, 1, 2, 3, 4]]
    assert part.prompt_lengths.tolist() == [2, 3]
    assert part.response_lengths.tolist() == [1, 2]
    assert part.scores.tolist() == [3.0, 1.0]
    assert part.ended.tolist() == [True, True]
    assert part.groups.tolist() == [8, 7]
    offsets = {"old_logprobs": 0, "ref_logprobs": 100, "values": 200, "rewards": 300}
    more = {"advantages": 400, "returns": 500, "sampling_logprobs": 600}
    for name, offset in {**offsets, **more}.items():
        expected = [[10.0 + offset, 11.0 + offset], [0.0 + offset, 1.0 + offset]]
        assert getattr(part, name).tolist() == expected, name
    assert part.response_mask.tolist() == [[True, False], [True, True]]


def test_select_leaves_the_whole_as_it_was() -> None:
    whole = experience()
    whole.select(torch.tensor([0])).rewards.zero_()
    assert torch.equal(whole.rewards, experience().rewards)
    assert whole.input_ids.shape == (3, 6)
