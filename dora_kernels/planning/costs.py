"""The cost model: what each step of a pass moves, multiplies and launches, and how long a device takes for it.

Four things limit a step: device memory, the L2 cache, from which the multiprocessors read an adapter's tiles again and
again, the FLOPs, and the gap before its launch. Tile sizes are those of configs.py. Every constant, those of `DEVICES`
too, is a prediction unless a comment says otherwise; `python -m bench.studies.fit` fits them to measurements.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dora_kernels.planning import configs
from dora_kernels.planning.configs import ceil_div
from dora_kernels.planning.devices import DeviceFacts
from dora_kernels.planning.tiles import GEMMS, Config
from dora_kernels.quant import Weight


@dataclass(frozen=True, eq=False)  # known by identity: the planner's caches look it up in 0.1 us and not in 1
class Device:
    """The constants of a device.

    bandwidth: of a copy in device memory, in bytes/s. matmul, matmul_float32: GEMMs in FLOP/s. launch: the gap before
    a kernel, in s. l2: bytes/s from the L2 cache to all multiprocessors, infinite on a CPU. skinny: the share of the
    bandwidth that the GEMM library reaches in products of a rank below SKINNY_RANK: whether our kernels make them hangs
    on it, and a measurement is entered here. side: bytes/s of the few multiprocessors beside a GEMM of ours.
    """

    facts: DeviceFacts
    bandwidth: float
    matmul: float
    matmul_float32: float
    launch: float
    l2: float
    skinny: float = 0.6
    side: float = 0.36e12


# 790 TFLOP/s is a published cuBLAS measurement on random data; 4 us is the gap between two kernels on the device, not
# the host's time for a launch (about 12 us, hidden from M of about 2500 on). Copies: 4.3 TB/s published for an H200,
# 3.0 for an H100 SXM, whose HBM3 has 3.35 by its data sheet where the H200's HBM3e has 4.8. L2: public GEMMs of 780
# TFLOP/s without multicast read 8 TB/s from it, 54% of 64 bytes a clock for each of 132 multiprocessors at 1.755 GHz.
# An A100 and a B200 are taken to reach the same share, an RTX 5090 and an MI300X half of it: an RTX 4090 is said to
# read 5 TB/s, a quarter of its multiprocessors' 64 bytes a clock. Four of a Hopper's beside a GEMM are taken to reach
# 0.36 TB/s, 80% of those 64 bytes; no other card has such a GEMM.
_H200 = Device(DeviceFacts("NVIDIA H200", "sm_90", 132), 4.3e12, 790e12, 50e12, 4e-6, 8e12)
_H100 = Device(DeviceFacts("NVIDIA H100 80GB HBM3", "sm_90", 132), 3.0e12, 790e12, 50e12, 4e-6, 8e12)
# by the name that the driver gives a card, and for all other cards by target (devices.py)
DEVICES = {
    "NVIDIA H200": _H200,
    "NVIDIA H100 80GB HBM3": _H100,
    "sm_80": Device(DeviceFacts("", "sm_80", 108), 1.5e12, 250e12, 18e12, 4e-6, 5e12),
    "sm_90": _H200,
    "sm_100": Device(DeviceFacts("", "sm_100", 148), 6.5e12, 1500e12, 60e12, 4e-6, 10e12),
    "sm_120": Device(DeviceFacts("", "sm_120", 170), 1.5e12, 350e12, 80e12, 4e-6, 7e12),
    "gfx942": Device(DeviceFacts("", "gfx942", 304), 4.0e12, 600e12, 100e12, 8e-6, 11e12),
    # two cores of a current server; torch's own dispatch is the launch
    "cpu": Device(DeviceFacts("cpu", "interpreter", 2), 20e9, 150e9, 150e9, 5e-6, math.inf),
}


def device_model(facts: DeviceFacts) -> Device:
    """The constants of a card by its name, else by its target; the H200's for a GPU that is not listed."""
    return DEVICES.get(facts.name) or DEVICES.get(facts.target, _H200)


class Shape(NamedTuple):
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


