"""dora_linear over quantized weights: every storage format, on the kernel code and on the reference."""

import contextlib
import dataclasses
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dora_kernels
from dora_kernels import DoraLinear, ops, options, passes, pytorch, quant, reference
from dora_kernels.planning import configs, costs, devices, plan
from dora_kernels.quant import QuantizedWeight, flatten_weight
from dora_kernels.types import Call, Given, How, Needs, Saved
from tests.support.packed_weights import HQQ_KINDS, KINDS, quantized
from tests.support.problem import BACKENDS, DEVICE, EXACT_DTYPE, GRADIENTS, TOLERANCE, Problem, core

kernels = pytest.importorskip("dora_kernels.kernels")

# what decodes in float32 whatever the dtype, and so takes float64 tests; the arithmetic of the others has their dtype
FLOAT32_KINDS = ("codebook4", "codebook4 of 32", "codebook4 nested", "int8", "float8")
# N, K, R: each shape is here for one thing that the others do not have
SHAPES = (
    (70, 90, 20),  # every axis ragged, blocks of 64 straddle rows of 90, R in two chunks
    (33, 96, 5),  # two columns of a block are those of one row: runs of 32 share a scale
    (64, 128, 16),  # every axis a multiple of the tiles and of the blocks
    (7, 31, 3),  # K and N * K odd: rows start within a byte, the last byte is half empty
    (1, 200, 2),  # one row, several splits
    (1, 1, 1),
)
HQQ_SHAPES = (
    (72, 90, 20),
    (64, 128, 16),
    (9, 16, 3),  # N odd: the boundary between high and low nibbles lies within a row
    (16, 31, 3),  # K odd
    (3, 80, 2),  # fewer rows than a group has elements along axis 0
    (1, 208, 2),
)
CASES = [(kind, shape) for kind in KINDS for shape in (HQQ_SHAPES if kind in HQQ_KINDS else SHAPES)]
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
MODERATE = (24, 32, 5)  # of a size that every kind takes


def ids(value: object) -> str:
    return "-".join(map(ids, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def exact_dtype(kind: str) -> torch.dtype:
    return EXACT_DTYPE if kind in FLOAT32_KINDS else torch.float32


def problem_over(weight: QuantizedWeight, M: int, R: int, adapter_dtype: torch.dtype | None = None, **arguments):
    """(a problem over the decoded weight, the same over the weight as it is stored)."""
    problem = Problem.random(M, *weight.shape, R, weight.dtype, adapter_dtype, **arguments)
    problem.weight = weight.dequantize()
    direction = problem.weight.double() + 0.75 * problem.lora_B.double() @ problem.lora_A.double()
    spread = torch.linspace(0.5, 1.5, len(direction), device=DEVICE)
    problem.magnitude = (spread * direction.norm(dim=1)).to(problem.magnitude.dtype)
    return problem, dataclasses.replace(problem, weight=weight)


# The kernels.


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=ids)
@pytest.mark.parametrize(("kind", "shape"), CASES, ids=ids)
def test_the_kernel_decodes_bit_for_bit(kind, shape, dtype):
    N, K, _ = shape
    weight = quantized(kind, N, K, dtype)
    assert torch.equal(kernels.dense(weight, dtype), weight.dequantize())
    assert torch.equal(kernels.dense(weight, torch.float32), weight.dequantize(dtype=torch.float32))


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=ids)
def test_norm_and_merge(kind, shape):
    N, K, R = shape
    weight = quantized(kind, N, K, exact_dtype(kind))
    problem = Problem.random(1, N, K, R, weight.dtype)
    adapter = (problem.lora_A, problem.lora_B)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if weight.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for actual, expected in zip(
        kernels.norm(weight, *adapter, 0.75, problem.magnitude),
        reference.norm(weight, *adapter, 0.75, problem.magnitude),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, **tolerance)
    for gain in (None, problem.magnitude):
        for subtract_weight in (False, True):
            arguments = (weight, *adapter, gain, 0.75, subtract_weight)
            torch.testing.assert_close(kernels.merge(*arguments), reference.merge(*arguments), **tolerance)
    merged = kernels.merge(weight, *adapter, None, 0.75, out_dtype=torch.bfloat16)
    expected = reference.merge(weight, *adapter, None, 0.75, out_dtype=torch.bfloat16)
    assert merged.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(merged, expected, rtol=2**-7, atol=1e-6)


