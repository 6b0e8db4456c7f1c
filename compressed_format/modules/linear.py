"""Layers that run straight from a checkpoint's tensors: :class:`CompressedLinear`, :class:`CompressedEmbedding`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compressed_format import ops
from compressed_format.config import CompressionFormat, QuantizationScheme
from compressed_format.modules.base import CompressedModule

__all__ = ["CompressedEmbedding", "CompressedLinear"]


class CompressedLinear(CompressedModule, nn.Linear):  # type: ignore[override]  # weight is computed
    """``y = x @ weight.T + bias`` from packed tensors: :func:`~compressed_format.compress` makes it of a Linear.

    Where the scheme says so, activations are rounded on the way in and out. The bias is trainable.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        shape: tuple[int, int],
        scheme: QuantizationScheme | None,
        format: CompressionFormat,
        *,
        sparsity: CompressionFormat | None = None,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype,
    ) -> None:
        self._set_up(tensors, shape, scheme, format, sparsity, dtype)
        vars(self).update(out_features=shape[0], in_features=shape[1])
        if bias is None or isinstance(bias, nn.Parameter):
            self._parameters["bias"] = bias
        else:
            self._parameters["bias"] = nn.Parameter(bias, requires_grad=bias.is_floating_point())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` ``[..., in_features]`` in any float dtype, to ``[..., out_features]`` in the same dtype."""
        if self._sharding is not None:
            return self._sharding.linear(self, input)
        weight = self._weight_tensors()  # checked before activations are rounded
        parameters = self._parameters
        if self._input is None:
            output = ops.linear(input, *weight, parameters["bias"], *self._layout)
        else:
            static = parameters.get("input_scale"), parameters.get("input_zero_point")
            output = ops.quantized_linear(input, *static, *self._input, *weight, parameters["bias"], *self._layout)
        return self._quantize_output(output)

    def extra_repr(self) -> str:
        has_bias = self._parameters["bias"] is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, {self._describe()}"


class CompressedEmbedding(CompressedModule, nn.Embedding):  # type: ignore[override]  # weight is computed
    """Rows of a packed table, dequantized as they are looked up."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        shape: tuple[int, int],
        scheme: QuantizationScheme | None,
        format: CompressionFormat,
        *,
        sparsity: CompressionFormat | None = None,
        padding_idx: int | None = None,
        dtype: torch.dtype,
    ) -> None:
        self._set_up(tensors, shape, scheme, format, sparsity, dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx
        # What nn.Embedding's own methods read; a packed table is neither renormalised nor given gradients.
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Indices of any shape to ``[*input.shape, embedding_dim]`` in :attr:`dtype`."""
        if self._sharding is not None:
            return self._sharding.embedding(self, input)
        rows = ops.embedding(input, *self._weight_tensors(), *self._layout)
        return self._quantize_output(rows.to(self.dtype))

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._describe()}"
