"""The specialisations that Triton's JIT would compile for a call of the public functions; no GPU is needed.

The calls run on meta tensors; where the JIT would compile, the specialisation that it chose (types, constexprs,
divisibility, num_warps) is recorded instead. Nothing about a kernel is restated.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from targets import TARGETS as TARGETS
from targets import Target
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import dora_kernels
from dora_kernels import ops
from dora_kernels.extras.serving import AdapterBank, bank_linear
from dora_kernels.functional import linear, weight
from dora_kernels.functional.rescale import rescale
from dora_kernels.kernels.side import Side
from dora_kernels.planning import configs, devices, measured, plan, tiles
from dora_kernels.quant import QuantizedWeight, Weight
from dora_kernels.types import DoraWeight


@dataclass(frozen=True)
class Variant:
    """The dtypes of a call. autocast: as inside torch.autocast(dtype); precision: torch's float32 matmul setting."""

    base: torch.dtype
    adapter: torch.dtype
    autocast: torch.dtype | None = None
    precision: str = "highest"


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
VARIANTS = {
    "bf16": Variant(_BF16, _BF16),
    "fp16": Variant(_FP16, _FP16),
    "fp32": Variant(_FP32, _FP32),
    "fp32 high": Variant(_FP32, _FP32, precision="high"),
    "bf16, fp32 adapters": Variant(_BF16, _FP32),
    "bf16, fp32 adapters, high": Variant(_BF16, _FP32, precision="high"),
    "bf16 autocast, fp32 adapters": Variant(_BF16, _FP32, autocast=_BF16),
}