def test_every_float8_decodes():
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(16, 16)
    q = bits.view(torch.float8_e4m3fn)
    weight = QuantizedWeight("row8", (16, 16), torch.float32, (q, torch.ones(16, device=DEVICE)))
    torch.testing.assert_close(kernels.dense(weight, torch.float32), q.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=ids)
@pytest.mark.parametrize("kind", HQQ_KINDS)
def test_scales_of_hqq_in_another_dtype_are_rounded_to_that_of_the_weight(kind, dtype):
    narrow = quantized(kind, 24, 32, dtype)
    packed, *rest = quantized(kind, 24, 32, torch.float64).tensors
    for stored in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        wide = dataclasses.replace(narrow, tensors=(packed, *(tensor.to(stored) for tensor in rest)))
        rounded = (packed, *(tensor.to(stored).to(dtype) for tensor in rest))
        expected = dataclasses.replace(narrow, tensors=rounded).dequantize()
        assert torch.equal(wide.dequantize(), expected)
        assert torch.equal(kernels.dense(wide, torch.float32), expected.float())


@pytest.mark.parametrize("tiles", ({"BLOCK_K": 16}, {"BLOCK_N": 16}, {"BLOCK_K": 64, "BLOCK_N": 64}), ids=str)
@pytest.mark.parametrize("kind", ("codebook4 nested", "nf4_torchao", "hqq4 axis 1"))
def test_tile_sizes_do_not_change_the_values(kind, tiles, monkeypatch):
    weight = quantized(kind, 40, 96)
    config = configs.config_for("merge", devices.device_facts(weight.device), torch.float32)
    monkeypatch.setattr(configs, "config_for", lambda *_: configs.Config(**(vars(config) | tiles)))
    assert torch.equal(kernels.dense(weight, torch.float32), weight.dequantize())


# Layers.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ("split", "merged"))
@pytest.mark.parametrize("dtypes", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_pytorch(kind, dtypes, way, backend):
    problem, stored = problem_over(quantized(kind, 40, 50, dtypes[0]), 33, 20, dtypes[1])
    comparisons = problem.comparisons(stored.ours(backend, way))
    assert len(comparisons) == 1 + len(GRADIENTS)
    assert all(comparison.ok for comparison in comparisons), comparisons


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ("split", "merged"))
@pytest.mark.parametrize("kind", FLOAT32_KINDS)
def test_the_formula_in_float64(kind, way, backend):
    problem, stored = problem_over(quantized(kind, *MODERATE[:2], EXACT_DTYPE), 7, MODERATE[2])
    for arguments in ({}, {"norm_grad": True}):
        actual, exact = stored.ours(backend, way, **arguments), problem.exact(**arguments)
        for name in exact:
            torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", ({"norm_grad": True}, {"dropout": 0.4}, {"precision": "exact"}), ids=str)
@pytest.mark.parametrize("kind", ("codebook4 nested", "int8", "hqq4 axis 0"))
def test_through_the_norm_under_dropout_and_exact(kind, arguments, backend):
    weight = quantized(kind, 72, 90, torch.bfloat16)
    problem, stored = problem_over(weight, 33, 20, torch.float32, dropout=arguments.get("dropout", 0.0))
    norm_grad = {"norm_grad": True} if "norm_grad" in arguments else {}
    actual = stored.ours(backend, precision=arguments.get("precision", "auto"), **norm_grad)
    comparisons = problem.comparisons(actual, **norm_grad)
    assert all(comparison.ok for comparison in comparisons), comparisons


