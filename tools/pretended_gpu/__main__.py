"""Run a script or a module, and what it starts, under the pretence.

python -m tools.pretended_gpu tools/gpu_suite.py --seconds 60
python -m tools.pretended_gpu --idle -m bench.kernels      # nothing is computed
"""

import os
import runpy
import sys
from pathlib import Path

from tools.pretended_gpu import start

USAGE = "usage: python -m tools.pretended_gpu [--idle] (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> int:
    """The exit status, where the program does not exit by itself."""
    if arguments[:1] == ["--idle"]:
        os.environ["PRETENDED_GPU_IDLE"] = "1"
        arguments = arguments[1:]
    is_module = arguments[:1] == ["-m"]
    sys.argv = arguments[is_module:]
    if not sys.argv:
        print(USAGE, file=sys.stderr)
        return 2
    start()
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python does it
        runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
