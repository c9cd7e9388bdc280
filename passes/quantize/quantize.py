"""The int8 recipe in one pass: fold batch norms, then insert fake quantization where it belongs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from graphopt.contract import Contract, lossy
from graphopt.edit import Edit, sweep
from graphopt.passes.cleanup.remove_identities import RemoveIdentities
from graphopt.passes.fuse.fold_batch_norm import FoldBatchNorm
from graphopt.passes.quantize.insert_fake_quant import InsertFakeQuant
from graphopt.passes.quantize.spec import QuantizationSpec, WeightSpec
from graphopt.passing import Pass
from graphopt.registry import register


@register
@dataclass(frozen=True)
class Quantize(Pass):
    """``program -> insert_fake_quant(fold_batch_norm(remove_identities(program)))``: uint8 activations, int8 weights.

    ``calibration`` is an iterable of input batches (32 to 128 images do); ``observer`` as in ``InsertFakeQuant``,
    ``weight_observer`` "minmax" or "mse"; ``exclude`` keeps layers in float (node names, module paths, globs,
    operators). One record in the history counts the rewrites of all three.

    Raises QuantizeError without calibration data and for NaN or infinity in data or weights.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = lossy
    runs_after: ClassVar[tuple[str, ...]] = ("fold-batch-norm",)

    calibration: Iterable[Any] | None = field(default=None, repr=False)
    observer: str = "minmax"
    percentile: float = 99.99
    per_channel: bool = True
    weight_observer: str = "minmax"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.passes()

    def passes(self) -> tuple[Pass, ...]:
        """The passes that this one runs."""
        weights = WeightSpec(per_channel=self.per_channel, observer=self.weight_observer)
        insert = InsertFakeQuant(
            spec=QuantizationSpec(weights=weights, exclude=self.exclude),
            calibration=self.calibration,
            observer=self.observer,
            percentile=self.percentile,
        )
        return (RemoveIdentities(), FoldBatchNorm(), insert)

    def apply(self, edit: Edit) -> None:
        for pass_ in self.passes():
            pass_.apply(edit)
            sweep(edit.program)
