"""The parts of the benchmarks.

    machine, report, shapes      the machine's description; JSON and tables; sizes, precisions and grids
    problem, peers, providers    one layer's tensors; formulas of others; the layers that are compared
    measure, siblings, steps     the gate and the clocks; layers that share x; a layer's step, measured
    roof                         the time that a kernel would take at the machine's measured rates
    apart                        attempts in processes of their own, which may hang
    host_driver, host_layers     a driver that launches nothing, and the layers over it
    host_quantized, host_models  layers over a quantized base, and a whole model, over that driver
    host_cases                   those that are measured
    host_instructions            their instructions, by callgrind
    host_measure, host_tables    what is measured of them, and its tables
    tuned                        the table that the planner reads
    results, plots               readers of results/, and the plots of docs/figures/

Each imports from its own line and those above.
"""
