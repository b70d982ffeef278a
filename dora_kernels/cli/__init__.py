"""The command line: python -m dora_kernels <command>.

commands/ has a file for each command: its arguments, and what it runs. A command looks at its arguments before it
imports torch, at the machine before it imports what takes longer, and claims what it will write before it works.
running.py runs one and says how it ended; arguments.py has the types of arguments, stopping.py the signals, streams.py
what is printed.
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code: whatever a user types or presses, that and at most one line on stderr.

    0: all right. 1: the command's own checks failed (check, demo, merge). 2: it could not run: an argument, a file that
    cannot be read, an output that cannot be written, no memory. 130: Ctrl-C; 143, 129: ended by SIGTERM, SIGHUP. 141:
    who read stdout went away, which is said by no line. An error that is ours, and nothing else, is raised.
    """
    from dora_kernels.cli.running import run  # not above: __main__.py sees to the signals first

    return run(argv)
