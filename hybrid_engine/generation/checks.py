"""What a prompt must be, said before any work."""

from __future__ import annotations

from array import array


def check_prompts(
    prompts: list[list[int]], *, max_new_tokens: int, vocab: int, positions: int, limited_by: str
) -> None:
    """Raises ValueError, with the number of the prompt and what to do.

    `vocab` are the rows of the head, `positions` the tokens of prompt and response together, which
    `limited_by` names.
    """
    limit = positions - max_new_tokens
    if prompts and limit < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be below {positions}: {limited_by} hold prompt "
            "and response"
        )
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, list) or not _integers(prompt):
            raise ValueError(
                f"prompt {i} must be a list of token ids, got {type(prompt).__name__}: tokenize "
                "texts, and call tolist() on tensors"
            )
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give it at least the BOS token")
        if len(prompt) > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} "
                f"{limited_by} leave room for {limit}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(
                f"prompt {i} has token ids outside [0, {vocab}), the rows of the model's head"
            )


def _integers(prompt: list[int]) -> bool:
    try:
        array("q", prompt)
    except OverflowError:  # an integer, which no vocabulary has
        return True
    except TypeError:
        return False
    return True
