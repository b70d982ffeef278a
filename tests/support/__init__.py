"""What several tests share; nothing here imports a test, and no test imports another (tests/repo/test_layout.py).

problem                      one DoRA call of random numbers: actual, yardstick and exact; every accuracy test
peft_, quantized_, vera_,    a small model of its kind: PEFT's linear layers, convolutions and embedding, over
llama_, shared_, compile_,   quantised weights, VeRA's, a Llama, layers that read the same x, one that is
distributed_, convert_problem    compiled, one that ranks share, adapters in a file's format
layer_kinds                  one layer of every kind, stock and enabled: what holds of all of them alike
conformance_checks           what enable() promises of a library's layers; library_layers, structure_cases and
                             restated_layers are such layers
packed_weights               a quantised weight in every format, of random numbers
launcher_operands            every launcher of kernels/ with its operands by name
derivative_routes, parity_ratios, process_worlds, micro_demo, gluon_simulator, gluon_schedule
empty_layers, container_fuzzer    programs of their own: what they look for may end a process
"""
