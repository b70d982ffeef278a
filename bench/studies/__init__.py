"""Benchmarks that answer one question each.

decisive      how should the package be built? one short run on a GPU
probe         is a GEMM of our own worth it? (beside.py, gluon/; fused.py is decisive's)
dropout       what does dropout cost?
shared        what do layers that share x save?
evaluation    what does frozen_adapters save in eval mode and decoding?
analysis      the DoRA paper's figure 2, at a small size
scaling       the arithmetic of a large model on several GPUs (predicted)
fit           how good are the planner's predictions? its constants from measured times
"""
