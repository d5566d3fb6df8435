"""Which launcher serves which op. Importing this imports triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hybrid_engine.ops.triton import logprob, logprob_backward, norm, rope, swiglu

LAUNCHERS: dict[str, Callable[..., Any]] = {
    "linear_logprob": logprob.linear_logprob,
    "linear_logprob_backward": logprob_backward.linear_logprob_backward,
    "rms_norm": norm.rms_norm,
    "rms_norm_backward": norm.rms_norm_backward,
    "rope": rope.rope,
    "swiglu": swiglu.swiglu,
    "swiglu_backward": swiglu.swiglu_backward,
}
