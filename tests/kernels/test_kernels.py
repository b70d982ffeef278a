"""Each launcher of dora_kernels/kernels/ against the reference step of the same name, on the real kernel code."""

import collections
import dataclasses
import sys

import pytest
import torch

from dora_kernels import reference
from dora_kernels.planning import configs, devices
from dora_kernels.planning.configs import Config
from tests.support.packed_weights import quantized
from tests.support.problem import DEVICE, Problem

kernels = pytest.importorskip("dora_kernels.kernels")

# float64 through the interpreter shows the index arithmetic to 1e-12; on a GPU float32 stands in
DTYPE = torch.float64 if DEVICE == "cpu" else torch.float32
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10} if DEVICE == "cpu" else {"rtol": 1e-4, "atol": 1e-4}
# ragged in every axis, rank in one and in several chunks, rank above K, one of everything; at K = 80 and not at 90 the
# weight is loaded in whole vectors, and the norm walks K and R in one loop
SHAPES = ((33, 70, 90, 20), (17, 33, 40, 16), (7, 24, 10, 33), (9, 40, 80, 33), (1, 1, 1, 1), (130, 5, 3, 2))


@pytest.fixture(params=SHAPES, ids=str)
def problem(request):
    return Problem.random(*request.param, DTYPE)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_norm(problem):
    arguments = (problem.weight, problem.lora_A, problem.lora_B, 0.75, problem.magnitude)
    for actual, expected in zip(kernels.norm(*arguments), reference.norm(*arguments), strict=True):
        close(actual, expected)
    assert kernels.norm(*arguments[:-1])[1] is None


@pytest.mark.parametrize(
    "shapes",
    (SHAPES, ((1, 64, 32, 16), (1, 48, 64, 32)), ((1, 70, 80, 33), (1, 20, 48, 20)), ((1, 70, 32, 3),)),
    ids=str,
)
def test_grouped_norm(shapes):
    problems = [Problem.random(*shape, DTYPE, seed=seed) for seed, shape in enumerate(shapes)]
    names = ("weight", "lora_A", "lora_B", "magnitude")
    tensors = [[getattr(problem, name) for problem in problems] for name in names]
    tensors[0][0][3] = tensors[2][0][3] = 0  # a zero row
    scalings = [0.5 + seed for seed in range(len(problems))]
    for actual, expected in zip(
        kernels.grouped_norm(*tensors, scalings), reference.grouped_norm(*tensors, scalings), strict=True
    ):
        close(actual, expected)
        assert actual[3] == 0 and actual.shape == (sum(problem.weight.shape[0] for problem in problems),)


@pytest.mark.parametrize(
    ("change", "aligned", "rank_multiple"),
    (
        (lambda layer: layer, True, 16),
        (lambda layer: [*layer[:3], layer[3][1:]], True, 16),
        (lambda layer: [shifted(layer[0]), *layer[1:]], False, 16),
        (lambda layer: [layer[0], shifted(layer[1]), *layer[2:]], False, 16),
        (lambda layer: [*layer[:2], shifted(layer[2]), layer[3]], False, 16),
        (lambda layer: [layer[0][:, :40].contiguous(), layer[1][:, :40].contiguous(), *layer[2:]], False, 16),
        (lambda layer: [layer[0], layer[1][:24], layer[2][:, :24].contiguous(), layer[3]], True, 8),
    ),
    ids=("all", "magnitude", "weight", "lora_A", "lora_B", "K", "R"),
)
def test_grouped_norm_tells_the_compiler_what_holds_of_every_layer(change, aligned, rank_multiple, monkeypatch):
    """Of a hint that is false nothing shows but on a GPU, where the loads are in vectors."""
    problem = Problem.random(1, 7, 48, 32, DTYPE)
    layer = [problem.weight, problem.lora_A, problem.lora_B, problem.magnitude]
    told = []
    launcher = collections.defaultdict(lambda: lambda *arguments, **hints: told.append(hints))
    monkeypatch.setitem(kernels.grouped_norm.__globals__, "_grouped_norm_kernel", launcher)
    magnitude = problem.magnitude.new_ones(8)
    kernels.grouped_norm(*map(list, zip(layer, change([*layer[:3], magnitude]), strict=True)), [0.75, 0.75])
    assert (told[0]["ALIGNED"], told[0]["R_MULTIPLE"]) == (aligned, rank_multiple)


