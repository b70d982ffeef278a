"""The tests lie as the package does: what tests dora_kernels/reuse/store.py is in tests/reuse/.

Every step of kernels/ and of pytorch.py is held to reference.py in kernels/test_steps.py, and the files beside it have
what only kernels have: tiles, bounds, addresses, the interpreter. test_*.py here are those of the root's files.
runtime/ and distributed/ test the package under PyTorch's own machinery (compile, export, graphs, autocast, threads,
ranks), bench/ and tools/ the programs of those folders, repo/ the repository: the order of imports, docs, examples.
support/ has what tests share, and says what is where. conftest.py makes fresh memory NaN under every test.

Markers: `gpu` needs a device; `nightly` is slow, or the full sweep of what a run shows of one or two examples.
"""