# Shares of the copy bandwidth. STREAMED: kernels that walk with every load on its way before its use, over ranges that
# end at the same time. PROJECTED: the projections, in whole blocks of rows, or in parts that are summed.
STREAMED, PROJECTED = 0.93, 0.88
# Shares of the matmul rate. Between two products the tensor cores wait while the same warps square, scale or store the
# last tile: the norm and the merged weight at R = 384 have 24 products among 456 instructions of a tile, the epilogue
# and the sums over the tokens do more beside theirs, and the projections wait for each 64 or 128 columns.
MERGING, SUMMING = 0.75, 0.6
# cuBLAS reaches 40-70% of its roof on skinny GEMMs up to SKINNY_RANK (Device.skinny), and from there on the bandwidth
# of our own projections and SKINNY_MATMUL of its FLOPs: 384 columns are 1.5 of its tiles' 256.
SKINNY_RANK = 128
SKINNY_MATMUL = 0.7
# A base GEMM's tiles fill rounds of all multiprocessors but the last; where they are few, the library takes smaller
# tiles, or splits K, and reads 1.33 times as much for each FLOP.
GEMM_TILE = 128 * 256
FEW_TILES = 0.82
# Our GEMM on Hopper, over the library's rate. Published of its kind on an H100: 99% of cuBLAS at K = 4096 and 101% at
# 16384 without warp specialization (Triton's Gluon tutorial on persistent matmuls), 97.5% at 8192 without clusters
# (https://github.com/pranjalssh/fast.cu). A second output has the tensor cores wait 1.5 to 2.5% of a tile at K = 4096.
OWN_GEMM, SECOND_OUTPUT = 0.98, 0.98
# The part of the second longest of a step's times that the longest does not hide, where both are equal.
UNHIDDEN = 0.25


class Cost(NamedTuple):
    """One kernel, GEMM or elementwise pass: elements moved, FLOPs, launches, elements read of the stored weight.

    again: elements that are read from memory a second time and more often. l2: elements that the multiprocessors read
    through the L2 cache, beside the stored weight; writes have a way of their own. 0 for the library's GEMMs, whose
    tiles are larger and shared among multiprocessors. copy, dots: the shares of the device's bandwidth and matmul rate
    that the step reaches. filled: of the multiprocessors at work.
    """

    elements: float
    flops: float
    launches: int = 1
    stored: float = 0
    again: float = 0
    l2: float = 0
    copy: float = 1.0
    dots: float = 1.0
    filled: float = 1.0

    def bytes(self, shape: Shape) -> float:
        """The bytes moved in device memory."""
        return (self.elements + self.again) * shape.itemsize + self.stored * (shape.packed or shape.itemsize)

    def bytes_through_l2(self, shape: Shape) -> float:
        """The bytes that the multiprocessors read."""
        return self.l2 * shape.itemsize + self.stored * (shape.packed or shape.itemsize)

    def seconds(self, shape: Shape, device: Device) -> float:
        """The longest of the times of memory, L2 cache and FLOPs, what it leaves of the next, and the launches."""
        rate = device.matmul if shape.itemsize == 2 else device.matmul_float32
        # the shares are those of a GPU's kernels: on a CPU the steps are PyTorch's
        on_cpu = device.facts.name == "cpu"
        copy, dots, filled = (1.0, 1.0, 1.0) if on_cpu else (self.copy, self.dots, self.filled)
        memory = self.bytes(shape) / (device.bandwidth * copy)
        _, second, longest = sorted((memory, self.bytes_through_l2(shape) / device.l2, self.flops / (rate * dots)))
        if longest > 0:
            longest += UNHIDDEN * second * (second / longest) ** 3
        return longest / filled + self.launches * device.launch


def gemm(m: int, n: int, k: int, device: Device) -> Cost:
    """The cost of (m, k) @ (k, n) by the GEMM library, none of the three skinny."""
    multiprocessors = device.facts.multiprocessors
    tiles = max(m * n / GEMM_TILE, 1)
    full = tiles / (multiprocessors * math.ceil(tiles / multiprocessors))
    return Cost(m * k + k * n + m * n, 2 * m * n * k, dots=max(FEW_TILES, full))


def own_gemm(m: int, n: int, k: int, R: int, device: Device, outputs: int = 1, free: int = 0) -> Cost:
    """The cost of (m, k) @ (k, n) and a product of rank R by one GEMM of ours, which leaves multiprocessors free."""
    tile, multiprocessors = GEMMS["sm_90"]["forward"], device.facts.multiprocessors
    tiles = max(ceil_div(m, tile.BLOCK_M) * ceil_div(n, tile.BLOCK_N), 1)
    columns = tile.BLOCK_K * (ceil_div(k, tile.BLOCK_K) + ceil_div(R, tile.BLOCK_K))
    full = tiles / (multiprocessors * ceil_div(tiles, multiprocessors - free))
    elements = m * k + k * n + R * (m + n) + outputs * m * n
    flops = 2 * tiles * tile.BLOCK_M * tile.BLOCK_N * columns
    return Cost(elements, flops, dots=OWN_GEMM * SECOND_OUTPUT ** (outputs - 1) * full)


def skinny_gemm(elements: float, flops: float, R: int, device: Device) -> Cost:
    """The cost of a product of rank R by the GEMM library that moves so many elements."""
    return Cost(elements, flops, copy=device.skinny if R < SKINNY_RANK else PROJECTED, dots=SKINNY_MATMUL)


