"""Benchmarks: providers of one layer step, measured side by side behind a correctness gate."""
