"""Instruction-set rows of x86-64 processors."""
