"""A layer's gradient on one example as a short sum: of rows, of outer products, of looked-up rows; and its norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaptbatch.accumulate.gradients import wide_dtype

# Elements of the largest intermediate; more examples than fit are taken in turns.
CHUNK = 2**24


class Rows(NamedTuple):
    """``sum_t rows_t``: a bias or the scale of a LayerNorm."""

    rows: Tensor  # (m, positions, n)

    def sq_norms(self) -> Tensor:
        return wide(torch.linalg.vector_norm(self.rows.sum(1), dim=1)).square()

    def gradient(self, shape: torch.Size) -> Tensor:
        return self.rows.sum((0, 1)).reshape(shape)

    def sq_scale(self) -> Tensor:
        return self.rows.square().sum()


class Outer(NamedTuple):
    """``sum_t deltas_t inputs_t^T`` in each group: the weight of a Linear or a Conv."""

    deltas: Tensor  # (m, groups, positions, outputs)
    inputs: Tensor  # (m, groups, positions, inputs)

    def sq_norms(self) -> Tensor:
        groups, positions, outputs = self.deltas.shape[1:]
        inputs = self.inputs.shape[-1]
        # Multiplications an example: positions^2 (outputs + inputs) against positions outputs inputs.
        gram = positions * (outputs + inputs) <= outputs * inputs
        form, entries = (gram_sq_norms, 2 * positions**2) if gram else (direct_sq_norms, outputs * inputs)
        step = max(1, CHUNK // (groups * entries))
        pairs = zip(torch.split(self.deltas, step), torch.split(self.inputs, step), strict=True)
        return torch.cat([form(deltas, inputs) for deltas, inputs in pairs])

    def gradient(self, shape: torch.Size) -> Tensor:
        return torch.einsum("mgto,mgti->goi", self.deltas, self.inputs).reshape(shape)

    def sq_scale(self) -> Tensor:
        return (self.deltas.square().sum(-1) * self.inputs.square().sum(-1)).sum()


class Lookup(NamedTuple):
    """``sum_t e(id_t) deltas_t^T`` with unit vectors ``e``: the weight of an Embedding."""

    ids: Tensor  # (m, positions, 1)
    deltas: Tensor  # (m, positions, d)

    def sq_norms(self) -> Tensor:
        same = self.ids == self.ids.mT
        return wide((self.deltas @ self.deltas.mT * same).sum((1, 2)).clamp_min(0.0))

    def gradient(self, shape: torch.Size) -> Tensor:
        deltas = self.deltas.flatten(0, 1)
        return deltas.new_zeros(shape).index_add_(0, self.ids.flatten(), deltas)

    def sq_scale(self) -> Tensor:
        return self.deltas.square().sum()


Term = Rows | Outer | Lookup


def sq_norms_of_sum(terms: Sequence[Term]) -> Tensor:
    """``|sum of the terms|^2`` by example: those of a kind are one with more positions, two kinds have a cross term."""
    kinds = {type(term): [other for other in terms if type(other) is type(term)] for term in terms}
    joined = {
        kind: kind(*(torch.cat(parts, dim=-2) for parts in zip(*same, strict=True))) for kind, same in kinds.items()
    }
    total = torch.stack([term.sq_norms() for term in joined.values()]).sum(0)
    if len(joined) == 1:
        return total
    outer, lookup = joined[Outer], joined[Lookup]
    assert isinstance(outer, Outer)
    assert isinstance(lookup, Lookup)
    return (total + 2 * _cross(outer, lookup)).clamp_min(0.0)


def _cross(outer: Outer, lookup: Lookup) -> Tensor:
    """``sum_{s,t} (delta_s)_{id_t} (x_s . delta_t)`` by example: a tied head and its embedding."""
    deltas, inputs = outer.deltas[:, 0], outer.inputs[:, 0]
    picked = deltas.gather(2, lookup.ids.mT.expand(-1, deltas.shape[1], -1))
    return wide((picked * (inputs @ lookup.deltas.mT)).sum((1, 2)))


def gram_sq_norms(deltas: Tensor, inputs: Tensor) -> Tensor:
    """``sum_{t,u} (delta_t . delta_u)(x_t . x_u)`` by example, from ``(m, groups, positions, n)``."""
    return wide(((deltas @ deltas.mT) * (inputs @ inputs.mT)).sum((1, 2, 3)).clamp_min(0.0))


def direct_sq_norms(deltas: Tensor, inputs: Tensor) -> Tensor:
    """The same, as ``|sum_t delta_t x_t^T|^2``."""
    return wide(torch.linalg.vector_norm(deltas.mT @ inputs, dim=(1, 2, 3))).square()


def wide(values: Tensor) -> Tensor:
    """float64 where the device has it: the square of a float32 norm above 1e19 overflows."""
    return values.to(wide_dtype(values.device))
