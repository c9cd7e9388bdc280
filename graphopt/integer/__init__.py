"""The integer level: ``graphopt::`` custom ops on uint8/int8 tensors, whose PyTorch code is the definition.

Importing this package registers the ops.
"""

from __future__ import annotations

from graphopt.integer import ops
from graphopt.integer.arithmetic import FixedPointAdd, QParams

__all__ = ["FixedPointAdd", "QParams", "ops"]
