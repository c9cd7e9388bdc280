"""What a CPU kernel is asked to compute: physical layouts, epilogues and one frozen dataclass an operator.

A workload is hashable and says everything that shapes the code; two layers with equal workloads share one kernel.
Weights, biases and multipliers are data, packed beside the kernel and passed as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATIONS = (
    "relu",
    "relu6",
    "clamp",
    "leaky_relu",
    "sigmoid",
    "silu",
    "hard_sigmoid",
    "hard_swish",
    "tanh",
    "gelu",
)

PLANE_BYTES = 4
PLANE_PIXELS = 16  # whose 32 bits are a cache line


@dataclass(frozen=True)
class Layout:
    """How an activation lies in memory: NHWC with margins, ``[N, top + H + bottom, left + W + right, channel_stride]``.

    Margins are the padding of the kernels that read the tensor, written by the kernel that makes it, so that no copy
    stands between two kernels. **Every element outside the logical N x H x W x channels holds ``fill``** (the zero
    point of an integer tensor, 0 of a float one). A batch of ``None`` is dynamic. A 2-D tensor ``[N, K]`` is
    ``N x 1 x 1 x K``; a 3-D one ``[N, T, K]`` is ``N x 1 x T x K``.

    ``order`` "planar" is the other form, in which sparse kernels read a vector of neighbouring pixels: ``[N, planes,
    plane_pixels, group]``, a plane holding 4 channels of bytes or 1 of floats for every pixel, row by row. It has no
    margins; what lies behind a plane's last pixel, and in a plane's channels that the tensor lacks, is anything.

    ``shared``: the tensor is the channels from ``first_channel`` on of a wider one, as the input of a concatenation is.
    Beside them in a pixel lie other tensors' channels, which a kernel leaves alone; the margins are the whole tensor's.
    """

    batch: int | None
    height: int
    width: int
    channels: int
    dtype: str  # "uint8", "int8", "float32"
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    channel_stride: int = 0  # 0: equal to channels
    fill: int = 0
    first_channel: int = 0
    shared: bool = False
    order: str = "nhwc"

    def __post_init__(self) -> None:
        if self.channel_stride == 0:
            object.__setattr__(self, "channel_stride", self.channels)

    @property
    def rows(self) -> int:
        return self.top + self.height + self.bottom

    @property
    def columns(self) -> int:
        return self.left + self.width + self.right

    @property
    def group(self) -> int:
        """Channels of a plane: they fill 32 bits."""
        return 1 if self.dtype == "float32" else PLANE_BYTES

    @property
    def planes(self) -> int:
        """Planes of an image in planar order."""
        return -(-self.channels // self.group)

    @property
    def plane_pixels(self) -> int:
        """Pixels from a plane to the next one: an odd number of cache lines, so that planes do not share L1 sets.

        A vector that begins at the last pixel ends in its own plane.
        """
        return PLANE_PIXELS * (-(-self.height * self.width // PLANE_PIXELS) + 1 | 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The physical tensor's dimensions after the batch."""
        if self.order == "planar":
            return self.planes, self.plane_pixels, self.group
        return self.rows, self.columns, self.channel_stride

    @property
    def pad_channels(self) -> int:
        """Elements behind a pixel's channels that hold the fill."""
        return 0 if self.shared else self.channel_stride - self.channels

    @property
    def is_dense(self) -> bool:
        """True where memory holds the logical tensor and nothing else."""
        return (
            not (self.top or self.bottom or self.left or self.right)
            and self.channel_stride == self.channels
        )


@dataclass(frozen=True)
class Requantize:
    """``q = zero_point + rint(clamp(float32(acc) * multiplier, qmin - zero_point, qmax - zero_point))``.

    ``multiplier`` is float32 per output channel (an argument, not a constant); ``rint`` rounds half to even; the
    clamp carries ReLU and ReLU6. One product and no sum in float: nothing for a compiler to contract. ``fits``: no
    rounded product leaves int32, which the weights prove, so that a kernel may clamp after rounding.
    """

    zero_point: int
    qmin: int
    qmax: int
    fits: bool = False


@dataclass(frozen=True)
class QuantizedAdd:
    """``v = (a - a_zero_point) * a_multiplier + (b - b_zero_point) * b_multiplier`` in int32, then
    ``q = zero_point + rint(clamp(float32(v) * 2**-shift, qmin - zero_point, qmax - zero_point))``.

    The multipliers are fixed point, below 2**21 in magnitude, so that v stays below 2**30 and the sum is exact.
    """

    a_multiplier: int
    b_multiplier: int
    shift: int
    a_zero_point: int
    b_zero_point: int
    zero_point: int
    qmin: int
    qmax: int