@pytest.mark.parametrize("kind", ("codebook4 nested", "int8"))
def test_gradcheck_on_the_kernel_code(kind):
    if DEVICE == "cuda":
        pytest.skip("float64 kernels run in the interpreter only")
    problem, stored = problem_over(quantized(kind, 19, 34, torch.float64), 6, 5)

    def function(x, lora_A, lora_B, magnitude, bias):
        with options(backend="triton"):
            return core(x, stored.weight, lora_A, lora_B, magnitude, 0.75, bias, norm_grad=True)

    inputs = [getattr(problem, name).requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_the_same_twice(kind, backend):
    _, stored = problem_over(quantized(kind, 40, 50, torch.bfloat16), 33, 20)
    first, second = stored.ours(backend), stored.ours(backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", (False, True))
def test_the_weight_is_decoded_to_the_dtype_of_x(autocast, backend):
    """int8 decodes to float32 in its library, and meets x in bfloat16 in its layer."""
    problem, stored = problem_over(quantized("int8", 24, 40), 7, 5)
    exact = problem.exact()
    if not autocast:
        stored.x, stored.bias = stored.x.bfloat16(), stored.bias.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext():
        actual = stored.ours(backend)
    assert actual["y"].dtype == torch.bfloat16
    assert actual["x"].dtype == stored.x.dtype and actual["lora_A"].dtype == torch.float32
    for name in actual:
        error = (actual[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 3 * torch.finfo(torch.bfloat16).eps / 2, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_norm_and_merge_weight(kind, backend):
    weight = quantized(kind, *MODERATE[:2], torch.bfloat16)
    problem, _ = problem_over(weight, 1, MODERATE[2], torch.float32)
    adapter = (problem.lora_A, problem.lora_B)
    with options(backend=backend):
        norm = dora_kernels.weight_norm(weight, *adapter, 0.75)
        merged = dora_kernels.merge_weight(weight, *adapter, problem.magnitude, 0.75)
        expected = dora_kernels.merge_weight(problem.weight, *adapter, problem.magnitude, 0.75)
        torch.testing.assert_close(norm, dora_kernels.weight_norm(problem.weight, *adapter, 0.75), rtol=1e-6, atol=0)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, expected)


def test_errors():
    problem, stored = problem_over(quantized("codebook4", 8, 6), 5, 2)
    arguments = {name: value for name, value in vars(stored).items() if name not in ("dy", "x_dropped")}
    assert dora_kernels.dora_linear(**arguments).shape == (5, 8)
    for changes, message in (
        ({"x": torch.zeros(5, 7)}, r"x has shape \(5, 7\) but weight has shape \(8, 6\); expected x .* K = 6"),
        ({"x": problem.x.double()}, r"x is torch.float64 but weight is torch.float32; expected one dtype"),
        ({"x": torch.zeros(5, 6, device="meta")}, r"x is on meta but weight is on cpu; expected one device"),
        ({"lora_B": torch.zeros(7, 2)}, r"lora_B has shape \(7, 2\) but weight has shape \(8, 6\)"),
        ({"lora_A": torch.zeros(2, 5)}, r"lora_A has shape \(2, 5\) but weight has shape \(8, 6\)"),
    ):
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="dora_linear: " + message):
                dora_kernels.dora_linear(**(arguments | changes))


# Memory.


class DenseTensors(TorchDispatchMode):
    """Counts the storages of at least `size` floating-point elements that live at the same time; `most` is the most."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most, self.seen = size, 0, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() >= self.size:
                self.seen.append(weakref.ref(tensor))
        alive = (tensor for tensor in (seen() for seen in self.seen) if tensor is not None)
        self.most = max(self.most, len({tensor.untyped_storage().data_ptr() for tensor in alive}))
        return result


@pytest.mark.parametrize("steps", (kernels.KERNELS, pytorch.PYTORCH), ids=("kernels", "reference"))
@pytest.mark.parametrize("way", ("split", "merged"))
@pytest.mark.parametrize("dropped", (False, True))
@pytest.mark.parametrize("kind", ("codebook4 nested", "int8", "hqq4 axis 0"))
def test_one_dense_temporary_at_a_time(kind, dropped, way, steps, monkeypatch):
    """None in the norm; M is small, so that nothing else has N * K elements. The reference works in blocks of 256."""
    N, K, R, M = 600 if steps is pytorch.PYTORCH else 72, 40, 4, 3
    monkeypatch.setattr(pytorch, "_BLOCK_BYTES", {"cpu": 1})
    monkeypatch.setattr(pytorch, "_BLOCK_BYTES_ELSEWHERE", 1)
    monkeypatch.setattr(quant.formats, "_BLOCK_ELEMENTS", {"cpu": 64 * K, "gpu": 64 * K})
    problem, stored = problem_over(quantized(kind, N, K, torch.bfloat16), M, R, dropout=0.4 if dropped else 0.0)
    layer, dtype = problem.layer._replace(weight=stored.weight), torch.bfloat16
    with DenseTensors(N * K) as counted:
        norm, gain = steps.norm(*layer[:3], 0.75, problem.magnitude)
    assert counted.most == 0
    backend = "reference" if steps is pytorch.PYTORCH else "triton"
    asks = {"needs_base": dropped, "adapters_are_wider": False}
    save = plan.saved_tensor(way, dtype, backend, problem.x.device, (N, K, R), **asks)
    how = How(dtype, dtype, way, save, backend, save_low=True, dropped=dropped, norm_grad=True)
    with DenseTensors(N * K) as counted:
        made = passes.forward(steps, Call(problem.x, problem.x_dropped, layer, None, Given(), how))
    # the reference merges block by block, and multiplies each block
    assert counted.most == (0 if steps is pytorch.PYTORCH and save == "z_merged" else 1)
    with DenseTensors(N * K) as counted:
        saved = Saved(problem.x, norm, gain, made.low, made.intermediate, None, dtype, dtype)
        passes.backward(steps, problem.dy, saved, layer, how, Needs(True, dropped, True, True, True, True))
    assert counted.most == 1


def test_only_packed_storage_is_saved():
    _, stored = problem_over(quantized("codebook4 nested", 64, 96, torch.bfloat16), 3, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        stored.lora_A.requires_grad_()
        core(stored.x, stored.weight, stored.lora_A, stored.lora_B, stored.magnitude, 0.75)
    assert {id(tensor) for tensor in stored.weight.tensors} <= {id(tensor) for tensor in saved}
    assert not any(tensor.is_floating_point() and tensor.numel() >= 64 * 96 for tensor in saved)


def test_the_planner_counts_packed_bytes():
    dense = costs.Shape(512, 4096, 4096, 64, 2)
    packed = dense._replace(packed=0.52)
    H200 = costs.DEVICES["NVIDIA H200"]
    norms = [costs.norm_cost(shape, H200).bytes(shape) for shape in (dense, packed)]
    assert norms == pytest.approx([2 * 4096**2, 0.52 * 4096**2])
    assert costs.merge_cost(packed, H200).bytes(packed) == pytest.approx(2.52 * 4096**2)
    # a product with the weight itself writes a dense temporary, as a merged one does: merging it costs nothing more
    assert plan.dx_way("auto", dense, H200) == "dz" and plan.dx_way("auto", packed, H200) == "merged"
    weight = quantized("codebook4 nested", 64, 128)
    shape = costs.Shape.of(torch.empty(5, 128, dtype=torch.bfloat16), weight, torch.empty(4, 128))
    assert shape == costs.Shape(5, 64, 128, 4, 2, packed=weight.nbytes / (64 * 128))


# Operators, torch.compile and modules.


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("codebook4 nested", "int8", "nf4_torchao", "hqq4 axis 1"))
def test_operators(kind, backend):
    N, K, R = MODERATE
    problem, stored = problem_over(quantized(kind, N, K, torch.bfloat16), 5, R)
    weight, adapter, dtype = flatten_weight(stored.weight), (problem.lora_A, problem.lora_B), torch.bfloat16
    torch.library.opcheck(ops.norm, (*weight, *adapter, 0.75, dtype, backend))
    norm = ops.norm(*weight, *adapter, 0.75, dtype, backend)
    gain = torch.ones_like(norm)
    torch.library.opcheck(ops.merge, (*weight, *adapter, gain, 0.75, dtype, backend))
    forward = (
        problem.x, None, *weight, *adapter, problem.magnitude, problem.bias, None, None, 0.75, dtype, "auto", "base",
        True, False, backend,
    )  # fmt: skip
    torch.library.opcheck(ops.forward, forward)
    _, norm, gain, low, kept = ops.forward(*forward)
    backward = (
        problem.dy, problem.x, *weight, *adapter, norm, gain, low, kept, None, 0.75, dtype, "auto", "base", False, True,
        [True, False, True, True, True, True], dtype, dtype, backend,
    )  # fmt: skip
    torch.library.opcheck(ops.backward, backward)


@pytest.mark.parametrize("kind", ("codebook4 nested", "int8"))
def test_torch_compile_keeps_the_operators(kind):
    _, stored = problem_over(quantized(kind, *MODERATE[:2]), 12, MODERATE[2])
    torch._dynamo.reset()
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    actual, expected = stored.run(compiled), stored.ours("auto")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


class Int8Params(nn.Parameter):
    """As much of bitsandbytes' int8 weight as is read."""

    has_fp16_weights = False
    SCB = None


class Linear8bitLt(nn.Linear):
    """As much of bitsandbytes' int8 layer as is read, its scales in the state dict."""

    def __init__(self, N: int, K: int) -> None:
        super().__init__(K, N, device=DEVICE)
        q = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=DEVICE)
        self.weight = Int8Params(q, requires_grad=False)
        self.register_buffer("SCB", torch.rand(N, device=DEVICE) + 0.5)
        self.weight.SCB = self.SCB

    @property
    def state(self) -> None:
        return None


Int8Params.__module__ = Linear8bitLt.__module__ = "bitsandbytes.nn"


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = DoraLinear.from_linear(Linear8bitLt(20, 24), rank=4, alpha=6.0)
    return layer


def test_a_module_over_a_quantised_layer(layer):
    x = torch.randn(5, 24, device=DEVICE)
    linear = layer.base_layer
    dense = quant.read(linear).dequantize()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, linear.bias))  # it starts as the layer it is of
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        layer.lora_magnitude_vector.mul_(1.5)
    y = layer(x)
    y.sum().backward()
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is not None} == {
        "lora_A.weight", "lora_B.weight", "lora_magnitude_vector",
    }  # fmt: skip
    expected = reference.dora_linear_ref(
        x, dense, layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector, layer.scaling, linear.bias
    )
    torch.testing.assert_close(y, expected)
    assert "bias=True" in repr(layer)


