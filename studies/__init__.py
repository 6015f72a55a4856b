"""Comparative studies of adaptbatch: one results schema, one training loop, arms as values."""

from studies.results import load

__all__ = ["load"]
