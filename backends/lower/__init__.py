"""From a program to machine code: which kernels, in which layouts, called by which Relax module."""
