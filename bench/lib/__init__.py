"""The parts of the benchmarks, in the order in which they import each other.

machine, report, shapes    the machine's description; JSON and tables; sizes, precisions and grids
problem, peers, providers  one layer's tensors; formulas of others; the layers that are compared
measure, steps             the gate and the clocks; a layer's step, measured
roof                       what a kernel would take at the machine's measured rates
apart                      attempts in processes of their own, which may hang
host_driver, host_layers   bench.host without a GPU: a driver that launches nothing, and the layers over it
"""
