"""The planner: the cost model of costs.py chooses the way, by shape and device alone, or what was measured.

split:  base = x @ weight.T by cuBLAS, then one epilogue kernel adds the low-rank part and applies the gain.
merged: the merged weight W' = gain * (weight + scaling * lora_B @ lora_A) is built for one GEMM and dropped.
fused:  one GEMM has base and the low-rank part in it, and the sums over the tokens run beside that of dx. It is taken
        by name, and where it has won on this GPU (measured.py).

And the low-rank products go to our kernels or to the GEMM library. A choice is worked out once for each shape.
"""

import functools
from typing import TypedDict

import torch

from dora_kernels.planning import costs, measured, side_costs
from dora_kernels.planning.costs import DEVICES, Device, Shape, device_model
from dora_kernels.planning.devices import DeviceFacts
from dora_kernels.planning.measured import BESIDE, NOTHING, Table

# Choices of so many shapes are kept: M varies, and the results of a long run must not fill the memory.
KEPT = 4096


def forward_way(
    asked: str,
    norm_given: bool,
    shape: Shape,
    device: Device,
    table: Table = NOTHING,
    *,
    needs_base: bool,
    adapters_are_wider: bool,
) -> str:
    """ "split", "merged" or "fused" for a forward pass that saves nothing; one that does goes as `saved_tensor` says.

    table: what was measured on the device. needs_base, adapters_are_wider: as there.
    """
    if needs_base:
        return "split"
    if asked != "auto":
        return asked
    if adapters_are_wider or (device is DEVICES["cpu"] and shape.itemsize == 2):
        return "split"
    if device is DEVICES["cpu"] and not norm_given:
        # pytorch.py makes weight + scaling * B @ A for the norm anyway, block by block, in float32: merging it is
        # nearly free where it needs no conversion
        return "merged"
    return _faster_forward(shape, device, norm_given, table)


@functools.lru_cache(KEPT)
def _faster_forward(shape: Shape, device: Device, norm_given: bool, table: Table) -> str:
    ways = {way: costs.forward_costs(shape, way, device, norm_given) for way in ("split", "merged")}
    faster = costs.fastest(ways, shape, device)
    if shape.itemsize != 2:
        return faster
    # with the norm in all times; without it a way that has won has won by a larger share
    return measured.fastest(table.entries, "inference", shape[1:4], faster, shape.M)


def dx_way(asked: str, shape: Shape, device: Device) -> str:
    """ "merged" where dx is made through W' rebuilt with the known gain, "dz" where through gain * dy."""
    if asked != "auto":
        return "dz" if asked == "split" else "merged"
    if device is DEVICES["cpu"] and shape.itemsize == 2:
        # measured on two cores, R 8 to 64: W' costs 1.0 to 2.0 ns an element, dz 0.3 and the sum onto dx 0.3 to 0.7
        M, N, K = shape.M, shape.N, shape.K
        return "dz" if M * (N + K) <= 4 * N * K else "merged"
    return _faster_dx(shape, device)


@functools.lru_cache(KEPT)
def _faster_dx(shape: Shape, device: Device) -> str:
    return costs.fastest({way: costs.dx_costs(shape, way, device) for way in ("merged", "dz")}, shape, device)


def beside(
    asked: str, shape: Shape, device: Device, table: Table = NOTHING, *, adapters_are_wider: bool = False
) -> tuple[str, ...]:
    """The steps that run beside dx through W', one of BESIDE: those that have won on this GPU.

    The fused way takes what the cost model finds fastest, where nothing was measured.
    """
    if asked in ("split", "merged") or shape.itemsize != 2 or adapters_are_wider:
        return ()
    return BESIDE[_faster_beside(asked == "fused", shape, device, table)]


@functools.lru_cache(KEPT)
def _faster_beside(named: bool, shape: Shape, device: Device, table: Table) -> str:
    faster = side_costs.fastest_beside(shape, device) if named else "none"
    return measured.fastest(table.entries, "backward", shape[1:4], faster, shape.M)


class Asks(TypedDict):
    """The keywords of the planner's questions about a forward pass; `saved_tensor` says what they mean."""

    needs_base: bool
    adapters_are_wider: bool


def asks(exact: bool, dropped: bool, dtype: torch.dtype, base_dtype: torch.dtype) -> Asks:
    """The keywords for a call with these choices: dtype is that of the low-rank product."""
    return {"needs_base": exact or dropped, "adapters_are_wider": dtype != base_dtype}


INTERMEDIATES = ("base", "z_gemm", "z_merged")