@dataclass(frozen=True)
class Activation:
    """A float function applied in the epilogue; ``low`` and ``high`` bound "clamp", ``low`` is leaky ReLU's slope.

    "gelu" is the exact (erf) form.
    """

    name: str
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation {self.name!r} is none of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class Epilogue:
    """What happens between the last product and the store.

    Integer accumulators, ``requantize`` set: ``q = requantize(acc + bias)``, then ``q = add(q, residual)`` where
    ``residual_add`` is set (the layer's own q is operand a, the residual tensor operand b).
    Integer accumulators, ``requantize`` None: ``v = float32(acc + bias) * multiplier``, else ``v = acc + bias``; then
    ``v = v + residual``, rounded by itself, where ``float_residual``; then ``activation``; float32 out.
    Integer accumulators, ``requantize`` and ``inverse_scale``: that v, quantized as a ``Convert`` would,
    ``q = requantize(v * inverse_scale)``.
    """

    requantize: Requantize | None = None
    residual_add: QuantizedAdd | None = None
    float_residual: bool = False
    activation: Activation | None = None
    inverse_scale: float = 0.0  # 0: ``requantize`` takes the sums


@dataclass(frozen=True)
class Conv2d:
    """``y[n,p,q,o] = epilogue(sum_{r,s,i} x[n, p*sh - top + r*dh, q*sw - left + s*dw, g*I + i] * w[o,i,r,s])``.

    Dense, grouped and depthwise; a linear layer is a 1 x 1 convolution on ``N x 1 x T x K``. ``padding`` is
    (top, left); the input's margins hold at least what the windows touch. Arguments of the kernel, in order:
    ``x, packed weight, bias, [multiplier], [residual], y``. uint8 x int8 -> int32 or float32 x float32 -> float32.
    ``residual`` is the layout of the residual tensor where the epilogue takes one.
    """

    x: Layout
    y: Layout
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    x_zero_point: int = 0
    epilogue: Epilogue = Epilogue()
    residual: Layout | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        taps = self.kernel[0] * self.kernel[1] * (self.x.channels // self.groups)
        return self.y.height * self.y.width * self.y.channels * taps


@dataclass(frozen=True)
class Pool2d:
    """Max, or ``rint``-ed average, over windows. Arguments: ``x, y`` (max), ``x, multipliers, y`` (integer average).

    ``kind`` is "max" or "average". The padding never takes part in a maximum. Integer average:
    ``q = zero_point + rint(clamp(float32(sum(x - x_zero_point)) * multiplier[count], ...))`` with ``multipliers`` a
    float32 table indexed by the number of elements that count (``kernel[0] * kernel[1] + 1`` entries); to a float32 y
    (``requantize`` None) the product itself. Float average: ``sum(x) / count``. ``count_include_pad`` counts the padded
    positions (torch's meaning), ``divisor_override`` replaces the count when not 0. A global pool is a window as large
    as the map.
    """

    kind: str
    x: Layout
    y: Layout
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    count_include_pad: bool = True
    divisor_override: int = 0
    x_zero_point: int = 0
    requantize: Requantize | None = None


@dataclass(frozen=True)
class Add:
    """Residual sum of two tensors of one logical shape. Arguments: ``a, b, y``. Float where ``add`` is None."""

    a: Layout
    b: Layout
    y: Layout
    add: QuantizedAdd | None = None
    activation: Activation | None = None


@dataclass(frozen=True)
class Mul:
    """Float product ``a * b`` of two tensors, ``b`` either of a's shape or ``N x 1 x 1 x C``. Arguments: ``a, b, y``."""

    a: Layout
    b: Layout
    y: Layout
    activation: Activation | None = None


@dataclass(frozen=True)
class Concat:
    """Concatenation along channels. Arguments: ``inputs..., y``.

    ``requantize[i]`` is None for a plain copy, else ``(multiplier, x_zero_point, Requantize)`` with a float multiplier:
    ``q = zero_point + rint(clamp(float32(x - x_zero_point) * multiplier, ...))``.
    """

    inputs: tuple[Layout, ...]
    y: Layout
    requantize: tuple[tuple[float, int, Requantize] | None, ...] = ()


@dataclass(frozen=True)
class Convert:
    """Change of layout, element type or both, between two tensors of one logical shape. Arguments: ``x, y``.

    ``x_order``/``y_order`` are "nhwc" (the physical form of ``Layout``) or "nchw" (dense, the order of the PyTorch graph;
    the layout's margins must then be zero and its channel stride equal to channels). float32 -> integer quantizes with
    ``q = zero_point + rint(clamp(v * inverse_scale, qmin - zero_point, qmax - zero_point))`` where the clamp is
    ``v > low ? v : low`` then ``v < high ? v : high`` (NaN becomes qmin); integer -> float32 dequantizes with
    ``v = float32(q - x_zero_point) * scale``; integer -> integer with ``requantize`` set multiplies by ``scale``.
    ``scale`` is used as float32 (the inverse scale when quantizing).
    """

    x: Layout
    y: Layout
    x_order: str = "nhwc"
    y_order: str = "nhwc"
    scale: float = 1.0
    x_zero_point: int = 0
    requantize: Requantize | None = None
    activation: Activation | None = None
