"""Pytest's side of it: python -m pytest -p tools.pretended_gpu.plugin"""

import os

import pytest

from tools.pretended_gpu import start

os.environ["PRETENDED_GPU_IDLE"] = "0"  # a test is nothing without numbers
start()

# Tests that need what is not pretended, by the end of their file's name and the start of their own.
BEYOND = {
    ("test_addresses.py", "test_more_than_2_to_the_31_elements"): "hours in the interpreter, and 48 GB",
    ("test_compile.py", "test_inductor"): "inductor compiles for a driver",
    ("test_compile.py", "test_reduce_overhead"): "inductor compiles for a driver",
    ("test_faults.py", "test_a_fork_after_cuda_says_so"): "a fork of this process has a GPU as well",
    ("test_graphs.py", "test_forward_and_backward_replay"): "a graph's replay does nothing",
    ("test_graphs.py", "test_a_whole_training_step_replays"): "a graph's replay does nothing",
    (
        "test_peft_conv.py",
        "test_compiles_without_a_graph_break",
    ): "compiled, dropout draws another mask here",
    ("test_graphs.py", "test_make_graphed_callables"): "a graph's replay does nothing",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for (file, test), reason in BEYOND.items():
            if item.path.name == file and item.name.startswith(test):
                item.add_marker(pytest.mark.skip(reason=f"pretended GPU: {reason}"))