def intermediate(
    way: str, dtype: torch.dtype, backend: str, device: torch.device, *, needs_base: bool, adapters_are_wider: bool
) -> str:
    """The (M, N) tensor that a forward pass makes before y, one of INTERMEDIATES.

        "base"      x @ weight.T, to which the epilogue adds the low-rank term
        "z_gemm"    z = base + scaling * low @ lora_B.T, by one GEMM for both terms
        "z_merged"  z, by the GEMM with the merged weight

    z_gemm is for the fused way, and for the PyTorch steps on a CPU in bfloat16: the GEMM is twice as fast there as the
    epilogue in float32, more with AMX. The low-rank term is rounded there, so adapters that are wider or may not be
    rounded do without.

    backend: as asked for; on a CPU none but "triton" takes the kernels. The rest as in `saved_tensor`.
    """
    if way == "merged":
        return "z_merged"
    if way == "fused":
        return "base" if needs_base or adapters_are_wider else "z_gemm"
    in_pytorch_on_cpu = device.type == "cpu" and backend != "triton"
    by_gemm = in_pytorch_on_cpu and dtype == torch.bfloat16 and not needs_base and not adapters_are_wider
    return "z_gemm" if by_gemm else "base"


def saved_tensor(
    asked: str,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    sizes: tuple[int, int, int],
    *,
    needs_base: bool,
    adapters_are_wider: bool,
) -> str:
    """The `intermediate` that a forward pass makes, and saves for dmagnitude.

    Does not see the number of tokens, so that a training step's numerics do not change with it.

    dtype: of the base GEMM. sizes: N, K and R. needs_base: dropout needs both x and dropout(x) times the weight, and
    precision="exact" an unrounded base. adapters_are_wider: their dtype is wider than the base GEMM's (float32 over
    bfloat16). A merged weight would round them: against PyTorch in the same dtypes the error is 1.29 times as large in
    y and 1.68 in dmagnitude, split 1.00. Half precision saves base, where no other way has won on this GPU at sizes
    near these: a GPU's epilogue reads it once anyway, and on a CPU split took 0.91 of merged's time for a step. float32
    merges: rounding the merged weight costs 6e-8 there.
    """
    if needs_base:
        way = "split"
    elif asked != "auto":
        way = asked
    elif adapters_are_wider:
        way = "split"
    elif dtype.itemsize == 2:
        way = measured.fastest(measured.entries_on(device, backend), "forward", sizes, "split")
    else:
        way = "merged"
    return intermediate(way, dtype, backend, device, needs_base=needs_base, adapters_are_wider=adapters_are_wider)


def project_by_kernel(
    M: int, K: int, R: int, itemsize: int, facts: DeviceFacts, *, same_dtype: bool, counted: bool
) -> bool:
    """True if the Triton kernel computes rows (M, K) @ factor (R, K).T, False if the GEMM library does.

    itemsize: of the rows. same_dtype: rows and factor have one; else the library would need one of them cast. counted:
    there are zeroed counters with which a sum over K is finished (P), so that it may be cut; else (low) the kernel has
    whole blocks of rows, and is taken where these fill the device.
    """
    return not same_dtype or _faster_project(M, K, R, itemsize, _device_of_kernels(facts), counted) == "kernel"


def outer_by_kernel(
    M: int, K: int, R: int, itemsize: int, facts: DeviceFacts, *, same_dtype: bool, beside: bool
) -> bool:
    """True if the Triton kernel computes left (M, R).T @ right (M, K), summed over the tokens: dA or dB.

    itemsize: of right. same_dtype: as in `project_by_kernel`. beside: the kernel reads right for other sums in any
    case, as for dB.
    """
    return not same_dtype or _faster_outer(M, K, R, itemsize, _device_of_kernels(facts), beside) == "kernel"


def _device_of_kernels(facts: DeviceFacts) -> Device:
    """The device that a launcher chooses for: in the interpreter, whose time is of no account, an H200."""
    return device_model(facts) if facts.name != "cpu" else DEVICES["NVIDIA H200"]


@functools.lru_cache(KEPT)
def _faster_project(M: int, K: int, R: int, itemsize: int, device: Device, counted: bool) -> str:
    return costs.faster_project(Shape(M, K, K, R, itemsize), "P" if counted else "low", device)


@functools.lru_cache(KEPT)
def _faster_outer(M: int, K: int, R: int, itemsize: int, device: Device, beside: bool) -> str:
    shape = Shape(M, K, K, R, itemsize)
    return costs.fastest(costs.outer_costs(shape, "dB" if beside else "dA", device), shape, device)
