"""What operators do to a batch: a rule says where the result carries it, or declines.

An operator mixes images where it reduces, joins or reorders along the batch's axis, gives the images constants of their own,
or has no rule. A rule also writes the arguments that are others for a batch of one: sizes, and squeezed axes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from graphopt.backends.lower.batch_axis import Axis, BatchAxis, Call, depends_on_batch
from graphopt.errors import Decline

aten = torch.ops.aten
_PLACES = "it joins tensors that do not carry the batch in one place"

Rule = Callable[[Call], Axis]


def _same(call: Call) -> Axis:
    return call.data()[1]


def _broadcast(
    call: Call, nodes: Sequence[fx.Node], rank: int, also: BatchAxis | None = None
) -> BatchAxis:
    """Tensors aligned at their last axes (and one of ``rank``, ``also``): the batch in one place, of size 1 in the others."""
    places = {
        (axis.index - len(call.sizes(node)), axis.rows)
        for node in nodes
        if (axis := call.axis(node)) is not None
    }
    if also is not None:
        places.add((also.index - rank, also.rows))
    if len(places) != 1:
        raise Decline(_PLACES)
    ((place, rows),) = places
    for node in nodes:
        sizes = call.sizes(node)
        if call.axis(node) is None and len(sizes) >= -place and sizes[place] != 1:
            raise Decline("it gives every image a constant of its own")
    return BatchAxis(rank + place, rows)


def _pointwise(call: Call) -> Axis:
    return _broadcast(call, call.tensors(), len(call.sizes()))


def _before_last(count: int) -> Rule:
    """The result depends on the last ``count`` axes of the data, which do not hold the batch."""

    def rule(call: Call) -> Axis:
        data, axis = call.data()
        if axis.index >= len(call.sizes(data)) - count:
            raise Decline("it computes along the batch")
        return axis

    return rule


def _layer(call: Call) -> Axis:
    """The batch is in front, and what is computed with the channels behind it is the same for every row."""
    _, axis = call.data()
    if axis.index != 0:
        raise Decline("it takes the batch for channels")
    return axis


def _convolution(call: Call) -> Axis:
    data, _ = call.data()
    if len(call.sizes(data)) != len(call.sizes(call.arguments["weight"])):
        raise Decline("it takes the batch for channels")
    return _layer(call)


def _batch_norm(call: Call) -> Axis:
    if call.arguments["training"]:
        raise Decline("it takes its mean over the batch")
    return _layer(call)


def _instance_norm(call: Call) -> Axis:
    if len(call.sizes()) < 3:
        raise Decline("it takes the batch for channels")
    return _layer(call)


def _layer_norm(call: Call) -> Axis:
    return _before_last(len(call.arguments["normalized_shape"]))(call)


def _pad(call: Call) -> Axis:
    widths = list(call.arguments.get("pad") or call.arguments["padding"])
    while widths and not any(depends_on_batch(w) or w for w in widths[-2:]):
        widths = widths[:-2]
    return _before_last(len(widths) // 2)(call)


def _axes(given: Any, rank: int) -> list[int]:
    axes = [given] if isinstance(given, int) else list(given or ())
    return [axis % rank for axis in axes]


def _along(call: Call) -> Axis:
    """A reduction or a scan along ``dim``."""
    data, axis = call.data()
    rank = len(call.sizes(data))
    along = _axes(call.arguments.get("dim"), rank)
    if not along or axis.index in along:
        raise Decline("it computes along the batch")
    if len(call.sizes()) == rank:
        return axis
    return BatchAxis(axis.index - sum(other < axis.index for other in along), axis.rows)


def _extremum(call: Call) -> Axis:
    return _pointwise(call) if "other" in call.arguments else _along(call)


def _joined(call: Call) -> Axis:
    """Concatenation: every part carries the batch in one place, not along it."""
    axes = {call.axis(node) for node in call.tensors()}
    axis = next(axis for axis in axes if axis is not None)
    if len(axes) != 1:
        raise Decline(_PLACES)
    if call.arguments["dim"] % len(call.sizes()) == axis.index:
        raise Decline("it joins along the batch")
    return axis


def _stacked(call: Call) -> Axis:
    axes = {call.axis(node) for node in call.tensors()}
    axis = next(axis for axis in axes if axis is not None)
    if len(axes) != 1:
        raise Decline(_PLACES)
    new = call.arguments["dim"] % len(call.sizes())
    return BatchAxis(axis.index + (new <= axis.index), axis.rows)


def _permuted(call: Call) -> Axis:
    data, axis = call.data()
    rank = len(call.sizes(data))
    order = list(range(rank))
    if "dims" in call.arguments:
        order = _axes(call.arguments["dims"], rank)
    elif rank > 1:
        one, other = (call.arguments.get(f"dim{i}", i) % rank for i in (0, 1))
        order[one], order[other] = order[other], order[one]
    return BatchAxis(order.index(axis.index), axis.rows)


def _taken(call: Call) -> Axis:
    """Parts of another axis (or, of a slice, all of the batch)."""
    data, axis = call.data()
    sizes = call.sizes(data)
    along = call.arguments["dim"] % len(sizes)
    if along == axis.index:
        a = call.arguments
        end = sys.maxsize if a.get("end", 0) is None else a.get("end", 0)
        whole = a.get("step") == 1 and not a.get("start") and isinstance(end, int)
        if not whole or end < sizes[along]:
            raise Decline("it takes some of the images")
        a["end"] = sys.maxsize
        return axis
    removed = len(call.sizes()) < len(sizes) and along < axis.index
    return BatchAxis(axis.index - removed, axis.rows)


def _reordered(call: Call) -> Axis:
    """Flips and rolls of other axes."""
    data, axis = call.data()
    along = _axes(call.arguments["dims"], len(call.sizes(data)))
    if not along or axis.index in along:
        raise Decline("it moves elements from image to image")
    return axis


def _indexed(call: Call) -> Axis:
    """``x[:, index]`` with one index, the same for every image."""
    _, axis = call.data()
    indices = list(call.arguments["indices"])
    places = [place for place, index in enumerate(indices) if index is not None]
    if len(places) != 1 or places[0] == axis.index:
        raise Decline("it takes some of the images")
    grown = len(call.sizes(indices[places[0]])) - 1
    return BatchAxis(axis.index + (grown if places[0] < axis.index else 0), axis.rows)


def _embedding(call: Call) -> Axis:
    table, indices = call.arguments["weight"], call.arguments["indices"]
    if call.axis(table) is not None:
        raise Decline("the weights of a layer depend on the images")
    return call.axis(indices)


def _reshaped(call: Call) -> Axis:
    """Row-major order is kept: the batch is the axis that as many elements stand before, if images are whole there."""
    data, axis = call.data()
    old, new = call.sizes(data), call.sizes()
    if math.prod(old) != math.prod(new):
        raise Decline("it reads the elements as others")
    before = math.prod(old[: axis.index])
    places = [
        place
        for place, size in enumerate(new)
        if math.prod(new[:place]) == before and size >= call.batch and size % call.batch == 0
    ]
    if not places:
        raise Decline("it folds the batch into other axes")
    result = BatchAxis(places[-1], new[places[-1]] // call.batch)
    for name, skipped in (("size", 0), ("shape", 0), ("sizes", call.arguments.get("dim", 0))):
        if name in call.arguments:
            _set_size(call, name, result, skipped % max(1, len(old)))
    return result


def _set_size(call: Call, name: str, axis: BatchAxis, skipped: int = 0) -> None:
    """Write a batch of one into a list of sizes whose first is that of axis ``skipped``."""
    sizes, place = list(call.arguments[name]), axis.index - skipped
    if 0 <= place < len(sizes) and isinstance(sizes[place], int) and sizes[place] != -1:
        sizes[place] = axis.rows
        call.arguments[name] = sizes


def _squeezed(call: Call) -> Axis:
    """Written as a squeeze of the axes that are of size 1 now: the batch may be 1 later."""
    data, _ = call.data()
    old = call.sizes(data)
    given = call.arguments.get("dim")
    along = range(len(old)) if given is None else _axes(given, len(old))
    call.arguments = {"self": data, "dim": [axis for axis in along if old[axis] == 1]}
    call.target = aten.squeeze.dims
    return _reshaped(call)


def _expanded(call: Call) -> Axis:
    """The batch stays as it is; a constant that is repeated for every image carries it."""
    data = call.tensors()[0]
    sizes, axis = call.sizes(), call.axis(data)
    if axis is not None:
        result = BatchAxis(axis.index + len(sizes) - len(call.sizes(data)), axis.rows)
    else:
        repeated = len(call.sizes(data)) < len(sizes) or call.sizes(data)[:1] == [1]
        if not repeated or not call.begins_with_batch():
            return None
        result = BatchAxis(0)
    _set_size(call, "size", result)
    return result


def _filled(call: Call) -> Axis:
    """A constant tensor of given sizes."""
    if not call.begins_with_batch():
        return None
    _set_size(call, "size", BatchAxis(0))
    return BatchAxis(0)


def _product(call: Call) -> Axis:
    """``a @ b``: the batch among the rows of a, the columns of b, or the leading axes of either."""
    names = ("self", "mat1", "mat2", "batch1", "batch2", "other")
    a, b = [call.arguments[name] for name in names if name in call.arguments][-2:]
    if min(len(call.sizes(node)) for node in (a, b)) < 2:
        raise Decline("it multiplies along the batch")
    ends = [
        None if (axis := call.axis(node)) is None else axis.index - len(call.sizes(node))
        for node in (a, b)
    ]
    rank = len(call.sizes())
    if ends[0] == -1 or ends[1] == -2:
        raise Decline("it sums over the batch")
    if (ends[0] == -2 and ends[1] is None) or (ends[1] == -1 and ends[0] is None):
        axis = call.axis(a) or call.axis(b)
        assert axis is not None
        place = -2 if ends[0] == -2 else -1
        result = BatchAxis(rank + place, axis.rows)
    elif -2 in ends or -1 in ends:
        raise Decline("it multiplies images by images")
    else:
        result = _broadcast(call, (a, b), rank)
    summands = [node for node in call.tensors() if node not in (a, b)]
    return _broadcast(call, summands, rank, result)


def _attention(call: Call) -> Axis:
    query = call.arguments["query"]
    axis = call.axis(query)
    if axis is None or axis.index >= len(call.sizes(query)) - 2:
        raise Decline("it attends to other images")
    return _broadcast(call, call.tensors(), len(call.sizes()))


def _rules() -> dict[str, Rule]:
    """Rules by operator name without its overload; ``graphopt::`` operators where a dot stands before the name."""
    groups: tuple[tuple[Rule, str], ...] = (
        (_pointwise, "masked_fill hardswish _prelu_kernel log_sigmoid floor_divide"),
        (_pointwise, ".quantize .dequantize .requantize .add fake_quantize_per_tensor_affine"),
        (_same, "contiguous clone alias detach dropout feature_dropout to _to_copy"),
        (_same, "zeros_like ones_like full_like lift_fresh_copy type_as"),
        (_convolution, "conv1d conv2d conv3d .conv2d .conv2d_dequantize"),
        (_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
        (_layer, "group_norm channel_shuffle prelu"),
        (_batch_norm, "batch_norm"),
        (_instance_norm, "instance_norm"),
        (_layer_norm, "layer_norm rms_norm"),
        (_before_last(1), "linear .linear .linear_dequantize"),
        (_before_last(1), "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d"),
        (_before_last(1), "upsample_linear1d upsample_nearest1d"),
        (_before_last(2), "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d"),
        (_before_last(2), "max_pool2d_with_indices upsample_nearest2d upsample_bilinear2d"),
        (_before_last(2), "upsample_bicubic2d tril triu"),
        (_before_last(2), ".max_pool2d .avg_pool2d .global_avg_pool .global_avg_pool_dequantize"),
        (_before_last(3), "max_pool3d avg_pool3d adaptive_avg_pool3d upsample_nearest3d"),
        (_before_last(3), "upsample_trilinear3d pixel_shuffle pixel_unshuffle"),
        (_pad, "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d"),
        (_along, "mean sum amax amin argmax argmin var std logsumexp softmax log_softmax cumsum"),
        (_along, "_softmax _log_softmax any all prod linalg_vector_norm topk sort glu"),
        (_extremum, "max min"),
        (_joined, "cat concat"),
        (_stacked, "stack"),
        (_permuted, "permute transpose t"),
        (_taken, "select slice split split_with_sizes chunk unbind narrow index_select"),
        (_reordered, "flip roll"),
        (_indexed, "index"),
        (_embedding, "embedding"),
        (_reshaped, "view _unsafe_view reshape flatten unflatten unsqueeze"),
        (_squeezed, "squeeze"),
        (_expanded, "expand"),
        (_filled, "full zeros ones new_full new_zeros new_ones"),
        (_product, "matmul bmm mm addmm baddbmm"),
        (_attention, "scaled_dot_product_attention"),
    )
    return {name: rule for rule, names in groups for name in names.split()}


RULES: Mapping[str, Rule] = MappingProxyType(_rules())
MADE = ("expand", "full", "zeros", "ones")  # constants that may be made for every image
SIZED = (
    *MADE,
    "view",
    "_unsafe_view",
    "reshape",
    "unflatten",
    "new_full",
    "new_zeros",
    "new_ones",
)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a call; pointwise operators need none of their own."""
    rule = RULES.get(name_of(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return rule


def name_of(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``, ``.conv2d`` for ``graphopt.conv2d.default``."""
    schema = getattr(node.target, "_schema", None)
    space, _, name = ("" if schema is None else schema.name).partition("::")
    return name if space == "aten" else f".{name}" if space == "graphopt" else ""
