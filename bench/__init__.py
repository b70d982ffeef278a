"""Benchmarks, each a command: python -m bench.layer. Nothing is timed before its results were held against float64.

layer       one layer's step by every provider, side by side    -> results/<device>/layer.json
kernels     each kernel, and the GEMM library's same work       -> results/<device>/kernels.json
model       a whole model's training steps                      -> results/<device>/model.json
host        the host's time and launches of a call, no GPU      -> results/cpu/host.json
figures     what the docs say of results/, regenerated
studies/    benchmarks that answer one question each: what dropout costs, what sharing saves, ...
lib/        what these consist of: problems, providers, the instrument, roofs, reports
bench_layer.py, conftest.py    the layer's step under pytest-benchmark, make bench
"""
