"""The command line, python -m dora_kernels: see cli.py."""

import sys

from dora_kernels.cli import main

sys.exit(main())
