"""Smaller modules in place of convolutions; each is meant to be followed by training (``graphopt.fine_tune``)."""

from graphopt.passes.compact.inception_factorize import InceptionFactorize as InceptionFactorize
from graphopt.passes.compact.one_by_one_substitute import OneByOneSubstitute as OneByOneSubstitute
from graphopt.passes.compact.squeeze_substitute import SqueezeSubstitute as SqueezeSubstitute
