"""The GEMM in Gluon with a fault put into it: what checks it has to notice that."""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any


def changed(old: str, new: str) -> Any:
    """gemm_kernel from a copy of its source that has `new` for `old`. Raises ValueError where there is no `old`."""
    from dora_kernels.kernels.hopper import gemm

    source = Path(gemm.__file__).read_text()
    if old not in source:
        raise ValueError(f"changed: {old!r} is not in {gemm.__file__}")
    path = Path(tempfile.mkdtemp()) / "changed_gemm.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # the kernel's source is looked up there
    spec.loader.exec_module(module)
    return module.gemm_kernel
