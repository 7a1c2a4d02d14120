"""Readers: from files of many formats to bounded Arrow batches, every row accounted for."""

from operators.sources.batches import BadRow, SourceBatch
from operators.sources.units import ReadSettings, Unit, file_identities, find_files, plan_units, read_unit

__all__ = ["BadRow", "ReadSettings", "SourceBatch", "Unit", "file_identities", "find_files", "plan_units", "read_unit"]
