"""A batch norm that no layer can absorb becomes two element-wise operators, or one depthwise convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from graphopt.contract import Contract, within
from graphopt.edit import Build
from graphopt.errors import PassError
from graphopt.passes.fuse.affine import HALF, batch_norm, check_affine, scale_and_shift
from graphopt.passing import RewritePass
from graphopt.pattern import Call, Match, Operators, var
from graphopt.registry import register
from graphopt.rule import RewriteRule

_FORMS = ("affine", "depthwise")


@dataclass(frozen=True)
class Affine(RewriteRule):
    """``bn(x) -> x * s + t``, or a 1 x 1 convolution of one channel a group with weight s and bias t."""

    depthwise: bool = False
    half: bool = False

    def pattern(self, op: Operators) -> Call:
        return batch_norm(op, var("x"))

    def check(self, match: Match) -> None:
        check_affine(match)
        if match["bn"].meta["val"].dtype in HALF and not self.half:
            match.decline("half-precision scales round by more than 1e-4; half=True lowers them")
        if self.depthwise and len(match.shape("bn")) != 4:
            match.decline("a depthwise convolution needs an input of 4 dimensions")

    def rewrite(self, build: Build, match: Match) -> fx.Node:
        scale, shift = (v.to(match["bn"].meta["val"].dtype) for v in scale_and_shift(match))
        owner = str(match["mean"].target).rpartition(".")[0] or match["bn"].name
        if self.depthwise:
            weight = build.parameter(f"{owner}.weight", scale.reshape(-1, 1, 1, 1))
            bias = build.parameter(f"{owner}.bias", shift)
            ones, zeros = [1, 1], [0, 0]
            return build.conv2d(match["x"], weight, bias, ones, zeros, ones, scale.numel())
        shape = [-1, *[1] * (len(match.shape("bn")) - 2)]
        scaled = build.mul(match["x"], build.parameter(f"{owner}.scale", scale.reshape(shape)))
        return build.add(scaled, build.parameter(f"{owner}.shift", shift.reshape(shape)))


@register
@dataclass(frozen=True)
class LowerBatchNorm(RewritePass):
    """``batch_norm(x) -> x * s + t``, ``s = gamma / sqrt(variance + eps)``, ``t = beta - mean * s``, a value a channel.

    For what ``fold-batch-norm`` has to leave: a batch norm before a ReLU, or after a concatenation. ``form="depthwise"``
    makes it a depthwise 1 x 1 convolution instead, which has an integer kernel. Declines batch norm in training mode
    or without running statistics. Half precision rounds the scale: within(1e-2) with ``half=True``, else declined.
    """

    name = "lower-batch-norm"
    contract = within(1e-4)
    runs_after = ("fold-batch-norm",)

    form: Literal["affine", "depthwise"] = "affine"
    half: bool = False

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise PassError(
                f"lower-batch-norm: form must be one of {', '.join(_FORMS)}, not {self.form!r}"
            )

    def promised(self) -> Contract:
        return within(1e-2) if self.half else within(1e-4)

    def active_rules(self) -> tuple[RewriteRule, ...]:
        return (Affine(self.form == "depthwise", self.half),)
