"""The gradient of a linear layer's weight as the product that it is: G = D^T X, never formed unless asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslore.kernels.dispatch import sampled_product
from crosslore.layout import Block, MatrixLayout, as_dtype
from crosslore.rules.base import state_dtype

# Entries of a product that are alive at once while a norm is computed; 4 MiB in fp32.
PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class GradientFactors:
    """G = D^T X for y = x W^T, where D holds the gradients of y and X the inputs, one row a token.

    Both have one dtype, as the product that they stand for takes them.
    """

    # D, (tokens, rows)
    outputs: Tensor
    # X, (tokens, cols)
    inputs: Tensor

    @classmethod
    def of(cls, grad_output: Tensor, x: Tensor) -> "GradientFactors":
        """Return the factors of a layer's output gradient and input, any leading dimensions."""
        outputs = grad_output.reshape(-1, grad_output.shape[-1])
        return cls(outputs=outputs, inputs=as_dtype(x.reshape(-1, x.shape[-1]), outputs.dtype))

    def take(self, block: Block) -> "GradientFactors":
        """Return the factors of one block: the columns of D that belong to its rows."""
        if block.span is None:
            return self
        return GradientFactors(outputs=block.span.take(self.outputs.mT).mT, inputs=self.inputs)

    def dense(self) -> Tensor:
        """Return G, (rows, cols): what autograd would have put into `.grad`."""
        return self.outputs.mT @ self.inputs

    def project(self, basis: Tensor, layout: MatrixLayout) -> Tensor:
        """Return R = G P = D^T (X P), (rows, r), on the right; P^T G = (D P)^T X, (r, cols), on the left."""
        outputs, inputs = self.outputs, self.inputs
        if outputs.dtype == torch.float16:  # products of finite fp16 entries overflow
            outputs, inputs = outputs.float(), inputs.float()
        basis = as_dtype(basis, outputs.dtype)
        if layout.side == "right":
            return outputs.mT @ (inputs @ basis)
        return (outputs @ basis).mT @ inputs

    def norm_squared(self) -> Tensor:
        """Return |G|^2 = sum((D D^T) * (X X^T)), (), fp32 or fp64; a few tokens, or rows of G, at a time."""
        dtype = state_dtype(self.outputs)
        outputs, inputs = self.outputs.to(dtype), self.inputs.to(dtype)
        total = outputs.new_zeros(())
        if self.larger_than_dense:  # then the rows of G are the cheaper way too
            for rows in outputs.mT.split(max(1, PIECE // max(1, inputs.shape[1]))):
                total += (rows @ inputs).square().sum()
            return total
        at_once = max(1, PIECE // max(1, len(outputs)))
        for some_outputs, some_inputs in zip(outputs.split(at_once), inputs.split(at_once), strict=True):
            total += (some_outputs @ outputs.mT).mul_(some_inputs @ inputs.mT).sum()
        return total

    def entries(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Return G[rows, cols], (k,), fp32 or fp64: a product of D and X sampled at these positions."""
        return sampled_product(self.outputs.mT.contiguous(), self.inputs.mT.contiguous(), rows, cols)

    def joined(self, other: "GradientFactors") -> "GradientFactors":
        """Return the factors of the sum of two gradients: the tokens of both."""
        return GradientFactors(
            outputs=torch.cat([self.outputs, other.outputs]), inputs=torch.cat([self.inputs, other.inputs])
        )

    @property
    def larger_than_dense(self) -> bool:
        """Whether D and X together hold more than G would."""
        (tokens, rows), cols = self.outputs.shape, self.inputs.shape[1]
        return tokens * (rows + cols) > rows * cols
