"""Benchmarks, each a command: python -m bench.layer. Nothing is timed before its results were held against float64.

    layer       one layer's step by every provider, side by side    -> results/<device>/layer.json
    kernels     each kernel, and the GEMM library's same work       -> results/<device>/kernels.json
    model       a whole model's training steps                      -> results/<device>/model.json
    host        the host's time and launches of a call, no GPU      -> results/cpu/host.json
    figures     the figures of README.md and docs/, from results/
    studies/    benchmarks that answer one question each
    lib/        the parts of them all: problems, providers, the instrument, roofs, reports

bench_layer.py and conftest.py are the layer's step under pytest-benchmark: make bench.
"""
