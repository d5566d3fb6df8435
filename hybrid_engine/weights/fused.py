"""Several parameters in one buffer, so that one matrix product serves them all."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FusedParameters:
    """Parameters as one buffer, row after row: Q, K, V, or gate and up.

    The parameters become views of the buffer: the model keeps training them, the decoder reads the
    buffer, and nothing is copied at the flip, because they are the same memory. Whoever replaces a
    parameter or its storage (`load_state_dict(assign=True)`, `.to()`) breaks that; `refresh`
    notices and fuses anew.

    Parameters that are part of somebody's storage already, as ZeRO 1 and 2 flatten them, stay
    there: if they lie one after another, they are the buffer; if not, it is a copy. It is one of
    parameters made in inference mode too, whose storage cannot be replaced.
    """

    def __init__(self, modules: list[nn.Module], name: str) -> None:
        self._modules = modules
        self._name = name  # "weight" or "bias", of each module
        self._buffer: Tensor | None = None
        self._is_ours = False  # the parameters were moved into the buffer

    @property
    def buffer(self) -> Tensor:
        """(sum of rows, columns), or (sum of rows,) for biases."""
        assert self._buffer is not None, "refresh() comes first"
        return self._buffer

    @torch.inference_mode(False)  # an inference tensor could not be trained
    def refresh(self) -> None:
        """Make the buffer what the parameters are."""
        if self._is_current():
            return
        parameters = self._parameters()
        tensors = [parameter.data for parameter in parameters]
        adjacent = _as_one(tensors)
        foreign = any(map(self._is_foreign, tensors)) or any(p.is_inference() for p in parameters)
        self._is_ours = adjacent is None and not foreign
        self._buffer = torch.cat(tensors) if adjacent is None else adjacent
        if self._is_ours:
            for parameter, view in zip(parameters, self._views(), strict=True):
                parameter.data = view

    @torch.inference_mode(False)
    def release(self) -> None:
        """Give every parameter that was moved a storage of its own again."""
        if self._buffer is not None and self._is_ours:
            shared = self._buffer.untyped_storage().data_ptr()
            for parameter in self._parameters():  # None: taken out since
                if parameter is not None and parameter.untyped_storage().data_ptr() == shared:
                    parameter.data = parameter.data.clone()
        self._buffer, self._is_ours = None, False

    def _is_foreign(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if self._is_ours and storage.data_ptr() == self.buffer.untyped_storage().data_ptr():
            return False
        return storage.nbytes() > tensor.numel() * tensor.element_size()

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


def _as_one(tensors: list[Tensor]) -> Tensor | None:
    """Contiguous tensors that follow one another in one storage, as one; None if they do not."""
    storage, end = tensors[0].untyped_storage().data_ptr(), tensors[0].data_ptr()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != storage:
            return None
        if tensor.data_ptr() != end:
            return None
        end += tensor.numel() * tensor.element_size()
    rows = sum(tensor.shape[0] for tensor in tensors)
    shape = (rows, *tensors[0].shape[1:])
    return tensors[0].as_strided(shape, tensors[0].stride())
