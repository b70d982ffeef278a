"""Facts of a device, and the backend of a call on it: the Triton kernels or plain PyTorch."""

import functools
import importlib.util
import logging
import os
import sys
from dataclasses import dataclass

import torch

logger = logging.getLogger("dora_kernels")


@functools.cache
def has_triton() -> bool:
    """True if the triton package can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreting() -> bool:
    """True if Triton runs kernels on the CPU through its interpreter (TRITON_INTERPRET=1)."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def interpret_on_cpu() -> None:
    """Let Triton run kernels on CPU tensors through its interpreter. Call it before anything imports triton.

    The one write to the environment: Triton reads TRITON_INTERPRET when it is imported. Raises ValueError where it is
    too late, or where there is no triton.
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
    """A device's name, its family in tiles.py, and the number of its multiprocessors."""

    name: str
    target: str
    multiprocessors: int


# Compute capability -> family of configurations. A family is compiled ahead of time and checked against the shared
# memory of its devices (tools/compile_kernels.py); capabilities that share a limit share a family.
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
    """Facts of `device`; target is "" if no kernel configuration is known for it."""
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


_TAKEN = frozenset((torch.bfloat16, torch.float16, torch.float32))
# float64 has no tensor-core path worth a config of its own; the interpreter takes it, for gradcheck.
_TAKEN_BY_THE_INTERPRETER = _TAKEN | {torch.float64}


def why_not_triton(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reason that the kernels cannot take tensors of `dtypes` on `device`; None if they can."""
    if not has_triton():
        return "triton is not installed"
    facts = device_facts(device)
    if device.type == "cpu" and not facts.target:
        return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    if not facts.target:
        return f"no kernel configuration is known for {facts.name}"
    taken = _TAKEN_BY_THE_INTERPRETER if facts.target == "interpreter" else _TAKEN
    mixed = torch.float64 in dtypes and len(set(dtypes)) > 1  # a float64 product has no place in a float32 accumulator
    if taken.issuperset(dtypes) and not mixed:
        return None
    refused = torch.float64 if mixed else next(dtype for dtype in dtypes if dtype not in taken)
    return f"the kernels do not take {refused} on {facts.name}"


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Warn of something that costs speed, once in a process; not under torch.compile, which cannot log."""
    if message not in _logged and not torch.compiler.is_compiling():
        _logged.add(message)
        logger.warning(message)


def backend_for(requested: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend of a call, "triton" or "reference". A fallback is logged once; a named backend never falls back.

    Raises ValueError if `requested` is "triton" and the kernels cannot take the call.
    """
    if requested == "reference":
        return "reference"
    if requested == "auto" and device.type == "cpu":
        return "reference"
    reason = why_not_triton(device, dtypes)
    if reason is None:
        return "triton"
    if requested == "triton":
        raise ValueError(f'options(backend="triton"): {reason}; expected a GPU that the kernels are built for')
    log_once(f"dora_kernels uses the reference: {reason}")
    return "reference"


def dot_precision(facts: DeviceFacts, operand: torch.dtype, weight: torch.dtype) -> str:
    """`input_precision` of tl.dot for low-rank operands of dtype `operand` over a weight of dtype `weight`.

    Obeys torch.set_float32_matmul_precision. Over a half-precision weight "highest" is bf16x6: six bf16 tensor-core
    products, as exact as IEEE float32, which would not run on the tensor cores.
    """
    if operand != torch.float32 or facts.target.startswith("gfx"):
        return "ieee"
    highest = torch.get_float32_matmul_precision() == "highest"
    if weight != torch.float32:
        return "bf16x6" if highest else "bf16x3"
    return "ieee" if highest or facts.target == "interpreter" else "tf32x3"