def config_of(kernel: str, shape: Shape, device: Device, R: int = 0) -> Config:
    """The configuration of the kernel on the device; given a high rank R, the one that it has for those."""
    operand = torch.bfloat16 if shape.itemsize == 2 else torch.float32
    name = kernel if R <= configs.HIGH_RANK else f"{kernel}_high_rank"
    return configs.config_for(name, device.facts, operand)


def walk_reads(kernel: str, shape: Shape, device: Device, out_bytes: int) -> float:
    """The elements of lora_A (of low) and lora_B read for each element of the weight (of base) by a kernel that walks.

    The one comes with every tile; lora_B is read once for a whole walk where it fits in shared memory, and else with
    every tile, too.
    """
    R, tile = shape.R, config_of(kernel, shape, device, shape.R)
    walked = tile.BLOCK_K or tile.BLOCK_M
    assert tile.BLOCK_N is not None and walked is not None
    operand_bytes, streamed_bytes = min(shape.itemsize, 4), shape.itemsize
    if shape.packed and kernel != "epilogue":
        streamed_bytes, out_bytes = configs.bytes_of_quantized(out_bytes)
    _, chunks = configs.with_lora_B_resident(tile, R, operand_bytes, streamed_bytes, out_bytes, device.facts.target)
    return R / tile.BLOCK_N + (0 if chunks else R / walked)


def dense_costs(shape: Shape) -> dict[str, Cost]:
    """The cost of decoding a quantized weight into a dense temporary, before a product with the weight itself."""
    elements = shape.N * shape.K
    return {"dense": Cost(elements, 0, stored=elements, copy=STREAMED)} if shape.packed else {}


def norm_cost(shape: Shape, device: Device) -> Cost:
    """The cost of the norm: one read of the weight."""
    elements = shape.N * shape.K
    l2 = elements * walk_reads("norm", shape, device, out_bytes=0)
    return Cost(0, 2 * elements * shape.R, stored=elements, l2=l2, copy=STREAMED, dots=MERGING)


def merge_cost(shape: Shape, device: Device) -> Cost:
    """The cost of the merged weight: one read of the weight and one write."""
    elements = shape.N * shape.K
    l2 = elements * walk_reads("merge", shape, device, shape.itemsize)
    return Cost(elements, 2 * elements * shape.R, stored=elements, l2=l2, copy=STREAMED, dots=MERGING)


def epilogue_cost(shape: Shape, device: Device) -> Cost:
    """The cost of the epilogue: one read of base and one write of y."""
    elements = shape.M * shape.N
    l2 = elements * (1 + walk_reads("epilogue", shape, device, shape.itemsize))
    return Cost(2 * elements, 2 * elements * shape.R, l2=l2, copy=STREAMED, dots=SUMMING)


def project_costs(shape: Shape, product: str, device: Device) -> dict[str, dict[str, Cost]]:
    """The costs of low, or of P, by our kernel and by the GEMM library.

    A block of low is one program's: the forward pass has no counters to finish parts of a sum with.
    """
    M, R = shape.M, shape.R
    elements = M * (shape.K if product == "low" else shape.N)
    tile = config_of("low" if product == "low" else "project", shape, device)
    assert tile.BLOCK_M is not None
    blocks, again, chunks = chunk_reads(R, tile, ceil_div(M, tile.BLOCK_M), device)
    at_once = device.facts.multiprocessors
    filled = blocks / (at_once * ceil_div(blocks, at_once)) if product == "low" else 1.0
    flops, l2 = 2 * elements * R, elements * (chunks + R / tile.BLOCK_M)
    ours = Cost(elements, flops, again=again * elements, l2=l2, copy=PROJECTED, dots=SUMMING, filled=filled)
    return {"kernel": {product: ours}, "library": {product: skinny_gemm(elements, flops, R, device)}}


def outer_costs(shape: Shape, product: str, device: Device) -> dict[str, dict[str, Cost]]:
    """The costs of a product summed over the tokens, dA, or dB with the sums beside it, by our kernel and the library.

    Our kernel makes dB of the dy that it reads for the sums of dy * base; the library reads dy for itself.
    """
    R, tile = shape.R, config_of("token_sums", shape, device)
    columns = shape.N if product == "dB" else shape.K
    elements = shape.M * columns
    assert tile.BLOCK_N is not None
    _, again, chunks = chunk_reads(R, tile, ceil_div(columns, tile.BLOCK_N), device)
    flops, l2 = 2 * elements * R, elements * (chunks + R / tile.BLOCK_N)
    ours = Cost(elements, flops, again=again * elements, l2=l2, copy=STREAMED, dots=SUMMING)
    library = {product: skinny_gemm(elements, flops, R, device)}
    if product == "dA":
        return {"kernel": {"dA": ours}, "library": library}
    ours = ours._replace(elements=2 * elements, l2=l2 + elements)
    sums = Cost(2 * elements, 0, l2=2 * elements, copy=STREAMED)
    return {"kernel": {"token_sums": ours}, "library": library | {"token_sums": sums}}


