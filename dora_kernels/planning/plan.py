"""The planner: a cost model of bytes, FLOPs and launches chooses the way, by shape and device alone.

split:  base = x @ weight.T by cuBLAS, then one epilogue kernel adds the low-rank part and applies the gain.
merged: the merged weight W' = gain * (weight + scaling * lora_B @ lora_A) is built for one GEMM and dropped.

The constants of `DEVICES` are predictions unless a comment says otherwise. They only rank two ways of computing the
same thing, so what matters is the ratio of bandwidth to FLOPs to launch cost.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict

import torch

from dora_kernels.quant import Weight


@dataclass(frozen=True)
class Device:
    """The constants of a device: bandwidth in bytes/s, half-precision and float32 GEMMs in FLOP/s, a launch in s."""

    bandwidth: float
    matmul: float
    matmul_float32: float
    launch: float


# 790 TFLOP/s is a published cuBLAS measurement on random data; 4 us is the gap between two kernels on the device, not
# the host's time for a launch (about 17 us, hidden from M of about 2000 on). Copies: 4.3 TB/s published for an H200,
# 3.0 for an H100 SXM, whose HBM3 has 3.35 by its data sheet where the H200's HBM3e has 4.8.
_H200 = Device(bandwidth=4.3e12, matmul=790e12, matmul_float32=50e12, launch=4e-6)
_H100 = replace(_H200, bandwidth=3.0e12)
# by the name that the driver gives a card, and for all other cards by target (devices.py)
DEVICES = {
    "NVIDIA H200": _H200,
    "NVIDIA H100 80GB HBM3": _H100,
    "sm_80": Device(bandwidth=1.5e12, matmul=250e12, matmul_float32=18e12, launch=4e-6),
    "sm_90": _H200,
    "sm_100": Device(bandwidth=6.5e12, matmul=1500e12, matmul_float32=60e12, launch=4e-6),
    "sm_120": Device(bandwidth=1.5e12, matmul=350e12, matmul_float32=80e12, launch=4e-6),
    "gfx942": Device(bandwidth=4.0e12, matmul=600e12, matmul_float32=100e12, launch=8e-6),
    # two cores of a current server; torch's own dispatch is the launch
    "cpu": Device(bandwidth=20e9, matmul=150e9, matmul_float32=150e9, launch=5e-6),
}


class Named(Protocol):
    """The part of devices.DeviceFacts that the planner looks at."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> str: ...


def device_model(facts: Named) -> Device:
    """The constants of a card by its name, else by its target; the H200's for a GPU that is not listed."""
    return DEVICES.get(facts.name) or DEVICES.get(facts.target, _H200)


@dataclass(frozen=True)
class Shape:
    """The sizes of one call: M tokens, N out features, K in features, rank R.

    itemsize: bytes of an element of the base GEMM. packed: bytes of an element of a quantized weight, scales and all; 0
    for a dense one.
    """

    M: int
    N: int
    K: int
    R: int
    itemsize: int
    packed: float = 0.0

    @classmethod
    def of(cls, rows: torch.Tensor, weight: Weight, lora_A: torch.Tensor) -> "Shape":
        """The shape of a call with `rows` (M, ...) of x or dy."""
        N, K = weight.shape
        packed = 0.0 if isinstance(weight, torch.Tensor) else weight.nbytes / max(N * K, 1)
        return cls(rows.shape[0], N, K, lora_A.shape[0], rows.itemsize, packed)


@dataclass(frozen=True)
class Cost:
    """One kernel, GEMM or elementwise pass: elements moved, FLOPs, launches, elements read of the stored weight."""

    elements: float
    flops: float
    launches: int = 1
    stored: float = 0

    def bytes(self, shape: Shape) -> float:
        """The bytes moved."""
        return self.elements * shape.itemsize + self.stored * (shape.packed or shape.itemsize)

    def seconds(self, shape: Shape, device: Device) -> float:
        """The larger of the time to move the bytes and to do the FLOPs, plus the launches."""
        rate = device.matmul if shape.itemsize == 2 else device.matmul_float32
        work = max(self.bytes(shape) / device.bandwidth, self.flops / rate)
        return work + self.launches * device.launch


