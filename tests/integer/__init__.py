"""Tests of the integer level; importing ``graphopt.integer`` registers the operators that they call."""

import graphopt.integer  # noqa: F401
