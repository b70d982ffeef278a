"""Benchmarks that answer one question each: python -m bench.studies.dropout.

    decisive      how should the package be built? one short run on a GPU
    probe         is a GEMM of our own worth it? (beside.py, gluon/)
    ways          which way wins at which shape on this GPU? into the planner's table (one_layer.py)
    dropout       what does dropout cost?
    shared        what do layers that share x save?
    evaluation    what does frozen_adapters save in eval mode and decoding?
    analysis      the DoRA paper's figure 2, at a small size
    fit           how good are the planner's predictions? its constants, from measured times
    predictions   how long does a training step take on a GPU, by the cost model?
    scaling       the arithmetic of a large model on several GPUs, predicted

predictions and scaling are no commands: bench.figures writes their tables into docs/.
"""
