"""Several parameters in one buffer, so that one matrix product serves them all."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FusedParameters:
    """Parameters that become views of one buffer, row after row: Q, K, V, or gate and up.

    The model keeps training its own parameters; the decoder reads the buffer. Nothing is copied at
    the flip, because they are the same memory. Whoever replaces a parameter or its storage
    (`load_state_dict(assign=True)`, `.to()`) breaks that; `refresh` notices and fuses anew.
    """

    def __init__(self, modules: list[nn.Module], name: str) -> None:
        self._modules = modules
        self._name = name  # "weight" or "bias", of each module
        self._buffer: Tensor | None = None

    @property
    def buffer(self) -> Tensor:
        """(sum of rows, columns), or (sum of rows,) for biases."""
        assert self._buffer is not None, "refresh() comes first"
        return self._buffer

    @torch.inference_mode(False)  # an inference tensor could not be trained
    def refresh(self) -> None:
        """Make the parameters views of the buffer, if they are not."""
        if self._is_current():
            return
        parameters = self._parameters()
        self._buffer = torch.cat([parameter.data for parameter in parameters])
        for parameter, view in zip(parameters, self._views(), strict=True):
            parameter.data = view

    @torch.inference_mode(False)
    def release(self) -> None:
        """Give every parameter a storage of its own again."""
        if self._buffer is None:
            return
        shared = self._buffer.untyped_storage().data_ptr()
        for parameter in self._parameters():
            if parameter.untyped_storage().data_ptr() == shared:
                parameter.data = parameter.data.clone()
        self._buffer = None

    def _parameters(self) -> list[nn.Parameter]:
        return [getattr(module, self._name) for module in self._modules]

    def _views(self) -> list[Tensor]:
        rows = [parameter.shape[0] for parameter in self._parameters()]
        return list(self.buffer.split(rows))

    def _is_current(self) -> bool:
        if self._buffer is None:
            return False
        pairs = zip(self._parameters(), self._views(), strict=True)
        return all(
            parameter.data_ptr() == view.data_ptr() and parameter.dtype == view.dtype
            for parameter, view in pairs
        )
