"""Comparative studies of adaptbatch: one results schema, one training loop, arms as values."""
