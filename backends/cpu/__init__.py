"""TIR kernels for CPUs, generated from one micro-kernel generator and rows of instruction-set data."""
