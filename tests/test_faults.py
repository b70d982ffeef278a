"""What can go wrong outside the package: memory that runs out, a second thread, stream or process, a killed write.

Each ends in the right answer or in a clear error, and the next call is right.
"""

import threading

from dora_kernels import launch
from dora_kernels.launch import Options


def test_options_of_threads_that_overlap_leave_nothing_behind():
    """The first to enter is the first to leave; the other keeps what it asked for until it leaves."""
    inside, left = threading.Event(), threading.Event()
    seen = []

    def first():
        with launch.options(backend="reference"):
            assert inside.wait(10)
        left.set()

    def second():
        with launch.options(way="merged"):
            inside.set()
            assert left.wait(10)
            seen.append(launch.current_options())

    def enter_first_then_second():
        with launch.options(precision="exact"):
            one = threading.Thread(target=first)
            one.start()
            while launch.current_options().backend != "reference":
                pass
            two = threading.Thread(target=second)
            two.start()
            one.join()
            two.join()
            assert launch.current_options() == Options(precision="exact")

    enter_first_then_second()
    assert seen == [Options(way="merged", precision="exact")]
    assert launch.current_options() == Options()
