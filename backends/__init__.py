"""Lowering of programs to machine code: targets, integer level, kernels."""
