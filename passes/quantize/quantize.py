"""The int8 recipe in one pass: fold batch norms, insert fake quantization, correct biases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from graphopt.contract import Contract, lossy
from graphopt.edit import Edit, sweep
from graphopt.errors import CalibrationError
from graphopt.passes.cleanup.remove_identities import RemoveIdentities
from graphopt.passes.fuse.fold_batch_norm import FoldBatchNorm
from graphopt.passes.quantize.correct_bias import CorrectBias
from graphopt.passes.quantize.insert_fake_quant import InsertFakeQuant
from graphopt.passes.quantize.spec import QuantizationSpec, WeightSpec
from graphopt.passing import Pass
from graphopt.registry import register


@register
@dataclass(frozen=True)
class Quantize(Pass):
    """``program -> correct_bias(insert_fake_quant(fold_batch_norm(program)))``: uint8 activations, int8 weights.

    ``calibration`` is an iterable of input batches (32 to 128 images do); ``observer`` as in ``InsertFakeQuant``,
    ``weight_observer`` "minmax" or "mse"; ``exclude`` keeps layers in float (node names, module paths, globs,
    operators). ``bias_correction`` reads the data a second time. One record in the history counts all rewrites.

    Agreement with float on 94 photos, 32 others to calibrate (EfficientNet-Lite0 / MobileNetV2; one photo is 1.1 %):
    minmax 97.9 / 78.7 %, percentile 96.8 / 87.2 %, mse 96.8 / 84.0 %. The relative error of the logits tells them apart
    better: 0.071 / 0.220, 0.077 / 0.157, 0.069 / 0.180. Without bias correction minmax has 94.7 % and 0.116 on Lite0.

    Raises CalibrationError without calibration data, for data that can be read only once, and for NaN or infinity in
    data, and QuantizeError for them in weights.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = lossy
    runs_after: ClassVar[tuple[str, ...]] = ("fold-batch-norm",)

    calibration: Iterable[Any] | None = field(default=None, repr=False)
    observer: str = "mse"
    percentile: float = 99.99
    per_channel: bool = True
    weight_observer: str = "minmax"
    exclude: tuple[str, ...] = ()
    bias_correction: bool = True

    def __post_init__(self) -> None:
        self.insert_fake_quant()

    def insert_fake_quant(self) -> InsertFakeQuant:
        """The pass that this one's options describe."""
        weights = WeightSpec(per_channel=self.per_channel, observer=self.weight_observer)
        return InsertFakeQuant(
            spec=QuantizationSpec(weights=weights, exclude=self.exclude),
            calibration=self.calibration,
            observer=self.observer,
            percentile=self.percentile,
        )

    def apply(self, edit: Edit) -> None:
        if self.bias_correction and isinstance(self.calibration, Iterator):
            raise CalibrationError(
                f"{self.name} reads the calibration data twice: pass a list or another iterable that can be "
                "read again, or bias_correction=False"
            )
        for pass_ in (RemoveIdentities(), FoldBatchNorm()):
            pass_.apply(edit)
            sweep(edit.program)
        before = edit.rewrites
        self.insert_fake_quant().apply(edit)
        if self.bias_correction and edit.rewrites > before:
            CorrectBias(calibration=self.calibration).apply(edit)
