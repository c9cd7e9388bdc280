"""Every failure a user can cause, one class each; all derive from ``GraphoptError``.

A message is one sentence that names the pass, node, file or option at fault and says what to do.
Longer context (a graph excerpt, a traceback of the user's model) is attached with ``add_note``.
"""

from __future__ import annotations


class GraphoptError(Exception):
    """Base of every error that graphopt raises on purpose."""


class CaptureError(GraphoptError):
    """The model could not be captured by ``torch.export``."""


class VerifyError(GraphoptError):
    """A program is not well formed: lint, shapes, parameters or metadata."""


class PassError(GraphoptError):
    """A pass failed or was given options that do not hold."""


class ContractError(PassError):
    """A pass changed the output by more than its declared contract allows."""


class RegistryError(GraphoptError):
    """No pass has this name, a name is taken twice, or a plugin cannot be loaded."""


class RecipeError(GraphoptError):
    """A YAML recipe is malformed; the message names file, line and option."""


class CalibrationError(GraphoptError):
    """Calibration data is missing, does not fit the program's inputs, or makes NaN or infinity."""


class QuantizeError(GraphoptError):
    """Weights cannot be quantized (NaN, infinity), or a quantization spec does not hold."""


class IntegerizeError(GraphoptError):
    """A fake-quantized program has no exact integer form (an accumulator could overflow, say)."""


class CompileError(GraphoptError):
    """A program cannot be lowered to the target; the message names the operator."""


class TargetError(GraphoptError):
    """An unknown target, or one whose instructions this CPU lacks."""


class ArtifactError(GraphoptError):
    """A ``.gopt`` file is damaged, unsafe, or of another format version."""


class ExportError(GraphoptError):
    """A compiled model cannot be written as C; the message names the operator, or the folder."""


class InputError(GraphoptError, ValueError):
    """A call's argument has the wrong arity, rank, shape or dtype."""


class TrainError(GraphoptError):
    """Training cannot go on: data, labels, a loss that is no number, a checkpoint; the message names batch and step."""


class BenchmarkError(GraphoptError):
    """A measurement cannot be made (a peer is not installed, no input was given)."""


class TuneError(GraphoptError):
    """Tuning cannot measure or keep results (a budget, a store's file, a device that does not answer)."""


class Decline(Exception):
    """Raised by a rule's ``check`` where the rule does not apply; caught by the driver, never an error."""
