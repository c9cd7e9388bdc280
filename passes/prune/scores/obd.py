"""OBD: the second-order change of the loss when a weight becomes zero, ``h_kk * w_k**2 / 2`` (LeCun et al. 1990).

``h_kk = d2L / dw_k2``, without the other entries of the Hessian. Two estimators of the diagonal, both unbiased:

Gauss-Newton. With ``H = S S^T`` the Hessian of the loss in the network's outputs f, and signs e of +1 and -1 drawn for
every output, ``E[(d(e^T S^T f) / dw)**2] = diag(J^T H J)``: one backward pass gives one sample, never negative. In a network
of ReLU, max pooling and the like, f is linear in each weight alone, and so this is the diagonal of the whole Hessian.

Hessian. ``E[v * (Hess v)] = diag(Hess)`` with signs v (Hutchinson; Bekas et al. 2007), by differentiating twice: for any
loss, noisier. Where it comes out negative it counts as 0: a minimum has no such direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import PassError
from graphopt.passes.prune.evidence import Evidence, first_output
from graphopt.passes.prune.granules import Granules
from graphopt.passes.prune.scores.score import (
    Score,
    Values,
    at_nodes,
    distinct,
    gradients,
    leaves_of,
)
from graphopt.passes.prune.weights import Weight

_IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Obd(Score):
    """``mean_i max(h_ii, 0) * w_i**2 / 2`` on ``data``, ``probes`` samples of the signs a batch, from ``seed``."""

    name: ClassVar[str] = "obd"
    across_layers: ClassVar[Literal["loss", "relative", "as-is"]] = "loss"

    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.curvature not in ("gauss-newton", "hessian"):
            raise PassError(
                f"score obd: curvature must be gauss-newton or hessian, not {self.curvature!r}"
            )
        if self.probes < 1:
            raise PassError(f"score obd: probes must be at least 1, not {self.probes}")

    def measure(
        self, granules: Sequence[Granules], values: Values, evidence: Evidence
    ) -> list[Tensor]:
        diagonal = self.diagonal(distinct(granules), evidence)
        saliency = {w: h.clamp(min=0) * values[w].square() / 2 for w, h in diagonal.items()}
        return [one.mean(saliency) for one in granules]

    def diagonal(self, weights: Sequence[Weight], evidence: Evidence) -> dict[Weight, Tensor]:
        """The estimate of ``h_kk`` for every element of the weights."""
        generator = torch.Generator().manual_seed(self.seed)

        def signs(like: Tensor) -> Tensor:
            drawn = torch.randint(0, 2, like.shape, generator=generator)
            return (2 * drawn - 1).to(like)

        sample = _gauss_newton if self.curvature == "gauss-newton" else _hessian
        totals = {w: torch.zeros(w.layout.shape) for w in weights}
        count = 0.0
        for inputs, labels in evidence.labelled():
            for _ in range(self.probes):
                found, terms = sample(evidence, weights, inputs, labels, signs)
                count += terms
                for weight, values in found.items():
                    totals[weight] += values
        return {w: total / count for w, total in totals.items()}


Signs = Callable[[Tensor], Tensor]


def _gauss_newton(
    evidence: Evidence, weights: Sequence[Weight], inputs: Any, labels: Tensor, signs: Signs
) -> tuple[dict[Weight, Tensor], float]:
    """One sample for the *summed* loss of the batch, and how many terms that sum has."""
    terms = 0.0

    def projected(output: Any) -> Tensor:
        nonlocal terms
        outputs = first_output(output)
        factor, terms = _root(evidence, outputs.detach(), labels, signs(outputs))
        return (outputs * factor).sum()

    slopes = gradients(evidence, weights, projected, inputs)
    return {w: slope.float().square() for w, slope in slopes.items()}, terms


def _root(
    evidence: Evidence, outputs: Tensor, labels: Tensor, signs: Tensor
) -> tuple[Tensor, float]:
    """``S e`` for the Hessian ``S S^T`` of the summed loss in the outputs, and the number of its terms.

    Cross entropy: ``S = diag(sqrt(p)) - p sqrt(p)^T``, ``S S^T = diag(p) - p p^T``. Squares: ``S = sqrt(2)``.
    """
    if evidence.loss == "mse":
        return signs * 2**0.5, float(outputs.numel())
    if evidence.loss != "cross-entropy":
        raise PassError(
            f"{evidence.name}: score obd knows the curvature of the losses cross-entropy and mse; "
            "with a loss of your own set curvature: hessian"
        )
    axis = 1 if outputs.dim() > 1 else 0
    p = F.softmax(outputs, dim=axis)
    root = p.sqrt()
    factor = root * signs - p * (root * signs).sum(dim=axis, keepdim=True)
    terms = outputs.numel() / outputs.shape[axis]
    if not labels.is_floating_point():
        counted = (labels != _IGNORED).unsqueeze(axis)
        return factor * counted, float(counted.sum())
    return factor, terms


def _hessian(
    evidence: Evidence, weights: Sequence[Weight], inputs: Any, labels: Tensor, signs: Signs
) -> tuple[dict[Weight, Tensor], float]:
    """One sample ``v * (Hess v)`` for the mean loss of the batch."""
    leaves = leaves_of(evidence, weights)
    directions = [signs(leaf) for leaf in leaves.values()]
    with torch.enable_grad():
        loss = evidence.loss_of(evidence.run(inputs, at_nodes(leaves)), labels)
        slopes = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=True, materialize_grads=True
        )
        along = torch.stack([(s * v).sum() for s, v in zip(slopes, directions, strict=True)]).sum()
        try:
            products = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
        except RuntimeError as error:
            raise PassError(
                f"{evidence.name}: score obd cannot differentiate this network twice ({error}); "
                "set curvature: gauss-newton"
            ) from error
    rows = zip(leaves, directions, products, strict=True)
    return {w: (v * product).float().cpu() for w, v, product in rows}, 1.0
