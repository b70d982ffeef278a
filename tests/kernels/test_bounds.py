"""No kernel writes outside of what it was given: guards stand before and after every tensor that a pass allocates."""

import math

import pytest
import torch

from tests.support.problem import DEVICE, Problem

pytest.importorskip("triton")

DTYPE = torch.float64 if DEVICE == "cpu" else torch.float32
GUARD, UNTOUCHED = 1024, 77.0
# ragged in every axis, a rank of one chunk exactly, one of everything: a mask that lets one element more through
# writes behind the last row
SHAPES = ((33, 70, 90, 20), (7, 24, 10, 33), (5, 20, 80, 33), (5, 12, 40, 16), (1, 1, 1, 1))


@pytest.fixture
def guards(monkeypatch):
    """The guards of everything allocated since; in between, fresh memory is NaN."""
    made = []

    def allocate(shape, dtype, device):
        size = math.prod(shape)
        whole = torch.full((size + 2 * GUARD,), UNTOUCHED, dtype=dtype, device=device)
        made.extend((whole[:GUARD], whole[GUARD + size :]))
        return whole[GUARD : GUARD + size].fill_(math.nan).view(shape)

    def new_empty(self, *shape, dtype=None, device=None, **_):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        return allocate(tuple(shape), dtype or self.dtype, device or self.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: allocate(tensor.shape, tensor.dtype, tensor.device))
    return made


@pytest.mark.parametrize("way", ("split", "merged"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "arguments", ({}, {"norm_grad": True}, {"dropout": 0.4}), ids=("plain", "norm_grad", "dropout")
)
def test_nothing_is_written_outside(arguments, shape, way, guards):
    problem = Problem.random(*shape, DTYPE, dropout=arguments.get("dropout", 0.0))
    results = problem.ours("triton", way, **({"norm_grad": True} if "norm_grad" in arguments else {}))
    assert len(guards) > 10 and all((guard == UNTOUCHED).all() for guard in guards)
    assert all(tensor.isfinite().all() for tensor in results.values())


def call(launcher: str, t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the launcher makes of the tensors."""
    from dora_kernels import kernels

    if launcher == "norm":
        return list(kernels.norm(t["weight"], t["lora_A"], t["lora_B"], 0.75, t["magnitude"]))
    if launcher == "merge":
        return [kernels.merge(t["weight"], t["lora_A"], t["lora_B"], t["gain"], 0.75)]
    if launcher == "project":
        return [kernels.project(t["x"], t["lora_A"], t["scale"])]
    if launcher == "epilogue":
        more = (t["gain"], t["bias"], 0.75, t["x"].dtype, t["residual"])
        return [kernels.epilogue(t["base"], t["low"], t["lora_B"], *more)]
    if launcher == "bank_epilogue":
        lora_B, gain, scaling = t["lora_B"].unsqueeze(0), t["gain"].unsqueeze(0), t["gain"].new_full((1,), 0.75)
        index = torch.arange(len(t["base"]), device=gain.device) % 3 - 1  # the frozen layer, the adapter, none of them
        return [kernels.bank_epilogue(t["base"], t["low"], lora_B, gain, scaling, t["bias"], index)]
    if launcher == "grouped_norm":
        return list(kernels.grouped_norm(*([t[name], t[name]] for name in GROUPED), [0.75, 0.5]))
    sums = {"outer": t["outer"], "dmagnitude": torch.empty_like(t["gain"])}
    keywords = {"gain": t["gain"], "kept": t["base"], "norm": t["gain"], "lora_B": t["lora_B"]}
    kernels.token_sums(t["dy"], t["low"], 0.75, **keywords, **sums)
    return list(sums.values())


def tensors_of(problem: Problem) -> dict[str, torch.Tensor]:
    """What the launchers take, by name."""
    tensors = {name: value for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    tensors |= {"base": problem.x @ problem.weight.T, "low": problem.x @ problem.lora_A.T, "residual": problem.dy + 1}
    gain = problem.magnitude.to(torch.promote_types(problem.x.dtype, torch.float32))
    return tensors | {"gain": gain, "scale": 1 + gain.new_ones(problem.x.shape[1]), "outer": 0 * problem.lora_B}


GROUPED = ("weight", "lora_A", "lora_B", "magnitude")
OPERANDS = {
    "norm": ("weight", "lora_A", "lora_B", "magnitude"),
    "merge": ("weight", "lora_A", "lora_B"),
    "project": ("x", "lora_A"),
    "epilogue": ("base", "low", "lora_B", "residual", "bias"),
    "bank_epilogue": ("base", "low", "bias"),
    "grouped_norm": GROUPED,
    "token_sums": ("dy", "low", "base", "lora_B", "outer"),
}


def hemmed(tensor: torch.Tensor, contiguous: bool) -> torch.Tensor:
    """The same numbers with NaN all around them; with NaN before and behind them, where they must be contiguous."""
    hem = 64
    if contiguous:
        memory = torch.full((tensor.numel() + 2 * hem,), math.nan, dtype=tensor.dtype, device=tensor.device)
        return memory[hem:-hem].view(tensor.shape).copy_(tensor)
    memory = torch.full([size + 2 * hem for size in tensor.shape], math.nan, dtype=tensor.dtype, device=tensor.device)
    inner = memory[tuple(slice(hem, hem + size) for size in tensor.shape)]
    return inner.copy_(tensor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("launcher", OPERANDS)
def test_nothing_is_read_outside(launcher, shape, monkeypatch):
    """What lies around an operand is NaN, and 0 * NaN would show, too."""
    monkeypatch.setattr("dora_kernels.planning.plan.project_by_kernel", lambda *arguments, **keywords: True)
    tensors = tensors_of(Problem.random(*shape, DTYPE))
    expected = [tensor.clone() for tensor in call(launcher, tensors)]
    for operand in OPERANDS[launcher]:
        actual = call(launcher, tensors | {operand: hemmed(tensors[operand], launcher == "grouped_norm")})
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
