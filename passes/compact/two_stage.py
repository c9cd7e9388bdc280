"""``y = E relu(S x + b) + c`` in place of ``y = W x``: two smaller convolutions, fitted to what one computes.

S slides over the window that W reads and E reads what it makes there. S is the best projection of the weights under the
inputs' covariance, shifted until its ReLU cuts off what it should; E and c are the least squares solution given S.
(200 steps of gradient descent on all four took 0.01 to 0.03 off errors of 0.5 and five times as long; training follows.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# Of a feature's mean square. Few rows need more of it; the rows held out say how much.
_RIDGES = (1e-3, 1e-2, 1e-1)
_SHIFTS = (0.0, 1.0, 2.0)  # standard deviations by which hidden values are lifted: the best is kept
_SCALED_BY = 1024  # rows


@dataclass(frozen=True)
class Head:
    """A second convolution: ``outputs`` of y from every hidden position of the window, or from the ``centre`` only."""

    outputs: slice
    centre: bool = False

    def read(self, hidden: Tensor) -> Tensor:
        """The hidden values [rows, m, k, l] that it multiplies, [rows, features]."""
        if self.centre:
            return hidden[:, :, hidden.shape[2] // 2, hidden.shape[3] // 2]
        return hidden.flatten(1)


@dataclass
class Solution:
    """The tensors: ``first`` [m, in, a, b] and its bias, and a weight [outputs, features] and bias for each head."""

    first: Tensor
    shift: Tensor
    seconds: list[Tensor]
    biases: list[Tensor]

    def predict(self, windows: Tensor, heads: Sequence[Head], relu: bool) -> Tensor:
        """y [rows, outputs]."""
        hidden = _hidden(windows, self.first, self.shift, relu)
        made = [
            head.read(hidden) @ weight.T + bias
            for head, weight, bias in zip(heads, self.seconds, self.biases, strict=True)
        ]
        return torch.cat(made, 1)


def covariance_root(windows: Tensor) -> Tensor:
    """L with ``L L^T`` the second moments of the channels [in, in] over rows and taps, and a ridge."""
    flat = windows.transpose(0, 1).flatten(1)
    moments = (flat @ flat.T / flat.shape[1]).double()
    ridge = 1e-3 * float(moments.diagonal().mean()) + 1e-12
    moments.diagonal().add_(ridge)
    root: Tensor = torch.linalg.cholesky(moments)
    return root


def fit(
    windows: Tensor,
    outputs: Tensor,
    start: Solution,
    heads: Sequence[Head],
    relu: bool,
    fixed: Tensor | None = None,
) -> tuple[Solution, float]:
    """The solution of the best shift, and its error ``||y - y'|| / ||y - mean(y)||`` on the quarter of the rows held out.

    ``fixed`` is c where the size of the inputs is not known (noise): b is then 0, so that the solution is as good for
    inputs of any size, and the error is relative to ``y - c``.
    """
    held = max(1, len(windows) // 4)
    scale = float(windows.square().mean().sqrt().clamp(min=1e-20))
    windows = windows / scale
    task = _Task(windows[held:], outputs[held:], windows[:held], outputs[:held], heads, relu, fixed)
    start = task.normalized(replace(start, first=start.first * scale))
    lifts = _SHIFTS if relu and fixed is None else (0.0,)
    starts = [task.lifted(start, lift) for lift in lifts] if relu else [start]
    best, least = min((task.solved(begun) for begun in starts), key=lambda pair: pair[1])
    return replace(best, first=best.first / scale), least


def least_squares(
    features: Tensor, goal: Tensor, begun: Tensor, fixed: Tensor | None, ridges: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """``weight, bias`` that minimise ``||features @ weight.T + bias - goal||^2 + ridge * ||weight - begun||^2``, a pair a ridge.

    With ``fixed`` the bias is that. A ridge is a share of the features' mean square.
    """
    mean = features.mean(0) if fixed is None else torch.zeros(features.shape[1])
    middle = goal.mean(0) if fixed is None else fixed
    centred = features - mean
    gram = (centred.T @ centred).double()
    right = (centred.T @ (goal - middle - centred @ begun.T)).double()
    square = float(gram.diagonal().mean())
    solved, last = [], 0.0
    for ridge in ridges:
        gram.diagonal().add_((ridge - last) * square + 1e-12)
        last = ridge
        moved = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
        weight = begun + moved.T.to(begun.dtype)
        solved.append((weight, middle - weight @ mean))
    return solved


def relative_error(expected: Tensor, made: Tensor, fixed: Tensor | None) -> float:
    """``||y - y'|| / ||y - mean(y)||``, or to ``||y - c||``."""
    middle = expected.mean(0) if fixed is None else fixed
    energy = float((expected - middle).square().sum()) or 1.0
    return math.sqrt(float((expected - made).square().sum()) / energy)


