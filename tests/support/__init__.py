"""What several tests share; nothing here imports a test, and no test imports another (tests/repo/test_layout.py).

problem: one DoRA call of random numbers, and its three results: actual, yardstick, exact. step_problem: a single step.
peft_problem, quantized_, vera_, llama_, shared_, distributed_problem: a small model of that kind. convert_problem:
    random adapters in a file of any format. merge_problem: a base in shards, and its exact merge.
compile_problem: a backend of torch.compile that remembers our operators.
image_files: what tools for image models save of a small one; image_readers: what each tool computes of such a file.
layer_kinds: one layer of every kind, as it is and enabled, for what has to hold of all of them alike.
conformance_checks: what enable() promises of a library's layers; library_layers, structure_cases and restated_layers
    are such layers.
packed_weights: a quantized weight in every format. launcher_operands: every launcher of kernels/, its operands by name.
process_worlds: ranks of gloo. racing_threads: threads at the same time. micro_demo: the demo in a second.
derivative_routes, parity_ratios: how far two differ.
gluon_simulator, _language, _values, _order, _schedule: a warp-specialised kernel on a CPU. gluon_gemm: our GEMM on it,
    held to float64; gluon_mutants, _equivalents: every small change to its source. simulated_hopper: whole layers.
public_functions, public_extras: what every public function takes and refuses, of right_values and wrong_values.
hostile_files, _pickles, _patterns: what strangers may send; hostile_readers: who reads it; peft_meaning: what PEFT
    makes of an adapter. command_files: files for commands to read. children: processes under limits, or as others.
empty_layers, container_fuzzer: programs, run in processes of their own, which what they look for may end.
"""
