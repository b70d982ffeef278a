"""What a launch needs to know: the user's options, the device, and the tile configuration of each kernel.

This is the only room that reads the environment (DORA_KERNELS_BACKEND), and it decides whether the Triton kernels or
the plain-PyTorch reference compute a call; which of its products go to the GEMM library is plan.py's choice.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
import pathlib
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

logger = logging.getLogger("dora_kernels")

BACKENDS = ("auto", "triton", "reference")
WAYS = ("auto", "split", "merged")
PRECISIONS = ("auto", "exact")


@dataclass(frozen=True)
class Options:
    """The user's choices; see `options`."""

    backend: str = "auto"
    way: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("backend", BACKENDS), ("way", WAYS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"options: {name} is {value!r}; expected one of {', '.join(allowed)}")


def _from_environment() -> Options:
    """DORA_KERNELS_BACKEND; unset and empty mean auto."""
    backend = os.environ.get("DORA_KERNELS_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"DORA_KERNELS_BACKEND is {backend!r}; expected one of {', '.join(BACKENDS)}")
    return Options(backend=backend)


# A module global and neither thread-local nor a ContextVar: torch.compile guards on a global, silently ignores
# changes of a thread-local and refuses a ContextVar (torch 2.13).
_default = _from_environment()
_current = _default
# what each open `options` block asked for, in the order in which they were entered
_asked: list[dict[str, str]] = []
_asking = threading.Lock()
_own = threading.local()


def current_options() -> Options:
    """The options in force: this thread's own, where it has any, else the process'."""
    return _current if torch.compiler.is_compiling() else getattr(_own, "options", _current)


@contextlib.contextmanager
def own_options(**named: str) -> Iterator[None]:
    """Inside a `with` block, options of this thread alone; torch.compile does not see them.

    For what enable() computes while other threads may be in forward passes of their own.
    """
    before = vars(_own).copy()
    _own.options = replace(current_options(), **named)
    try:
        yield
    finally:
        vars(_own).clear()
        vars(_own).update(before)


@contextlib.contextmanager
def options(backend: str | None = None, way: str | None = None, precision: str | None = None) -> Iterator[Options]:
    """Set options inside a `with` block, for the whole process; what is not named stays as it is.

    backend: "triton" (never falls back: a call that the kernels cannot take is a ValueError), "reference"
        (plain PyTorch), or "auto" (Triton on a GPU that the kernels are built for, else the reference).
    way: "split", "merged" or "auto" (the planner chooses); see plan.py.
    precision: "exact" keeps x @ weight.T in float32 until the single rounding of the output.

    A backward pass uses the options that were in force in its forward pass.
    """
    named = {"backend": backend, "way": way, "precision": precision}
    asked = {name: value for name, value in named.items() if value is not None}
    replace(_current, **asked)  # raises ValueError before anything is changed
    with _alone():
        _asked.append(asked)
        _settle()
    try:
        yield _current
    finally:
        # not simply what it was before: threads may leave their blocks in another order than they entered them
        with _alone():
            _asked[:] = [other for other in _asked if other is not asked]
            _settle()


def _settle() -> None:
    """The options in force from what the open blocks asked for: the block entered last has the last word."""
    global _current
    settled = _default
    for asked in _asked:
        settled = replace(settled, **asked)
    _current = settled


def _alone() -> contextlib.AbstractContextManager:
    """One thread at a time; torch.compile, which cannot trace a lock, traces alone anyway."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _asking


@functools.cache
def has_triton() -> bool:
    """True where the triton package can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreting() -> bool:
    """True where Triton runs kernels on the CPU through its interpreter (TRITON_INTERPRET=1)."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def interpret_on_cpu() -> None:
    """Let Triton run kernels on CPU tensors through its interpreter; in this process, before triton is imported.

    Raises ValueError where it is too late, or where there is no triton.
    """
    if not has_triton():
        raise ValueError("interpret_on_cpu: triton is not installed; expected it, to run its kernels on the CPU")
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not interpreting():
        raise ValueError("interpret_on_cpu: triton was imported with its interpreter off; expected TRITON_INTERPRET=1")
    interpreting.cache_clear()
    device_facts.cache_clear()


@dataclass(frozen=True)
class DeviceFacts:
    """target: the config family below; multiprocessors: how many programs run at once."""

    name: str
    target: str
    multiprocessors: int


# Compute capability -> config family. A family is what was compiled ahead of time and checked against the
# device's shared memory (tools/compile_kernels.py); capabilities that share a limit share a family.
_CUDA_FAMILIES = {
    (8, 0): "sm_80",
    (8, 6): "sm_120",
    (8, 9): "sm_120",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (12, 0): "sm_120",
    (12, 1): "sm_120",
}
_HIP_FAMILIES = {"gfx942": "gfx942", "gfx950": "gfx942"}


@functools.cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of `device`; target is "" where no kernel configuration is known for it."""
    if device.type == "cpu":
        return DeviceFacts("cpu", "interpreter" if interpreting() else "", 2)
    if device.type != "cuda":
        return DeviceFacts(str(device), "", 1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        target = _HIP_FAMILIES.get(properties.gcnArchName.split(":")[0], "")
    else:
        target = _CUDA_FAMILIES.get((properties.major, properties.minor), "")
    return DeviceFacts(properties.name, target, properties.multi_processor_count)


def why_not_triton(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """The reason that the kernels cannot take tensors of `dtypes` on `device`; "" where they can."""
    if not has_triton():
        return "triton is not installed"
    facts = device_facts(device)
    if device.type == "cpu" and not facts.target:
        return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    if not facts.target:
        return f"no kernel configuration is known for {facts.name}"
    # float64 has no tensor-core path worth a config of its own; the interpreter takes it, for gradcheck.
    taken = (torch.bfloat16, torch.float16, torch.float32)
    taken += (torch.float64,) if facts.target == "interpreter" else ()
    refused = [dtype for dtype in dtypes if dtype not in taken]
    if torch.float64 in dtypes and len(set(dtypes)) > 1:
        refused = [torch.float64]  # a float64 product has no place in a float32 accumulator
    return f"the kernels do not take {refused[0]} on {facts.name}" if refused else ""


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Warn of a path that costs speed, once in a process; not while torch.compile traces, which cannot log."""
    if message not in _logged and not torch.compiler.is_compiling():
        _logged.add(message)
        logger.warning(message)


def backend_for(requested: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """ "triton" or "reference" for a call; a fallback is logged once, a named backend never falls back.

    Raises ValueError where `requested` is "triton" and the kernels cannot take the call.
    """
    if requested == "reference":
        return "reference"
    if requested == "auto" and device.type == "cpu":
        return "reference"
    reason = why_not_triton(device, dtypes)
    if not reason:
        return "triton"
    if requested == "triton":
        raise ValueError(f'options(backend="triton"): {reason}; expected a GPU that the kernels are built for')
    log_once(f"dora_kernels uses the reference: {reason}")
    return "reference"


@dataclass(frozen=True)
class Config:
    """Tile sizes and schedule of one kernel. A tile size that the kernel does not have is None."""

    BLOCK_M: int | None = None
    BLOCK_N: int | None = None
    BLOCK_K: int | None = None
    BLOCK_R: int | None = None
    num_warps: int = 4
    num_stages: int = 2
    # programs that should be in flight per multiprocessor; sets how far a reduction is split
    waves: int = 1

    def tiles(self, R: int | None = None) -> dict[str, int]:
        """Keyword arguments of the launch; BLOCK_R shrinks to a small R (tl.dot needs at least 16)."""
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R", "num_warps", "num_stages")
        sizes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if R is not None and self.BLOCK_R is not None:
            sizes["BLOCK_R"] = min(self.BLOCK_R, max(16, 1 << max(R - 1, 0).bit_length()))
        return sizes


def splits(blocks: int, most: int, facts: DeviceFacts, config: Config) -> int:
    """Into how many parts a reduction of `most` steps is split so that `blocks` output tiles fill the device.

    Depends on shapes and device only, so that the order of summation is the same in every call.
    """
    wanted = facts.multiprocessors * config.waves // max(blocks, 1)
    return max(1, min(wanted, most))


# Starting points for sm_90 from ahead-of-time compilation (registers and shared memory: tools/compile_kernels.py);
# their speed has not been measured yet.
_HALF = {
    "norm": Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=4, num_stages=3, waves=2),
    # lora_A is read once per block of rows and lora_B once per block of columns: at 8192 x 8192, R = 384, tiles of
    # 128 x 128 move 0.8 GB through the L2 cache, tiles of 64 x 128 move 1.2
    "norm_high_rank": Config(BLOCK_N=128, BLOCK_K=128, BLOCK_R=64, num_warps=8, num_stages=3),
    "merge": Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8, num_stages=2),
    "merge_high_rank": Config(BLOCK_N=128, BLOCK_K=128, BLOCK_R=64, num_warps=8, num_stages=3),
    "project": Config(BLOCK_M=128, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=4),
    # 128 x 128 spills 120 bytes a thread on sm_90; 64 x 128 takes 128 registers
    "epilogue": Config(BLOCK_M=64, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=2),
    "bank_epilogue": Config(BLOCK_M=64, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=2),
    "token_sums": Config(BLOCK_M=64, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=3),
    "finish_norm": Config(BLOCK_N=128, num_warps=4, num_stages=1),
    "finish_sums": Config(BLOCK_N=32, BLOCK_R=64, num_warps=4, num_stages=1),
    "finish_project": Config(BLOCK_M=1024, num_warps=4, num_stages=1),
}
# 4-byte operands: the same tiles would need twice the shared memory and registers.
_FLOAT = _HALF | {
    "norm": Config(BLOCK_N=64, BLOCK_K=64, BLOCK_R=32, num_warps=8, num_stages=2, waves=2),
    "norm_high_rank": Config(BLOCK_N=64, BLOCK_K=64, BLOCK_R=32, num_warps=8, num_stages=2, waves=2),
    "merge": Config(BLOCK_N=64, BLOCK_K=64, BLOCK_R=32, num_warps=8, num_stages=2),
    "merge_high_rank": Config(BLOCK_N=64, BLOCK_K=64, BLOCK_R=32, num_warps=8, num_stages=2),
    "project": Config(BLOCK_M=64, BLOCK_K=32, BLOCK_R=64, num_warps=8, num_stages=3),
    "epilogue": Config(BLOCK_M=64, BLOCK_N=64, BLOCK_R=32, num_warps=8, num_stages=2),
    "bank_epilogue": Config(BLOCK_M=32, BLOCK_N=64, BLOCK_R=32, num_warps=8, num_stages=2),
    "token_sums": Config(BLOCK_M=32, BLOCK_N=64, BLOCK_R=64, num_warps=8, num_stages=2),
}
# Half of sm_90's shared memory: the tiles of 128 x 128 spill.
_HALF_SM120 = _HALF | {
    "norm_high_rank": Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8, num_stages=2, waves=2),
    "merge_high_rank": Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8, num_stages=2),
}
# 64 KB of shared memory, and a wavefront of 64: fewer stages.
_HALF_GFX = _HALF | {
    "norm": Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=4, num_stages=2, waves=2),
    "norm_high_rank": Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=4, num_stages=2, waves=2),
    "merge_high_rank": Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8, num_stages=2),
    "project": Config(BLOCK_M=128, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=2),
    "token_sums": Config(BLOCK_M=64, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=2),
}
# The interpreter pays per tile operation; tiles of 32 leave ragged edges and several steps at test shapes.
_INTERPRETER = {
    "norm": Config(BLOCK_N=32, BLOCK_K=32, BLOCK_R=16, waves=4),
    "norm_high_rank": Config(BLOCK_N=64, BLOCK_K=32, BLOCK_R=16, waves=4),
    "merge": Config(BLOCK_N=32, BLOCK_K=32, BLOCK_R=16),
    "merge_high_rank": Config(BLOCK_N=64, BLOCK_K=32, BLOCK_R=16),
    "project": Config(BLOCK_M=32, BLOCK_K=32, BLOCK_R=16, waves=4),
    "epilogue": Config(BLOCK_M=32, BLOCK_N=32, BLOCK_R=16),
    "bank_epilogue": Config(BLOCK_M=32, BLOCK_N=32, BLOCK_R=16),
    "token_sums": Config(BLOCK_M=32, BLOCK_N=32, BLOCK_R=16, waves=4),
    "finish_norm": Config(BLOCK_N=32),
    "finish_sums": Config(BLOCK_N=16, BLOCK_R=16),
    "finish_project": Config(BLOCK_M=256),
}
# Above this rank the products over R outweigh reading the weight: larger tiles.
HIGH_RANK = 64

# (target, bytes of an operand) -> kernel -> Config
CONFIGS: dict[tuple[str, int], dict[str, Config]] = {
    ("sm_80", 2): _HALF,
    ("sm_80", 4): _FLOAT,
    ("sm_90", 2): _HALF,
    ("sm_90", 4): _FLOAT,
    ("sm_100", 2): _HALF,
    ("sm_100", 4): _FLOAT,
    ("sm_120", 2): _HALF_SM120,
    ("sm_120", 4): _FLOAT,
    ("gfx942", 2): _HALF_GFX,
    ("gfx942", 4): _FLOAT,
    ("interpreter", 2): _INTERPRETER,
    ("interpreter", 4): _INTERPRETER,
    ("interpreter", 8): _INTERPRETER,
}


TUNED_FOLDER = pathlib.Path(__file__).with_name("tuned")


def tuned_path(name: str) -> pathlib.Path:
    """Where tools/tune.py keeps the configurations measured on the GPU of that name: tuned/nvidia-h200.json."""
    return TUNED_FOLDER / (re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


@functools.cache
def tuned_configs(name: str, target: str) -> dict[tuple[int, str], Config]:
    """(bytes of an operand, kernel) -> what was measured to be faster than CONFIGS on the GPU of that name.

    Empty where the file is missing; where anything in it is not a configuration of its kernel: logged once.
    """
    path = tuned_path(name)
    try:
        table = json.loads(path.read_text())["configs"]
        return {
            (int(itemsize), kernel): _checked(fields, CONFIGS[target, int(itemsize)][kernel])
            for itemsize, kernels in table.items()
            for kernel, fields in kernels.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("dora_kernels ignores %s, default configurations are used: %r", path, error)
        return {}


def _checked(fields: dict[str, int], default: Config) -> Config:
    """Config(**fields); raises ValueError where a launch with it could be wrong (TypeError for an unknown field)."""
    config = Config(**fields)
    for name, least, most in (("num_warps", 1, 16), ("num_stages", 1, 8), ("waves", 1, 64)):
        value = getattr(config, name)
        power = name != "num_warps" or (type(value) is int and value & (value - 1) == 0)
        if type(value) is not int or not least <= value <= most or not power:
            raise ValueError(f"tuned: {name} is {value!r}; expected {least} to {most}, num_warps a power of two")
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R"):
        value, tile = getattr(config, name), getattr(default, name) is not None
        if (value is not None) != tile:
            raise ValueError(f"tuned: {name} is {value!r}; expected {'a size' if tile else 'none'}")
        if tile and (type(value) is not int or value < 16 or value & (value - 1)):
            raise ValueError(f"tuned: {name} is {value!r}; expected a power of two of at least 16")
    return config


def config_for(kernel: str, facts: DeviceFacts, operand: torch.dtype) -> Config:
    """The configuration of `kernel` for low-rank operands of dtype `operand`: tuned on this GPU, or the default."""
    tuned = tuned_configs(facts.name, facts.target).get((operand.itemsize, kernel))
    return tuned or CONFIGS[facts.target, operand.itemsize][kernel]


def dot_precision(facts: DeviceFacts, operand: torch.dtype, weight: torch.dtype) -> str:
    """`input_precision` of tl.dot for low-rank operands of dtype `operand` beside a weight of dtype `weight`.

    Obeys torch.set_float32_matmul_precision. Over a half-precision weight "highest" is bf16x6: six bf16 tensor-core
    products, as exact as IEEE float32, where IEEE itself would leave the tensor cores.
    """
    if operand != torch.float32 or facts.target == "interpreter" or facts.target.startswith("gfx"):
        return "ieee"
    highest = torch.get_float32_matmul_precision() == "highest"
    if weight != torch.float32:
        return "bf16x6" if highest else "bf16x3"
    return "ieee" if highest else "tf32x3"