def shifted(tensor):
    """The same numbers, at an address that is no multiple of 16."""
    other = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return other.copy_(tensor)


def test_what_a_norm_loads_ahead():
    """Nothing where the weight is not loaded in whole vectors, or is looked up number by number."""

    def stages(weight):
        return kernels.stored_weight.weight_stages(weight, Config(num_stages=3))

    def stored(kind):
        return quantized(kind, 32, 96, torch.bfloat16)

    dense = torch.empty(32, 96)
    assert stages(dense) == stages(stored("int8")) == stages(stored("nf4_torchao")) == 3
    assert stages(dense.T) is stages(dense[:, :90].contiguous()) is None
    assert stages(stored("codebook4")) is stages(stored("hqq4 axis 1")) is None


@pytest.mark.parametrize("subtract_weight", (False, True))
@pytest.mark.parametrize("with_gain", (False, True))
def test_merge(problem, with_gain, subtract_weight):
    gain = problem.magnitude if with_gain else None
    arguments = (problem.weight, problem.lora_A, problem.lora_B, gain, 0.75, subtract_weight)
    close(kernels.merge(*arguments), reference.merge(*arguments))


@pytest.mark.parametrize("scaled", (False, True))
def test_project(problem, scaled, monkeypatch):
    # the planner would leave an unscaled product to the GEMM library
    monkeypatch.setattr("dora_kernels.planning.plan.project_by_kernel", lambda *arguments, **keywords: True)
    scale = problem.magnitude if scaled else None
    for rows, factor in ((problem.dy, problem.lora_B.T), (problem.dy.T.contiguous().T, problem.lora_B.T.contiguous())):
        close(kernels.project(rows, factor, scale), reference.project(rows, factor, scale))


