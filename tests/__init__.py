"""The tests lie as the package does: dora_kernels/kernels/norm.py is tested in tests/kernels/test_norm.py.

test_*.py here are those of the root's files: modules, ops, passes, reference, the command line. runtime/ and
distributed/ test the package under PyTorch's own machinery (compile, export, graphs, autocast, threads, ranks), bench/
and tools/ the programs of those folders, repo/ the repository: the order of imports, docs, examples. support/ has what
tests share, and says what is where. conftest.py makes fresh memory NaN under every test.

Markers: `gpu` needs a device; `nightly` is the full sweep of what a run shows of one or two examples.
"""