def chunk_reads(R: int, tile: Config, blocks: int, device: Device) -> tuple[int, float, int]:
    """(blocks, again, chunks): so many times blocks of all chunks of R are read from memory again, and by L2 in all.

    Blocks that differ in their chunk alone follow one another: those that run at the same time share a read from
    memory, those that one program makes one after the other do not.
    """
    chunks = max(1, ceil_div(R, tile.tiles(R)["BLOCK_R"]))
    blocks = max(1, blocks) * chunks
    at_once = device.facts.multiprocessors * tile.waves
    return blocks, min(chunks, max(1.0, blocks / at_once)) - 1, chunks


def seconds(costs: dict[str, Cost], shape: Shape, device: Device) -> float:
    """The time of the steps one after another."""
    return sum(cost.seconds(shape, device) for cost in costs.values())


def fastest(ways: dict[str, dict[str, Cost]], shape: Shape, device: Device) -> str:
    """The name of the way whose steps take the least time; the first one in a tie."""
    return min(ways, key=lambda name: seconds(ways[name], shape, device))


def faster_project(shape: Shape, product: str, device: Device) -> str:
    """ "kernel" or "library" for low, or for P; low by whole blocks only where these fill the device."""
    ways = project_costs(shape, product, device)
    return "library" if ways["kernel"][product].filled < configs.FILLED else fastest(ways, shape, device)


def forward_costs(shape: Shape, way: str, device: Device, norm_given: bool = False) -> dict[str, Cost]:
    """The costs of the steps of one forward pass, by name; of the fused way on Hopper, with z kept."""
    M, N, K, R = shape[:4]
    costs: dict[str, Cost] = {} if norm_given else {"norm": norm_cost(shape, device)}
    if way == "merged":
        return costs | {"merge": merge_cost(shape, device), "y": gemm(M, N, K, device)}
    low = project_costs(shape, "low", device)[faster_project(shape, "low", device)]
    if way == "fused":
        return costs | low | dense_costs(shape) | {"fused": own_gemm(M, N, K, R, device, outputs=2)}
    return costs | low | dense_costs(shape) | {"base": gemm(M, N, K, device), "epilogue": epilogue_cost(shape, device)}


def merged_forward_costs(shape: Shape, device: Device) -> dict[str, Cost]:
    """The costs of a forward pass the merged way that keeps z and low for the backward pass, whoever makes the norm.

    weight + scaling * lora_B @ lora_A and its row norms are one pass over the weight; the epilogue has no low rank.
    """
    low = project_costs(shape, "low", device)[faster_project(shape, "low", device)]
    z, epilogue = gemm(shape.M, shape.N, shape.K, device), epilogue_cost(shape._replace(R=0), device)
    return low | {"merge": merge_cost(shape, device), "z": z, "epilogue": epilogue}


def dx_costs(shape: Shape, way: str, device: Device) -> dict[str, Cost]:
    """The costs of the steps that make dx; P = dy @ (gain * lora_B) is made for dA in any case."""
    M, N, K, R = shape[:4]
    if way == "merged":
        return {"merge": merge_cost(shape, device), "dx": gemm(M, K, N, device)}
    # dz costs one write: the kernel that sums dy over the tokens has it in registers. What the merged weight's kernel
    # would have prepared, gain * lora_B and the counters, takes a launch of its own
    costs = {"prepare": Cost(2 * N * R, 0), "dz": Cost(M * N, 0, launches=0, copy=STREAMED)} | dense_costs(shape)
    return costs | {"dx": gemm(M, K, N, device), "addmm": skinny_gemm(2 * M * K, 2 * M * K * R, R, device)}


def sum_costs(shape: Shape, device: Device, by: str = "") -> dict[str, dict[str, Cost]]:
    """The costs of P and of the sums over the tokens by the step that makes them, with whatever is faster.

    by: "kernel" where our kernels are to make all of them.
    """
    P, dB, dA = project_costs(shape, "P", device), outer_costs(shape, "dB", device), outer_costs(shape, "dA", device)
    return {
        "project": P[by or faster_project(shape, "P", device)],
        "token_sums": dB[by or fastest(dB, shape, device)],
        "outer_product": dA[by or fastest(dA, shape, device)],
    }


def backward_costs(shape: Shape, dx: str, device: Device) -> dict[str, Cost]:
    """The costs of a backward pass in which every gradient is wanted, of adapters in the dtype of the base GEMM."""
    costs: dict[str, Cost] = {}
    for step in sum_costs(shape, device).values():
        costs |= step
    return costs | dx_costs(shape, dx, device)
