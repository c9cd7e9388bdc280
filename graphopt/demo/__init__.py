"""EfficientNet-Lite0 with its ImageNet weights, from PyTorch to a measured int8 file."""
