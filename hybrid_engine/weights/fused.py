"""Several parameters in one buffer, so that one matrix product serves them all."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FusedParameters:
    """Parameters that become views of one buffer, row after row: Q, K, V, or gate and up.

    The model keeps training its own parameters; the decoder reads the buffer. Nothing is copied at
    the flip, because they are the same memory. Whoever replaces a parameter's storage (`.to()`,
    `load_state_dict(assign=True)`) breaks that; `refresh` notices and fuses anew.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._buffer: Tensor | None = None

    @property
    def buffer(self) -> Tensor:
        """(sum of rows, columns), or (sum of rows,) for biases."""
        assert self._buffer is not None, "refresh() comes first"
        return self._buffer

    def refresh(self) -> None:
        """Make the parameters views of the buffer, if they are not."""
        if self._is_current():
            return
        with torch.no_grad():
            self._buffer = torch.cat([parameter.data for parameter in self._parameters])
        for parameter, view in zip(self._parameters, self._views(), strict=True):
            parameter.data = view

    def release(self) -> None:
        """Give every parameter a storage of its own again."""
        if self._is_current():
            for parameter in self._parameters:
                parameter.data = parameter.data.clone()
        self._buffer = None

    def _views(self) -> list[Tensor]:
        rows = [parameter.shape[0] for parameter in self._parameters]
        return list(self.buffer.split(rows))

    def _is_current(self) -> bool:
        if self._buffer is None:
            return False
        pairs = zip(self._parameters, self._views(), strict=True)
        return all(
            parameter.data_ptr() == view.data_ptr() and parameter.dtype == view.dtype
            for parameter, view in pairs
        )
