"""A GEMM of our own for Hopper in Gluon: an experiment of bench.studies.probe, no part of the package."""