def gemm(m: int, n: int, k: int) -> Cost:
    """The cost of (m, k) @ (k, n)."""
    return Cost(m * k + k * n + m * n, 2 * m * n * k)


def dense_costs(shape: Shape) -> dict[str, Cost]:
    """The cost of decoding a quantized weight into a dense temporary, before a product with the weight itself."""
    elements = shape.N * shape.K
    return {"dense": Cost(elements, 0, stored=elements)} if shape.packed else {}


def forward_costs(shape: Shape, way: str, norm_given: bool = False) -> dict[str, Cost]:
    """The costs of the steps of one forward pass, by name."""
    M, N, K, R = shape.M, shape.N, shape.K, shape.R
    costs = {} if norm_given else {"norm": Cost(0, 2 * N * K * R, launches=2, stored=N * K)}
    if way == "split":
        low = Cost(M * K, 2 * M * K * R)
        costs |= dense_costs(shape) | {"base": gemm(M, N, K), "low": low}
        return costs | {"epilogue": Cost(2 * M * N, 2 * M * N * R)}
    return costs | {"merge": Cost(N * K, 2 * N * K * R, stored=N * K), "y": gemm(M, N, K)}


def dx_costs(shape: Shape, way: str) -> dict[str, Cost]:
    """The costs of the steps that make dx; P = dy @ (gain * lora_B) is made for dA in any case."""
    M, N, K, R = shape.M, shape.N, shape.K, shape.R
    if way == "merged":
        return {"merge": Cost(N * K, 2 * N * K * R, stored=N * K), "dx": gemm(M, K, N)}
    # dz costs one write: the kernel that sums dy over the tokens has it in registers
    costs = dense_costs(shape) | {"dz": Cost(M * N, 0, launches=0), "dx": gemm(M, K, N)}
    return costs | {"addmm": Cost(2 * M * K, 2 * M * K * R)}


def backward_costs(shape: Shape, dx: str) -> dict[str, Cost]:
    """The costs of a backward pass in which every gradient is wanted, of adapters in the dtype of the base GEMM."""
    M, N, K, R = shape.M, shape.N, shape.K, shape.R
    # a sum that is split to fill the device takes a second launch, to finish it; so does P's, up to some 8000 tokens.
    # The GEMM library needs lora_B scaled and rounded first, and makes dA in one launch
    P_launches = 2 if project_by_kernel(R, scaled=True, same_dtype=True) else 3
    by_kernel = outer_by_kernel(R, same_dtype=True)
    costs = {
        "P": Cost(M * N, 2 * M * N * R, launches=P_launches),
        "dA": Cost(M * K, 2 * M * K * R, launches=2 if by_kernel else 1),
    }
    if by_kernel:
        costs["token_sums"] = Cost(2 * M * N, 2 * M * N * R, launches=2)
    else:  # dB by the GEMM library, which reads dy for itself
        costs |= {"dB": Cost(M * N, 2 * M * N * R), "token_sums": Cost(2 * M * N, 0, launches=2)}
    return costs | dx_costs(shape, dx)


def seconds(costs: dict[str, Cost], shape: Shape, device: Device) -> float:
    """The time of the steps one after another."""
    return sum(cost.seconds(shape, device) for cost in costs.values())


def _faster(
    costs_of: Callable[[Shape, str], dict[str, Cost]], shape: Shape, device: Device, names: tuple[str, str]
) -> str:
    """The name whose steps take less time; the first one in a tie."""
    return min(names, key=lambda name: seconds(costs_of(shape, name), shape, device))


