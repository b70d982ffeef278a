"""The command line, python -m dora_kernels: see cli/."""

import sys

from dora_kernels.cli import main, stopping, streams

if __name__ == "__main__":
    stopping.at_once()
    streams.keep_open()
    code = main()
    stopping.at_once(code)
    sys.exit(code)
