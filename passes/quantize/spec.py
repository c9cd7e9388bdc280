"""What is quantized and how: a declaration that ``InsertFakeQuant`` follows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphopt import ops
from graphopt.errors import QuantizeError
from graphopt.passes.layer import names

SEEDS = ("conv1d", "conv1d_same", "conv2d", "conv2d_same", "linear")
AVERAGES = ("avg_pool2d", "adaptive_avg_pool2d", "mean")
CLAMPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min")
QUANTIZABLE = tuple(
    op.name for op in ops.TABLE if op.quantizable or op.name == "pad" or op.name in SEEDS
)
SAME_QPARAMS = (*(op.name for op in ops.TABLE if op.quantizable and op.same_qparams), "pad")
WEIGHT_OBSERVERS = ("minmax", "mse")


def _check_bits(what: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise QuantizeError(f"{what} can be quantized to 2 to 8 bits, not {bits}")


@dataclass(frozen=True)
class ActivationSpec:
    """Activations: unsigned, per tensor, ``qmin = 0`` and ``qmax = 2**bits - 1``.

    ``symmetric`` fixes the zero point at ``2**(bits - 1)``.
    """

    bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        _check_bits("activations", self.bits)

    @property
    def qmin(self) -> int:
        return 0

    @property
    def qmax(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class WeightSpec:
    """Weights: signed and symmetric, ``zero_point = 0`` and ``|q| <= 2**(bits - 1) - 1``, per output channel or per tensor.

    ``observer`` chooses the clipping range: "minmax" (the largest magnitude) or "mse" (the least squared error).
    """

    bits: int = 8
    per_channel: bool = True
    observer: str = "minmax"

    def __post_init__(self) -> None:
        _check_bits("weights", self.bits)
        if self.observer not in WEIGHT_OBSERVERS:
            raise QuantizeError(
                f"weight observer {self.observer!r} is none of {', '.join(WEIGHT_OBSERVERS)}"
            )

    @property
    def qmin(self) -> int:
        return -self.qmax

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Override:
    """Other precision for the layers that ``layers`` names: a glob of node names or module paths, or an operator.

    ``weights`` is the layer's weight, ``activations`` its output; None keeps the common setting.
    """

    layers: str
    weights: WeightSpec | None = None
    activations: ActivationSpec | None = None


@dataclass(frozen=True)
class QuantizationSpec:
    """Which operators are quantized, at which precision, and which edges share parameters.

    ``ops`` are names of the op table. Operators that only select or move elements (max pooling, concat, reshape ...)
    share the scale of their input; ``shared`` adds average pooling to them, which has its own otherwise. ``exclude``
    keeps layers in float, named as in ``Override``.
    """

    activations: ActivationSpec = ActivationSpec()
    weights: WeightSpec = WeightSpec()
    ops: tuple[str, ...] = QUANTIZABLE
    shared: tuple[str, ...] = SAME_QPARAMS
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        for name in self.ops:
            if name not in QUANTIZABLE:
                raise QuantizeError(
                    f"operator {name!r} has no integer form; choose from {', '.join(QUANTIZABLE)}"
                )
        for name in self.shared:
            if name not in SAME_QPARAMS and name not in AVERAGES:
                raise QuantizeError(
                    f"operator {name!r} cannot share its input's parameters; only "
                    f"{', '.join(AVERAGES)} may be added to those that only move elements"
                )
        missing = [name for name in SAME_QPARAMS if name not in self.shared and name in self.ops]
        if missing:
            raise QuantizeError(
                f"operator {missing[0]!r} only moves elements and must stay in `shared`; "
                "take it out of `ops` to keep it in float"
            )

    def excludes(self, node: fx.Node) -> bool:
        return any(names(pattern, node) for pattern in self.exclude)

    def weights_of(self, node: fx.Node) -> WeightSpec:
        """The last override that names the layer and sets its weights, or the common setting."""
        found = [o.weights for o in self.overrides if o.weights and names(o.layers, node)]
        return found[-1] if found else self.weights

    def activations_of(self, node: fx.Node) -> ActivationSpec:
        """The last override that names the layer and sets its output, or the common setting."""
        found = [o.activations for o in self.overrides if o.activations and names(o.layers, node)]
        return found[-1] if found else self.activations
