"""Comparative studies of adaptbatch: one results schema, one training loop, arms as values."""

from studies.engine.results import load

__all__ = ["load"]
