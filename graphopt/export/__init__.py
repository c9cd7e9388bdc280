"""Compiled models for hosts without Python: ``export_c`` writes one as a folder of C."""

from graphopt.export.c import Exported, export_c

__all__ = ["Exported", "export_c"]