def forward_way(
    asked: str, norm_given: bool, shape: Shape, device: Device, *, needs_base: bool, adapters_are_wider: bool
) -> str:
    """ "split" or "merged" for a forward pass that saves nothing; one that does goes as `saved_tensor` says.

    needs_base, adapters_are_wider: as there.
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
    return _faster(lambda s, way: forward_costs(s, way, norm_given), shape, device, ("split", "merged"))


def dx_way(asked: str, shape: Shape, device: Device) -> str:
    """ "merged" where dx is made through W' rebuilt with the known gain, "dz" where through gain * dy."""
    if asked != "auto":
        return "merged" if asked == "merged" else "dz"
    if device is DEVICES["cpu"] and shape.itemsize == 2:
        # measured on two cores, R 8 to 64: W' costs 1.0 to 2.0 ns an element, dz 0.3 and the sum onto dx 0.3 to 0.7
        M, N, K = shape.M, shape.N, shape.K
        return "dz" if M * (N + K) <= 4 * N * K else "merged"
    return _faster(dx_costs, shape, device, ("merged", "dz"))


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
        "z_gemm"    z = base + scaling * low @ lora_B.T, by a GEMM that adds base onto the low-rank term
        "z_merged"  z, by the GEMM with the merged weight

    z_gemm is for the PyTorch steps on a CPU in bfloat16: the GEMM is twice as fast there as the epilogue in float32,
    more with AMX. The low-rank term is rounded, so adapters that are wider or may not be rounded do without.

    backend: as asked for; on a CPU none but "triton" takes the kernels. The rest as in `saved_tensor`.
    """
    if way == "merged":
        return "z_merged"
    in_pytorch_on_cpu = device.type == "cpu" and backend != "triton"
    by_gemm = in_pytorch_on_cpu and dtype == torch.bfloat16 and not needs_base and not adapters_are_wider
    return "z_gemm" if by_gemm else "base"


def saved_tensor(
    asked: str, dtype: torch.dtype, backend: str, device: torch.device, *, needs_base: bool, adapters_are_wider: bool
) -> str:
    """The `intermediate` that a forward pass makes, and saves for dmagnitude.

    Does not see the number of tokens, so that a training step's numerics do not change with it.

    dtype: of the base GEMM. needs_base: dropout needs both x and dropout(x) times the weight, and precision="exact" an
    unrounded base. adapters_are_wider: their dtype is wider than the base GEMM's (float32 over bfloat16). A merged
    weight would round them: against PyTorch in the same dtypes the error is 1.29 times as large in y and 1.68 in
    dmagnitude, split 1.00. Half precision saves base: on a GPU the epilogue reads it once anyway, and on a CPU split
    took 0.91 of merged's time for a step. float32 merges: rounding the merged weight costs 6e-8 there.
    """
    if needs_base:
        way = "split"
    elif asked != "auto":
        way = asked
    else:
        way = "split" if adapters_are_wider or dtype.itemsize == 2 else "merged"
    return intermediate(way, dtype, backend, device, needs_base=needs_base, adapters_are_wider=adapters_are_wider)


# cuBLAS reaches 40-70% of its roof on skinny GEMMs up to this rank, and its own speed from here on (a prediction from
# published figures, to be measured per shape).
SKINNY_RANK = 128


def project_by_kernel(R: int, scaled: bool, same_dtype: bool) -> bool:
    """True if the Triton kernel computes rows @ (factor * scale).T: it folds a scale in and mixes dtypes."""
    return not same_dtype or (scaled and R < SKINNY_RANK)


def outer_by_kernel(R: int, same_dtype: bool) -> bool:
    """True if the Triton kernel computes a product summed over the tokens, dA or dB.

    For dB the kernel needs no read of dy beyond that of the other sums, but one from the L2 cache for every 64 of R: at
    8192 x 14336, R = 384, a prediction of 470 us for all of them, against 160 in the library and 120 for the others.
    """
    return not same_dtype or R < SKINNY_RANK
