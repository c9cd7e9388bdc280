"""Independent definitions to test against: ONNX Runtime's own kernels, one operator at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import numpy.typing
import onnx
import onnxruntime
from onnx import helper

Array = numpy.typing.NDArray[Any]


def onnx_model(op: str, inputs: Sequence[Any], dtype: str, **attributes: Any) -> onnx.ModelProto:
    """A model of one operator; every input is a graph input."""
    arrays = [numpy.asarray(value) for value in inputs]
    values = [
        helper.make_tensor_value_info(
            f"x{i}", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for i, array in enumerate(arrays)
    ]
    kind = helper.np_dtype_to_tensor_dtype(numpy.dtype(dtype))
    node = helper.make_node(op, [value.name for value in values], ["y"], **attributes)
    output = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([node], op, values, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def onnx_runtime(op: str, inputs: Sequence[Any], dtype: str, **attributes: Any) -> Array:
    """The result of ONNX Runtime's CPU kernel for ``op``."""
    model = onnx_model(op, inputs, dtype, **attributes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {f"x{i}": numpy.asarray(value) for i, value in enumerate(inputs)}
    result: Array = session.run(None, feeds)[0]
    return result
