"""Measurements, some against peers; each module is a command that writes its table under docs/benchmarks."""
