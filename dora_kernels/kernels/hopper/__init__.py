"""Kernels for Hopper alone, in Gluon: the dialect of Triton in which warps, copies and barriers are written out.

launch.py is the host's side; it imports the others when it launches, for not every Triton has Gluon.
"""
