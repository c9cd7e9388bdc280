"""What the kernels of transformers are asked to compute: products of activations, attention, softmax, layer norm."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.backends.cpu.workload import Layout


@dataclass(frozen=True)
class Strided:
    """A view of a dense tensor: ``view[i] = storage.flat[offset + sum_d i[d] * strides[d]]``.

    ``storage`` is that tensor as rows; a stride of 0 repeats. Heads split off a linear layer's output are read in place.
    """

    storage: Layout
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Matmul:
    """``y[l, i, j] = scale * sum_k a[l, i, k] * b[l, k, j]`` in float32. Arguments: ``a, b, y``.

    ``lead`` are the sizes of the leading axes l; the first may be None (dynamic). y's columns lie side by side.
    """

    a: Strided
    b: Strided
    y: Strided
    lead: tuple[int | None, ...]
    rows: int
    depth: int
    columns: int
    scale: float = 1.0

    @property
    def macs(self) -> int:
        """Multiply-accumulates; of one sample where the batch is dynamic."""
        return _size(self.lead) * self.rows * self.depth * self.columns


@dataclass(frozen=True)
class Attention:
    """``y[l, i] = sum_j p[l, i, j] * value[l, j]`` with ``p[l, i] = softmax_j(scale * query[l, i] . key[l, j] + mask)``.

    ``query`` is rows x depth, ``key`` keys x depth, ``value`` keys x columns, ``mask`` rows x keys; ``causal`` leaves
    j <= i. A row that is masked everywhere is 0, as in PyTorch. Arguments: ``query, key, value, [mask], y``.
    """

    query: Strided
    key: Strided
    value: Strided
    y: Strided
    lead: tuple[int | None, ...]
    rows: int
    depth: int
    keys: int
    columns: int
    scale: float
    mask: Strided | None = None
    causal: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates; of one sample where the batch is dynamic."""
        return _size(self.lead) * self.rows * self.keys * (self.depth + self.columns)


@dataclass(frozen=True)
class Softmax:
    """``y = exp(x - max(x)) / sum(exp(x - max(x)))`` over the channels of dense rows. Arguments: ``x, y``.

    A row of -inf is NaN, and so is one that holds NaN or inf, as in PyTorch.
    """

    x: Layout
    y: Layout


@dataclass(frozen=True)
class LayerNorm:
    """``y = (x - mean) / sqrt(variance + epsilon) * weight + bias`` over the channels of dense rows.

    Arguments: ``x, weight, bias, y``. The variance is that of the differences from the mean (two passes).
    """

    x: Layout
    y: Layout
    epsilon: float


def _size(lead: tuple[int | None, ...]) -> int:
    size = 1
    for extent in lead:
        size *= extent or 1
    return size
