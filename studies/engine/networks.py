"""Deep residual autoencoders: the taper of the origin's drawing, one class for every study."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Residual = Literal["none", "identity", "scaled", "rezero"]
Norm = Literal["none", "pre", "branch", "heads"]


def fit_width(h: Tensor, width: int) -> Tensor:
    """Parameter-free skip between widths: crop where the width shrinks, zero-pad where it grows.

    Example:
        >>> fit_width(torch.tensor([[1.0, 2.0, 3.0]]), 2).tolist()
        [[1.0, 2.0]]
        >>> fit_width(torch.tensor([[1.0, 2.0]]), 3).tolist()
        [[1.0, 2.0, 0.0]]
    """
    missing = width - h.shape[-1]
    if missing == 0:
        return h
    return F.pad(h, (0, missing)) if missing > 0 else h[..., :width]


class ResidualLayer(nn.Module):
    """``h_l = fit(h_{l-1}) + scale * f_l(h_{l-1})`` with ``f = LeakyReLU(Linear(.))``.

    ``scale`` is 1 (``identity``), ``1/sqrt(num_residual)`` (``scaled``) or a learned scalar that starts at
    0 (``rezero``); ``none`` drops the skip. ``norm="pre"`` normalises the branch's input, ``norm="branch"``
    its output; both LayerNorms have no parameters.
    """

    def __init__(self, fan_in: int, fan_out: int, residual: Residual, norm: Norm, num_residual: int) -> None:
        super().__init__()
        self.linear = nn.Linear(fan_in, fan_out)
        self.skip = residual != "none"
        self.norm = norm
        self.scale: float | nn.Parameter = 1.0
        if residual == "scaled":
            self.scale = 1.0 / math.sqrt(num_residual)
        elif residual == "rezero":
            self.scale = nn.Parameter(torch.zeros(()))

    def branch(self, h: Tensor) -> Tensor:
        """``f_l(h)``, unscaled."""
        if self.norm == "pre":
            h = F.layer_norm(h, h.shape[-1:])
        h = F.leaky_relu(self.linear(h), 0.2)
        return F.layer_norm(h, h.shape[-1:]) if self.norm == "branch" else h

    def forward(self, h: Tensor) -> Tensor:
        f = self.branch(h)
        if not self.skip:
            return f
        h = fit_width(h, f.shape[-1])
        return torch.add(h, f, alpha=self.scale) if isinstance(self.scale, float) else h + self.scale * f


class Autoencoder(nn.Module):
    """A fully connected (variational) autoencoder of ``depth`` weight layers from input to output.

    Each half has ``depth / 2`` layers. Four are projections (input, code, back from the code, output); the
    ``depth - 4`` others are :class:`ResidualLayer` whose widths taper linearly from ``widths[0]`` at the
    data to ``widths[1]`` at the code. The default initialisation of torch, a linear output.

    Args:
        depth: Weight layers on the path from input to output; even, at least 6.
        widths: Hidden width next to the data and next to the code [units].
        code: Width of the code [units].
        residual: ``none``, ``identity``, ``scaled`` (1/sqrt of the number of residual layers), ``rezero``.
        norm: ``none``, ``pre``, ``branch``, or ``heads``; all but ``none`` normalise what the code is read from.
        variational: Sample the code (VAE) or pass it on (AE).
        inputs: Width of the data [units].

    Raises:
        ValueError: If ``depth`` is odd or below 6, or a name is unknown.

    Example:
        >>> net = Autoencoder(depth=8, widths=(16, 8), code=4, residual="scaled")
        >>> net.loss(torch.rand(5, 784)).shape
        torch.Size([])
    """

    def __init__(
        self,
        depth: int = 80,
        widths: tuple[int, int] = (128, 32),
        code: int = 16,
        residual: Residual = "scaled",
        norm: Norm = "none",
        variational: bool = True,
        inputs: int = 784,
    ) -> None:
        super().__init__()
        if depth % 2 or depth < 6:
            raise ValueError(f"depth must be even and at least 6 (two projections a half), got depth = {depth}.")
        if residual not in get_args(Residual):
            raise ValueError(f"residual must be one of {get_args(Residual)}, got residual = {residual!r}.")
        if norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {get_args(Norm)}, got norm = {norm!r}.")
        outer, inner = widths
        hidden = depth // 2 - 2
        taper = [round(outer + (inner - outer) * i / hidden) for i in range(hidden + 1)]

        def layers(sizes: list[int]) -> list[ResidualLayer]:
            return [ResidualLayer(i, o, residual, norm, 2 * hidden) for i, o in pairwise(sizes)]

        self.encode_in = nn.Linear(inputs, outer)
        self.encoder = nn.Sequential(*layers(taper))
        self.to_code = nn.Linear(inner, 2 * code if variational else code)
        self.from_code = nn.Linear(code, inner)
        self.decoder = nn.Sequential(*layers(taper[::-1]))
        self.decode_out = nn.Linear(outer, inputs)
        self.normalise_heads = norm != "none"
        self.variational = variational

    def encode(self, x: Tensor) -> Tensor:
        """Code of ``x``; mean and log-variance side by side when variational."""
        h: Tensor = self.encoder(self.encode_in(x))
        if self.normalise_heads:
            h = F.layer_norm(h, h.shape[-1:])
        code: Tensor = self.to_code(h)
        return code

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction from a code."""
        reconstruction: Tensor = self.decode_out(self.decoder(self.from_code(z)))
        return reconstruction

    def example_losses(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Loss of each example: sum of squared errors over the pixels, plus the KL divergence if variational."""
        code = self.encode(x)
        if not self.variational:
            return (self.decode(code) - x).square().sum(-1)
        mean, log_var = code.chunk(2, dim=-1)
        noise = torch.empty_like(mean).normal_(generator=generator)
        kl = 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum(-1)
        return (self.decode(mean + (0.5 * log_var).exp() * noise) - x).square().sum(-1) + kl

    def reconstruction_errors(self, x: Tensor) -> Tensor:
        """Squared error of each example, reconstructed from the mean of its code: the anomaly score."""
        code = self.encode(x)
        return (self.decode(code.chunk(2, dim=-1)[0] if self.variational else code) - x).square().sum(-1)

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean of :meth:`example_losses` over the micro-batch."""
        return self.example_losses(x, generator).mean()
