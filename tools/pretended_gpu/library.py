"""backend.cpp, built for the installed PyTorch and loaded into this process."""

import contextlib
import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "backend.cpp"
FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC")
loaded: ctypes.CDLL | None = None


def load(torch_origin: str) -> None:
    """Load the library beside PyTorch's own, before `import torch` asks whether there is CUDA.

    torch_origin: the path of torch/__init__.py.
    """
    global loaded
    folder = Path(torch_origin).parent
    # As torch does it: the first makes the symbols of the libraries that it links to (MKL, CUDA) everybody's.
    ctypes.CDLL(folder / "lib" / "libtorch_global_deps.so", mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(folder / "lib" / "libtorch.so")
    loaded = ctypes.CDLL(built(folder))
    for name in ("pretended_allocated", "pretended_peak"):
        getattr(loaded, name).restype = ctypes.c_uint64
    loaded.pretended_idle(is_idle())


def is_idle() -> bool:
    """True if nothing is computed: asked for by `--idle`, and inherited."""
    return os.environ.get("PRETENDED_GPU_IDLE") == "1"


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """While the pretence itself works: what it copies between device and host nobody has asked for."""
    loaded.pretended_inside(1)
    try:
        yield
    finally:
        loaded.pretended_inside(-1)


def built(torch_folder: Path) -> Path:
    """The library for the PyTorch in this folder; built where it is not yet (8 s)."""
    version = (torch_folder / "version.py").read_bytes()
    key = hashlib.sha256(version + SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dora_kernels"
    path = cache / f"pretended_gpu_{key}.so"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    include, libraries = torch_folder / "include", torch_folder / "lib"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fresh = Path(folder) / path.name
        command = ["g++", *FLAGS, f"-I{include}", f"-I{include}/torch/csrc/api/include", str(SOURCE), "-o", str(fresh)]
        done = subprocess.run([*command, f"-L{libraries}", "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pretended_gpu: {SOURCE.name} does not compile\n{done.stderr[-4000:]}")
        fresh.replace(path)  # whole, whoever else builds it meanwhile
    return path
