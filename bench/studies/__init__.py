"""Benchmarks that answer one question each."""
