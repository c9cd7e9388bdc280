"""A network of int8 activations, which no pass makes: quantized by hand, every integer operator once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import graphopt.integer  # noqa: F401 - defines torch.ops.graphopt

INTEGER: Any = torch.ops.graphopt


class Signed(nn.Module):
    """Takes float32 [N, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (
            ("dense", (12, 3, 3, 3)),
            ("depthwise", (12, 1, 3, 3)),
            ("grouped", (9, 4, 1, 1)),
            ("linear", (10, 21)),
        ):
            weight = torch.randint(-127, 128, shape, dtype=torch.int8)
            self.register_buffer(f"{name}_w", weight)
            self.register_buffer(f"{name}_b", torch.randint(-500, 500, shape[:1]).int())
            scale = 0.012 / weight[0].numel() ** 0.5
            self.register_buffer(f"{name}_m", scale * (1 + torch.rand(shape[0])))

    def _conv(self, name: str, x: torch.Tensor, padding: int, groups: int, zero_points: Any) -> Any:
        parameters = [self.get_buffer(f"{name}_{kind}") for kind in "wbm"]
        geometry = ([1, 1], [padding] * 4, [1, 1], groups, zero_points[0])
        return INTEGER.conv2d(x, *parameters, *geometry, zero_points[1], -128, 127)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self._conv("dense", INTEGER.quantize(x, 0.02, -3, -128, 127), 1, 1, (-3, 5))
        d = self._conv("depthwise", q, 1, 12, (5, -20))
        q = INTEGER.add(q, d, 100, 120, 8, 5, -20, 3, -128, 127)
        q = INTEGER.max_pool2d(q, [2, 2], [2, 2], [0, 0], [1, 1], False)
        g = self._conv("grouped", q, 0, 3, (3, -7))
        q = torch.cat([INTEGER.requantize(q, 0.9, 3, -7, -128, 127), g], 1)
        q = INTEGER.avg_pool2d(q, [3, 3], [1, 1], [1, 1], False, True, 0, 0.8, -7, 2, -128, 127)
        pooled = INTEGER.global_avg_pool(q, 3.0 / 16, 2, -4, -128, 127, False)
        parameters = [self.get_buffer(f"linear_{kind}") for kind in "wbm"]
        return INTEGER.linear_dequantize(pooled, *parameters, -4)  # type: ignore[no-any-return]