@dataclass(frozen=True)
class Inputs:
    """The arguments of dora_linear as meta tensors, all but weight wanting a gradient."""

    x: Tensor
    weight: Weight
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    bias: Tensor

    @classmethod
    def of(cls, variant: Variant, M: int, N: int, K: int, R: int) -> "Inputs":
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        base, adapter = variant.base, variant.adapter
        return cls(
            x=empty(M, K, dtype=base),
            weight=empty(N, K, dtype=base).detach(),
            lora_A=empty(R, K, dtype=adapter),
            lora_B=empty(N, R, dtype=adapter),
            magnitude=empty(N, dtype=adapter),
            bias=empty(N, dtype=base),
        )

    def adapter(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A, self.lora_B, self.magnitude


def step(inputs: Inputs, *, scaling: float = 0.5, bias: bool = True, drop: bool = False, **arguments) -> None:
    """One forward and backward pass. arguments: norm_grad of dora_linear, way and precision of options."""
    norm_grad = arguments.pop("norm_grad", False)
    with dora_kernels.options(**arguments):
        y = linear.dora_linear_core(
            inputs.x,
            DoraWeight(inputs.weight, *inputs.adapter(), scaling),
            inputs.bias if bias else None,
            x_dropped=inputs.x * 1.0 if drop else None,
            norm_grad=norm_grad,
        )[0]
        y.backward(torch.empty_like(y))


def step_beside(inputs: Inputs, **arguments) -> None:
    """One forward and backward pass the fused way, with all that can run beside the GEMM of dx beside it."""
    with mock.patch.object(plan, "beside", lambda *asked, **named: measured.BESIDE["all"]):
        step(inputs, way="fused", **arguments)


def _frozen(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, magnitude=inputs.magnitude.detach(), bias=inputs.bias.detach())


def _transposed(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, weight=inputs.weight.new_empty(inputs.weight.shape[::-1]).T)


def _transposed_steps(inputs: Inputs) -> None:
    for way in ("auto", "merged"):
        step(_transposed(inputs), way=way)


def _few_tokens(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, x=inputs.x.new_empty(16, inputs.x.shape[1]).requires_grad_())


def _infer(inputs: Inputs, way: str) -> None:
    with torch.no_grad(), dora_kernels.options(way=way):
        dora_kernels.dora_linear(inputs.x, inputs.weight, *inputs.adapter(), 0.5, inputs.bias)


def _inference(inputs: Inputs) -> None:
    with torch.no_grad():
        for way in ("split", "merged"):
            _infer(inputs, way)
        dora_kernels.weight_norm(inputs.weight, inputs.lora_A, inputs.lora_B, 0.5)
        dora_kernels.merge_weight(inputs.weight, *inputs.adapter(), 0.5)


def _unmerge(inputs: Inputs) -> None:
    """A merged layer is taken apart again: merge over the weight in float32, whatever it is stored in."""
    norm = torch.empty(len(inputs.lora_B), dtype=_FP32, device="meta")
    # which rows have lost their weights cannot be asked of meta tensors: none
    with mock.patch.object(Tensor, "nonzero", lambda rows: torch.empty(0, dtype=torch.int64)):
        weight.unmerge_weight("unmerge", DoraWeight(inputs.weight, inputs.lora_A, inputs.lora_B, None, 0.5), norm, norm)


def _rescale(inputs: Inputs) -> None:
    """A layer in two pieces, with the gradient through the norm."""
    norm = dora_kernels.weight_norm(inputs.weight, inputs.lora_A, inputs.lora_B, 0.5, norm_grad=True)
    base, low = (torch.nn.functional.linear(inputs.x, weight) for weight in (inputs.weight, inputs.lora_A))
    y = rescale(base, low, inputs.lora_B, inputs.magnitude / norm, 0.5, inputs.bias)
    y.backward(torch.empty_like(y))


def _bank(inputs: Inputs) -> None:
    """Two adapters in one batch."""
    with torch.no_grad():
        bank = AdapterBank.of(inputs.weight, 2 * [(*inputs.adapter(), 0.5)])
        index = torch.empty(len(inputs.x), dtype=torch.int64, device="meta")
        bank_linear(inputs.x, inputs.weight, bank, index, inputs.bias)


def _grouped(inputs: Inputs) -> None:
    """The norms of two layers."""
    tensors = ([tensor, tensor] for tensor in (inputs.weight, *inputs.adapter()))
    _, dtype = linear.operand_dtypes(inputs.weight, inputs.lora_A)
    ops.grouped_norm(*tensors, [0.5, 0.5], dtype, "auto")


def _stored(kind: str, N: int, K: int, dtype: torch.dtype) -> QuantizedWeight:
    """A weight (N, K) on meta, with the block sizes that the libraries take by default."""

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    packed, blocks = empty((N * K + 1) // 2), -(-N * K // 64)
    outer = -(-blocks // 256)
    if kind in ("int8", "float8"):
        q = empty(N, K, dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn)
        return QuantizedWeight("row8", (N, K), dtype, (q, empty(N, dtype=_FP32)))
    if kind == "nf4_torchao":
        tensors = (empty(blocks, dtype=torch.int8), *(empty(*size, dtype=dtype) for size in ((outer,), (), (16,))))
        return QuantizedWeight(kind, (N, K), dtype, (packed, *tensors), (64, 256))
    if kind.startswith("hqq4"):
        tensors = packed, empty(blocks, dtype=dtype), empty(blocks, dtype=dtype)
        return QuantizedWeight("hqq4", (N, K), dtype, tensors, (64, int(kind[-1])))
    if kind.endswith("nested"):
        nested = (empty(*size, dtype=_FP32) for size in ((16,), (outer,), (256,), ()))
        return QuantizedWeight("codebook4", (N, K), dtype, (packed, empty(blocks), *nested), (64, 256))
    tensors = packed, empty(blocks, dtype=_FP32), empty(16, dtype=_FP32)
    return QuantizedWeight("codebook4", (N, K), dtype, tensors, (64, 0))


def _quantized(kind: str) -> Callable[[Inputs], None]:
    """The calls that compile for a weight of that kind other kernels than for a dense one: the norm, merged weights.

    A training step by itself merges in the backward pass, with what that begins with, and the merged way in the forward
    pass, too, with squares; inference, merged, ends the norm.
    """

    def call(inputs: Inputs) -> None:
        if "K = " in kind:
            K = int(kind.split()[-1])
            x, lora_A = (tensor.new_empty(len(tensor), K).requires_grad_() for tensor in (inputs.x, inputs.lora_A))
            inputs = dataclasses.replace(inputs, x=x, lora_A=lora_A)
        weight = _stored(kind, inputs.weight.shape[0], inputs.x.shape[1], inputs.weight.dtype)
        inputs = dataclasses.replace(inputs, weight=weight)
        step(inputs, way="split")
        step(inputs, way="merged", drop=True)
        step(inputs)
        step(inputs, way="merged")
        _infer(inputs, way="merged")

    return call


# 4304 is 16 * 269, the width of a vision tower: blocks straddle rows. At 4095 a row may start within a byte.
QUANTIZED_KINDS = (
    "codebook4", "codebook4 nested", "codebook4, K = 4304", "codebook4, K = 4095", "int8", "float8", "nf4_torchao",
    "hqq4 axis 0", "hqq4 axis 1",
)  # fmt: skip
# by name, in the order in which a specialisation that several of them share is attributed
CALLS: dict[str, Callable[[Inputs], None]] = {
    "train": step,
    "few tokens": lambda inputs: step(_few_tokens(inputs)),
    "no bias": lambda inputs: step(inputs, bias=False),
    "split": lambda inputs: step(inputs, way="split"),
    "merged": lambda inputs: step(inputs, way="merged"),
    "fused": step_beside,
    "fused, no bias": lambda inputs: step_beside(inputs, bias=False),
    "fused inference": lambda inputs: _infer(inputs, way="fused"),
    "exact": lambda inputs: step(inputs, precision="exact"),
    "dropout": lambda inputs: step(inputs, drop=True),
    "norm_grad": lambda inputs: step(inputs, norm_grad=True),
    "frozen magnitude": lambda inputs: step(_frozen(inputs)),
    "transposed weight": _transposed_steps,
    "inference": _inference,
    "unmerge": _unmerge,
    "rescale": _rescale,
    "bank": _bank,
    "grouped": _grouped,
} | {kind: _quantized(kind) for kind in QUANTIZED_KINDS}
# what the variants other than bf16 are compiled for: flags and dtypes hardly meet
CORE_CALLS = (
    "train",
    "few tokens",
    "split",
    "merged",
    "fused",
    "fused inference",
    "dropout",
    "norm_grad",
    "unmerge",
    "bank",
    "grouped",
    "codebook4 nested",
    "nf4_torchao",
)


def _within(name: str, value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """(name, value, path) of an argument or of all that is in it, where it is a tuple; see Specialization.arguments."""
    if not isinstance(value, tuple):
        yield name.removesuffix(".ptr"), value, path
        return
    fields = getattr(value, "_fields", None)
    for index, part in enumerate(value):
        yield from _within(f"{name}.{fields[index]}" if fields else f"{name}[{index}]", part, (*path, index))


class Share(NamedTuple):
    """The work that the programs of a launch share out (dora_kernels/kernels/shares.py), of whom `waves` a
    multiprocessor are taken to run at a time.
    """

    blocks: int
    steps: int
    waves: int


_DESCRIPTOR = re.compile(r"tensordesc<\w+\[([\d, ]+)\]")


@dataclass(frozen=True)
class Specialization:
    """A kernel as Triton's JIT would have compiled it at a launch.

    work: None where a program has a tile, and the grid is of tiles. bytes_of: of each tensor among the arguments, 0 for
    one that is given a second time. sizes: the integers among them. beside: it runs while a GEMM does (side.py).
    """

    kernel: JITFunction
    key: str
    target: Target
    signature: dict[str, str]
    constexprs: dict
    attrs: dict
    options: object
    grid: tuple[int, ...] = ()
    work: Share | None = None
    bytes_of: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    beside: bool = False

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def source(self) -> ASTSource:
        """The source that triton.compile compiles, in Triton's language or in Gluon."""
        return self.kernel.ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)

    def in_gluon(self) -> bool:
        """True if roles, copies and barriers are written out, and nothing is left to the compiler but registers."""
        return self.kernel.is_gluon()

    def blocks(self) -> dict[str, tuple[int, ...]]:
        """The block that each tensor descriptor among the arguments moves."""
        found = ((name, _DESCRIPTOR.match(str(kind))) for name, kind in self.signature.items())
        return {name: tuple(map(int, match[1].split(","))) for name, match in found if match}

    def walks_blocks(self) -> bool:
        """True if the programs share out work (kernels/shares.py): their outermost loops are over blocks."""
        return "unit_range(" in self.kernel.src

    def constants(self) -> dict[str, object]:
        """The values of the arguments that were compiled in, those in tuples apart."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}

    def arguments(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (type, path), in order; names are "R", "weight.pointers[0]", "base" for base.ptr, "base.stride_0".

        The type of what was compiled in, such as a tensor that is not there, is "constexpr".
        """

        kinds = enumerate(self.signature.items())
        found = ((one, index) for index, (name, kind) in kinds for one in _within(name, kind))
        return {name: (kind, (index, *path)) for (name, kind, path), index in found}

    def type_of(self, argument: str) -> str:
        """Of an argument by its name in `arguments`: "*bf16", "i32", "constexpr"."""
        return self.arguments()[argument][0]

    def pointers(self) -> list[str]:
        """The arguments left at run time, in order, by name; "" for a number."""
        kinds = [(name, kind) for name, (kind, _) in self.arguments().items() if kind != "constexpr"]
        return [name if kind.startswith("*") else "" for name, kind in kinds]

    def aligned(self, argument: str) -> bool:
        """True if a number, or the address of a pointer, is known to be a multiple of 16."""
        return ["tt.divisibility", 16] in self.attrs.get(self.arguments()[argument][1], [])

    def has(self, argument: str) -> bool:
        """True if a tensor that may be None is there: "low", "partial.total"."""
        kinds = [kind for name, (kind, _) in self.arguments().items() if f"{name}.".startswith(f"{argument}.")]
        return any(kind != "constexpr" for kind in kinds)

    def flags(self) -> str:
        """The optional parts that are compiled in: "low saved total", and before them the format of a weight."""
        constants = self.constants()
        optional = dict.fromkeys(re.findall(r"([\w.]+) is (?:not )?None", self.kernel.src))
        present = [name for name in optional if name.partition(".")[0] in self.signature and self.has(name)]
        names = [name.rpartition(".")[2].removesuffix("_ptr") for name in present]
        names += [name.lower() for name, value in constants.items() if value is True]
        return " ".join([constants["FORMAT"].name, *names] if "FORMAT" in constants else names)

    def tiles(self) -> str:
        """BLOCK_M=64 BLOCK_N=128 warps=4 stages=3"""
        constants = self.constants()
        if self.in_gluon():
            blocks = self.blocks()
            (M, K), N = blocks["x"], blocks["weight"][1 if constants["NN"] else 0]
            stages = f"stages={constants['STAGES']} slots={constants['SLOTS']}"
            return f"BLOCK_M={M} BLOCK_N={N} BLOCK_K={K} warps={self.options.num_warps} {stages}"
        sizes = [f"{name}={value}" for name, value in constants.items() if name.startswith("BLOCK_")]
        return " ".join([*sizes, f"warps={self.options.num_warps}", f"stages={self.options.num_stages}"])


class _Driver:
    """The part of a Triton driver that JITFunction.run asks for before it compiles."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target.name  # the key of the JIT's cache of backends

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu


@contextlib.contextmanager
def recording(target: Target, variant: Variant, overrides: dict[str, dict] | None = None) -> Iterator[list]:
    """Inside, launches on meta tensors as on `target` compile nothing; the list yielded gets a Specialization each.

    overrides: kernel -> fields of tiles.Config to replace, or of tiles.GemmConfig.
    """
    if devices.interpreting():
        raise RuntimeError("recording: TRITON_INTERPRET is set, which leaves nothing to compile; expected it unset")
    recorded: list[Specialization] = []
    launch: dict[str, Any] = {"work": None, "beside": False}  # what is known of the launch under way
    run, config_for, programs, launch_beside = JITFunction.run, configs.config_for, configs.programs, Side.launch

    def run_warmup(self, *args, grid, warmup, **kwargs):
        tensors = (one for pair in zip(self.arg_names, args, strict=False) for one in _within(*pair))
        bytes_of: dict[str, int] = {}
        sizes: dict[str, int] = {}
        seen = set()
        for name, value, _ in tensors:
            tensor = value if isinstance(value, Tensor) else getattr(value, "base", None)  # of a descriptor
            if tensor is not None:
                storage = tensor.untyped_storage()._cdata
                bytes_of[name] = 0 if storage in seen else tensor.numel() * tensor.itemsize
                seen.add(storage)
            elif type(value) is int:
                sizes[name] = value
        launch.update(grid=tuple(grid), bytes_of=bytes_of, sizes=sizes)
        try:
            return run(self, *args, grid=grid, warmup=True, **kwargs)
        finally:
            launch["work"] = None

    def record(self, key, signature, device, constexprs, options, attrs, warmup):
        recorded.append(Specialization(self, key, target, signature, constexprs, attrs, options, **launch))

    def programs_of(blocks, steps, at_once, sums):
        launch["work"] = Share(blocks, steps, at_once // target.multiprocessors)
        return programs(blocks, steps, at_once, sums)

    def beside(self, *arguments):
        launch["beside"] = True
        try:
            return launch_beside(self, *arguments)
        finally:
            launch["beside"] = False

    def config_with_overrides(kernel, *arguments):
        return dataclasses.replace(config_for(kernel, *arguments), **(overrides or {}).get(kernel, {}))

    facts = devices.DeviceFacts(target.name, target.family, target.multiprocessors)
    replaced = (overrides or {}).get("gemm", {})
    gemms = tiles.GEMMS.get(target.family, {})
    gemms = {product: dataclasses.replace(config, **replaced) for product, config in gemms.items()}
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (JITFunction, "run", run_warmup),
            (JITFunction, "_do_compile", record),
            (devices, "device_facts", lambda device: facts),
            (configs, "config_for", config_with_overrides),
            (configs, "programs", programs_of),
            (Side, "launch", beside),
            (torch, "get_device_module", lambda device=None: torch.cpu),  # streams of meta tensors: they do nothing
            # meta tensors would take the fake implementations, and autocast does not know the meta device
            *((ops, name, ops.OPERATORS[name]) for name in ops.OPERATORS),
            (torch, "autocast", lambda *device_type, **options: contextlib.nullcontext()),
            (torch, "is_autocast_enabled", lambda *device_type: variant.autocast is not None),
            (torch, "get_autocast_dtype", lambda device_type: variant.autocast),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        # what was planned for such tensors may have been for another GPU
        stack.enter_context(mock.patch.dict(linear._known, clear=True))
        stack.enter_context(mock.patch.dict(tiles.GEMMS, {target.family: gemms} if gemms else {}))
        active, precision = triton.runtime.driver._active, torch.get_float32_matmul_precision()
        triton.runtime.driver.set_active(_Driver(target))
        torch.set_float32_matmul_precision(variant.precision)
        try:
            yield recorded
        finally:
            triton.runtime.driver.set_active(active)
            torch.set_float32_matmul_precision(precision)
