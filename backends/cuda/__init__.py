"""TIR kernels for NVIDIA GPUs, from one set of generators and rows of architecture data; compiled without a GPU."""