@pytest.mark.parametrize("with_low", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("with_residual", (False, True))
def test_epilogue(problem, with_low, with_bias, with_residual):
    low = problem.x @ problem.lora_A.T if with_low else None
    bias = problem.bias if with_bias else None
    residual = problem.dy.T.contiguous().T if with_residual else None
    base = problem.x @ problem.weight.T
    arguments = (base, low, problem.lora_B, problem.magnitude, bias, 0.75, DTYPE, residual)
    close(kernels.epilogue(*arguments), reference.epilogue(*arguments))


def _in_rows_of(tensor, width, offset=0):
    """The same numbers in rows of `width`, from `offset` on."""
    wide = tensor.new_full((len(tensor), width), torch.nan)
    wide[:, offset : offset + tensor.shape[1]] = tensor
    return wide[:, offset : offset + tensor.shape[1]]


@pytest.mark.parametrize(
    ("N", "R", "others", "expected"),
    [
        (80, 72, "", "epilogue_high_rank"),
        (80, 64, "", "epilogue"),
        (80, 68, "", "epilogue"),  # loads of 8 bytes
        (72, 72, "", "epilogue"),
        (80, 72, "residual", "epilogue"),
        (80, 72, "no low", "epilogue"),
        (80, 72, "wider base", "epilogue"),
        (80, 72, "base of 96", "epilogue_high_rank"),
        (80, 72, "base of 88", "epilogue"),
        (80, 72, "base by columns", "epilogue"),
        (80, 72, "low of 80", "epilogue_high_rank"),
        (80, 72, "low of 140", "epilogue"),
        (80, 72, "low of 80 from 1", "epilogue"),
        (80, 72, "low by twos", "epilogue"),
        (80, 72, "lora_B of 76", "epilogue"),
    ],
)
def test_the_large_tile_of_a_high_rank_is_for_what_fits_its_registers(N, R, others, expected, monkeypatch):
    dtype, config_for, used = torch.float32, configs.config_for, []
    monkeypatch.setattr(configs, "config_for", lambda kernel, *rest: used.append(kernel) or config_for(kernel, *rest))
    problem = Problem.random(33, N, 24, R, dtype)
    facts = dataclasses.replace(devices.device_facts(problem.x.device), multiprocessors=1)  # which one tile fills
    monkeypatch.setattr(devices, "device_facts", lambda device: facts)
    operands = {"base": problem.x @ problem.weight.T, "low": problem.x @ problem.lora_A.T, "lora_B": problem.lora_B}
    residual = problem.dy if others == "residual" else None
    name, _, change = others.partition(" ")
    if others == "no low":
        operands["low"] = None
    elif others == "wider base":
        operands |= {name: operands[name].to(torch.bfloat16) for name in ("low", "lora_B")}
    elif change == "by columns":
        operands[name] = operands[name].T.contiguous().T
    elif change == "by twos":
        operands[name] = operands[name].repeat_interleave(2, dim=1)[:, ::2]
    elif change:
        operands[name] = _in_rows_of(operands[name], *(int(word) for word in change.split() if word.isdigit()))
    arguments = (*operands.values(), problem.magnitude, problem.bias, 0.75, dtype, residual)
    torch.testing.assert_close(kernels.epilogue(*arguments), reference.epilogue(*arguments), rtol=1e-4, atol=1e-4)
    assert used[-1] == expected


@pytest.mark.parametrize(
    ("M", "N", "multiprocessors", "expected"),
    [
        (33, 80, 4, "epilogue_high_rank"),
        (33, 80, 5, "epilogue"),  # 2 x 2 tiles of 32 x 64
        (32, 80, 4, "epilogue"),
        (1, 256, 4, "epilogue_high_rank"),
    ],
)
def test_the_large_tile_of_a_high_rank_is_for_what_fills_the_device(M, N, multiprocessors, expected, monkeypatch):
    problem = Problem.random(M, N, 24, 72, torch.float32)
    facts = dataclasses.replace(devices.device_facts(problem.x.device), multiprocessors=multiprocessors)
    config, used = configs.CONFIGS["interpreter", 4]["epilogue_high_rank"], []
    monkeypatch.setattr(devices, "device_facts", lambda device: facts)
    monkeypatch.setattr(configs, "config_for", lambda kernel, *rest: used.append(kernel) or config)
    arguments = (problem.dy, problem.x @ problem.lora_A.T, problem.lora_B, problem.magnitude, None, 0.75, torch.float32)
    torch.testing.assert_close(kernels.epilogue(*arguments), reference.epilogue(*arguments), rtol=1e-4, atol=1e-4)
    assert used[-1] == expected


@pytest.mark.parametrize("keep", ("base", "z"))
@pytest.mark.parametrize("wanted", ("outer", "dmagnitude", "dbias", "scaled", "all"))
@pytest.mark.parametrize("by_kernel", (False, True), ids=("library", "kernel"))
def test_token_sums(problem, by_kernel, wanted, keep, monkeypatch):
    monkeypatch.setattr("dora_kernels.planning.plan.outer_by_kernel", lambda *arguments, **keywords: by_kernel)
    low, base = problem.x @ problem.lora_A.T, problem.x @ problem.weight.T
    norm = problem.magnitude.clone()
    norm[0] = 0  # a zero row: dmagnitude is 0 there
    N, R = problem.lora_B.shape

    def run(token_sums):
        shapes = {"outer": (N, R), "dmagnitude": (N,), "dbias": (N,), "scaled": problem.dy.shape}
        outputs = {name: problem.x.new_empty(shape) for name, shape in shapes.items() if wanted in (name, "all")}
        lacks_low_rank = keep == "base" and "dmagnitude" in outputs
        token_sums(
            problem.dy,
            low if "outer" in outputs or lacks_low_rank else None,
            0.75,
            gain=problem.magnitude,
            kept=base if "dmagnitude" in outputs else None,
            norm=norm,
            lora_B=problem.lora_B if lacks_low_rank else None,
            **outputs,
        )
        return outputs

    actual, expected = run(kernels.token_sums), run(reference.token_sums)
    assert actual
    for name in actual:
        close(actual[name], expected[name])


@pytest.mark.parametrize(
    ("R", "adapter", "expected"),
    [(64, torch.bfloat16, 0), (128, torch.bfloat16, 1), (128, torch.float32, 0)],
)
def test_a_high_rank_sums_its_product_in_the_gemm_library(R, adapter, expected, monkeypatch):
    problem, used = Problem.random(33, 24, 10, R, torch.bfloat16, adapter), []
    module = sys.modules["dora_kernels.kernels.token_sums"]  # kernels.token_sums is the function
    matmul, dB = module.matmul, torch.empty_like(problem.lora_B)
    monkeypatch.setattr(module, "matmul", lambda *arguments: used.append(arguments) or matmul(*arguments))
    low = problem.x.to(adapter) @ problem.lora_A.T
    kernels.token_sums(problem.dy, low, 0.75, outer=dB)
    assert len(used) == expected
    exact = 0.75 * problem.dy.double().T @ low.double()
    assert (dB - exact).norm() <= 4e-3 * exact.norm()


def test_outer_product(problem):
    projected = problem.x @ problem.lora_A.T
    arguments = (projected, problem.x, 0.75, DTYPE)
    close(kernels.outer_product(*arguments), reference.outer_product(*arguments))


@pytest.mark.parametrize("keep", (False, True))
def test_merged_forward(problem, keep):
    arguments = (
        problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, problem.bias,
        None, 0.75, keep,
    )  # fmt: skip
    actual, expected = kernels.merged_forward(*arguments), reference.merged_forward(*arguments)
    for one, other in zip(actual, expected, strict=True):
        assert one is other is None or torch.allclose(one, other, **TOLERANCE)


def test_what_the_rank_and_the_strides_are_multiples_of():
    def multiple(R, *widths):
        return kernels.tile.rank_multiple(R, *(torch.empty(3, width)[:, :R] for width in widths))

    assert [multiple(R) for R in (1, 2, 4, 8, 20, 24, 33)] == [1, 2, 4, 8, 4, 8, 1]
    assert [multiple(R, R) for R in (16, 64, 384)] == [1, 1, 1]  # the JIT's own
    assert [multiple(8, width) for width in (8, 9, 10, 12, 16, 24)] == [8, 1, 2, 4, 8, 8]
    assert multiple(16, 24) == 8 and multiple(8, 8, 12) == 4 and multiple(8, 8, 9) == 1
    assert kernels.tile.rank_multiple(8, torch.empty(8, 16).T) == 1 and kernels.tile.rank_multiple(8, None) == 8


@pytest.mark.parametrize("width", (8, 9, 12, 24))
def test_a_rank_of_8_in_rows_of_another_width(width):
    """What the compiler is told to be multiples of 8 is cut to that: a wrong word would read other elements."""
    problem = Problem.random(33, 70, 48, 8, DTYPE)
    low, base = problem.x @ problem.lora_A.T, problem.x @ problem.weight.T
    index = torch.arange(33, device=low.device) % 3 - 1

    def results(low, lora_B):
        gain, outer = problem.magnitude, torch.empty_like(problem.lora_B)
        kernels.token_sums(problem.dy, low, 0.75, outer=outer)
        bank = lora_B.contiguous()[None], gain[None], gain[:1], None, index
        return (
            outer,
            kernels.norm(problem.weight, problem.lora_A, lora_B, 0.75)[0],
            kernels.merge(problem.weight, problem.lora_A, lora_B, None, 0.75),
            kernels.project(problem.dy, lora_B.T, gain),
            kernels.epilogue(base, low, lora_B, gain, None, 0.75, DTYPE),
            kernels.bank_epilogue(base, low, *bank),
        )

    def widened(tensor):
        wide = tensor.new_full((len(tensor), width), torch.nan)
        wide[:, :8] = tensor
        return wide[:, :8]

    expected = results(low, problem.lora_B)
    for factors in ((widened(low), problem.lora_B), (low, widened(problem.lora_B))):
        for one, other in zip(results(*factors), expected, strict=True):
            close(one, other)


@pytest.mark.parametrize("tiles", ({"BLOCK_K": 16}, {"BLOCK_N": 16}, {"BLOCK_K": 64, "BLOCK_N": 64}), ids=str)
def test_tile_sizes_do_not_change_the_result(tiles, monkeypatch):
    problem = Problem.random(33, 70, 90, 20, DTYPE)
    arguments = (problem.weight, problem.lora_A, problem.lora_B, 0.75)
    expected = reference.norm(*arguments)[0]
    facts = devices.device_facts(problem.x.device)
    config = configs.config_for("norm", facts, DTYPE)
    changed = Config(**(vars(config) | tiles))
    monkeypatch.setattr(configs, "config_for", lambda kernel, *_: changed if kernel == "norm" else config)
    close(kernels.norm(*arguments)[0], expected)