def test_merging_makes_a_dense_weight_and_unmerging_drops_it(layer):
    x = torch.randn(5, 24, device=DEVICE)
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    y, stored = layer(x), quant.read(layer.base_layer).tensors
    layer.merge()
    assert layer.weight.shape == (20, 24) and not layer.weight.requires_grad
    torch.testing.assert_close(layer(x), y)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.unmerge()
    assert layer.weight is None
    assert torch.equal(layer(x), y)
    for before, after in zip(stored, quant.read(layer.base_layer).tensors, strict=True):
        assert torch.equal(before, after)


def test_the_state_dict_has_the_layer_that_it_is_over(layer):
    names = set(layer.state_dict())
    assert {"base_layer.weight", "base_layer.SCB", "base_layer.bias", "lora_A.weight", "lora_B.weight"} <= names
    assert "weight" not in names and "bias" not in names
    other = DoraLinear.from_linear(Linear8bitLt(20, 24), rank=4, alpha=6.0)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 24, device=DEVICE)
    torch.testing.assert_close(other(x), layer(x))


def test_a_layer_that_cannot_be_read_is_refused():
    linear = Linear8bitLt(20, 24)
    linear.weight.SCB = None
    with pytest.raises(ValueError, match="not quantized yet"):
        DoraLinear.from_linear(linear, rank=4, alpha=6.0)
    with pytest.raises(ValueError, match="linear is Bilinear; expected torch.nn.Linear, or a layer quantized by"):
        DoraLinear.from_linear(nn.Bilinear(2, 2, 2), rank=4, alpha=6.0)
