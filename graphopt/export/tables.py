"""The tables of ``model.c``: a line of C for a tensor, a call, an input."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.export.layout import Layout, Port
from graphopt.manifest import Dim, Kernel, Manifest

_DL_CODES = {"int": 0, "uint": 1, "float": 2, "bool": 6}  # of DLPack
_BASES = ("WEIGHTS", "ARENA")


def quoted(text: str) -> str:
    """A C string literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("?", "\\?")
    plain = "".join(each if " " <= each <= "~" else "_" for each in escaped)
    return f'"{plain}"'


def tables(layout: Layout, manifest: Manifest, name: str) -> str:
    """All of them."""
    calls = [*layout.calls, *layout.transforms]
    functions = sorted({call.function for call in calls})
    arguments = [number for call in calls for number in call.arguments]
    shapes = _Shapes()
    tensors = [
        f"    {{{_base(each.base)}, {each.offset}, {shapes.place(each.shape)}, {len(each.shape)}, {_dtype(each.dtype)}}},"
        for each in layout.tensors
    ]
    at_inputs = [i for i, each in enumerate(layout.tensors) if each.base >= len(_BASES)]
    starts = _starts([len(call.arguments) for call in calls])
    layers = _layers([call.function for call in layout.calls], manifest.kernels)
    rows = [
        f"    {{{name}_kernel_{call.function}, {start}, {len(call.arguments)}}},{_comment(layer)}"
        for call, start, layer in zip(layout.calls, starts, layers, strict=False)
    ]
    made = [
        f"    {{{name}_kernel_{call.function}, {start}, {len(call.arguments)}}},"
        for call, start in zip(layout.transforms, starts[len(rows) :], strict=True)
    ]
    _, largest = layout.batch
    sections = (
        _types(layout, len(arguments), len(rows), len(made), len(at_inputs)),
        "\n".join(f"extern HIDDEN kernel_function {name}_kernel_{each};" for each in functions),
        _array("int64_t", "SHAPES", _wrapped(shapes.sizes)),
        _array("tensor_row", "TENSORS", tensors),
        _array("uint32_t", "ARGUMENTS", _wrapped(arguments)),
        _array("call_row", "CALLS", rows),
        "/* Run once, by create: weights in the form that kernels take, from a smaller one in the file. */\n"
        + _array("call_row", "TRANSFORMS", made),
        _array("uint32_t", "INPUT_TENSORS", _wrapped(at_inputs)),
        _array("input_row", "INPUTS", [_input(port) for port in layout.inputs]),
        _array("output_row", "OUTPUTS", [f"    {{{p.tensor}, {p.size}}}," for p in layout.outputs]),
        _descriptions(name, "INPUT", layout.inputs, largest),
        _descriptions(name, "OUTPUT", layout.outputs, largest),
    )
    return "\n\n".join(sections)


class _Shapes:
    """Sizes behind each other, equal shapes once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    def place(self, shape: tuple[int, ...]) -> int:
        if shape not in self._places:
            self._places[shape] = len(self.sizes)
            self.sizes.extend(shape)
        return self._places[shape]


def _types(layout: Layout, arguments: int, calls: int, transforms: int, at_inputs: int) -> str:
    smallest, largest = layout.batch
    inputs = len(layout.inputs)
    return f"""\
enum {{ WEIGHTS, ARENA, FIRST_INPUT, BASE_COUNT = FIRST_INPUT + {inputs} }}; /* the memories that tensors lie in */
enum {{
    TENSOR_COUNT = {len(layout.tensors)},
    ARGUMENT_COUNT = {max(1, arguments)},
    CALL_COUNT = {calls},
    TRANSFORM_COUNT = {transforms},
    INPUT_TENSOR_COUNT = {at_inputs},
    INPUT_COUNT = {inputs},
    OUTPUT_COUNT = {len(layout.outputs)}
}};
#define WEIGHTS_SIZE ((size_t){len(layout.weights)}u)
#define WEIGHTS_CRC 0x{layout.checksum:08x}u
#define ARENA_SIZE ((size_t){layout.arena}u) /* tensors between kernels, which share it in turn */
#define WORKSPACE_SIZE ((size_t){layout.workspace}u) /* of one thread */
#define SMALLEST_BATCH ((size_t){smallest}u) /* kernels take one image, and run once for each */
#define LARGEST_BATCH ((size_t){largest}u)

typedef struct {{
    int base;
    uint64_t offset;
    uint32_t shape; /* its first size in SHAPES */
    int32_t rank;
    uint8_t type_code, type_bits; /* as DLPack counts */
}} tensor_row;

typedef struct {{
    kernel_function *kernel;
    uint32_t first; /* of its arguments */
    int32_t count;
}} call_row;

typedef struct {{
    size_t size, element, alignment;
    size_t copy; /* where it goes in the arena, if it is not so aligned */
    int64_t below;
}} input_row;

typedef struct {{
    uint32_t tensor;
    size_t size;
}} output_row;"""


def _array(kind: str, name: str, lines: Sequence[str]) -> str:
    """A constant array; C has none without elements, so that there is one of zeros for nothing."""
    body = "\n".join(lines) or ("    {0}," if kind.endswith("_row") else "    0,")
    return f"static const {kind} {name}[] = {{\n{body}\n}};"


def _wrapped(numbers: Sequence[int]) -> list[str]:
    return [
        "    " + " ".join(f"{number}," for number in numbers[first : first + 20])
        for first in range(0, len(numbers), 20)
    ]


def _starts(counts: Sequence[int]) -> list[int]:
    starts, end = [], 0
    for count in counts:
        starts.append(end)
        end += count
    return starts


def _base(base: int) -> str:
    return _BASES[base] if base < len(_BASES) else f"FIRST_INPUT + {base - len(_BASES)}"


def _dtype(dtype: str) -> str:
    kind = dtype.rstrip("0123456789")
    return f"{_DL_CODES[kind]}, {dtype[len(kind) :] or 8}"


def _layers(functions: Sequence[str], kernels: Sequence[Kernel]) -> list[str]:
    """The layer of the user's model that each call came from, where it is known."""
    waiting = list(kernels)
    layers = []
    for function in functions:
        known = bool(waiting) and waiting[0].name == function
        layers.append(waiting.pop(0).layer if known else "")
    return layers


def _comment(layer: str) -> str:
    safe = layer.replace("*/", "* /").replace("/*", "/ *")
    return f" /* {safe} */" if safe.isprintable() and safe else ""


def _input(port: Port) -> str:
    spec = port.spec
    return f"    {{{port.size}, {port.element}, {spec.alignment}, {port.copy}, {spec.below or 0}}},"


def largest_shape(port: Port) -> list[int]:
    """The sizes of an input or output, for the largest batch."""
    return [int(size.high or 0) if isinstance(size, Dim) else size for size in port.spec.shape]


def _descriptions(name: str, kind: str, ports: Sequence[Port], largest: int) -> str:
    lines, rows = [], []
    for number, port in enumerate(ports):
        sizes = ", ".join(map(str, largest_shape(port))) or "0"
        lines.append(f"static const int64_t {kind}_{number}_SHAPE[] = {{{sizes}}};")
        fields = (
            quoted(port.spec.name),
            quoted(port.spec.dtype),
            str(len(port.spec.shape)),
            f"{kind}_{number}_SHAPE",
            str(port.size * largest),
            str(port.spec.below or 0),
        )
        rows.append(f"    {{{', '.join(fields)}}},")
    return "\n".join([*lines, _array(f"{name}_tensor", f"{kind}_DESCRIPTIONS", rows)])