def _hidden(windows: Tensor, first: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """Values at every place of the window; 0 where the place lies in the padding, which the second convolution adds."""
    values = F.conv2d(windows, first, shift)
    if relu:
        values = values.relu()
    rows, columns = first.shape[2] // 2, first.shape[3] // 2
    # a pixel that is 0 in every channel is padding: none of the image is, or hardly one
    inside = (windows != 0).any(1, keepdim=True)
    inside = inside[:, :, rows : rows + values.shape[2], columns : columns + values.shape[3]]
    return values * inside


def _scaled(second: Tensor, factor: Tensor) -> Tensor:
    """Second weights [outputs, m * places] for hidden values divided by ``factor`` [m]."""
    return (second.reshape(len(second), len(factor), -1) * factor[:, None]).flatten(1)


@dataclass(frozen=True)
class _Task:
    """Rows to fit and rows to judge by, and what is fitted."""

    windows: Tensor
    outputs: Tensor
    judged: Tensor
    expected: Tensor
    heads: Sequence[Head]
    relu: bool
    fixed: Tensor | None

    def normalized(self, solution: Solution) -> Solution:
        """Hidden values of unit size, which a ReLU does not mind."""
        values = F.conv2d(self.windows[:_SCALED_BY], solution.first)
        size = values.square().mean((0, 2, 3)).sqrt().clamp(min=1e-12)
        return self._divided(solution, size)

    def lifted(self, solution: Solution, lift: float) -> Solution:
        """Hidden values turned to the side that they are on, with a mean of at least ``lift`` deviations above 0."""
        values = F.conv2d(self.windows[:_SCALED_BY], solution.first)
        mean, deviation = values.mean((0, 2, 3)), values.std((0, 2, 3))
        turned = self._divided(solution, torch.where(mean < 0, -1.0, 1.0))
        return replace(turned, shift=(lift * deviation - mean.abs()).clamp(min=0))

    def _divided(self, solution: Solution, factor: Tensor) -> Solution:
        first = solution.first / factor[:, None, None, None]
        seconds = [_scaled(second, factor) for second in solution.seconds]
        return Solution(first, solution.shift / factor, seconds, solution.biases)

    def solved(self, solution: Solution) -> tuple[Solution, float]:
        """Second weights and biases by least squares, and the error on the judged rows."""
        hidden = _hidden(self.windows, solution.first, solution.shift, self.relu)
        solved = []
        for head, begun in zip(self.heads, solution.seconds, strict=True):
            fixed = None if self.fixed is None else self.fixed[head.outputs]
            goal = self.outputs[:, head.outputs]
            solved.append(least_squares(head.read(hidden), goal, begun, fixed, _RIDGES))
        return min(
            (self._judged(solution, pairs) for pairs in zip(*solved, strict=True)),
            key=lambda pair: pair[1],
        )

    def _judged(
        self, solution: Solution, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Solution, float]:
        seconds, biases = ([pair[i] for pair in pairs] for i in (0, 1))
        found = replace(solution, seconds=seconds, biases=biases)
        made = found.predict(self.judged, self.heads, self.relu)
        return found, relative_error(self.expected, made, self.fixed)
