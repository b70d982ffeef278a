"""Tensor parallel DoRA layers are the whole layer: outputs, norms and every gradient, on two and four ranks."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from dora_kernels import DoraLinear, ops
from dora_kernels.extras import parallel, serving
from dora_kernels.reference import dora_linear_ref
from dora_kernels.testing import compare
from tests.support.problem import Problem
from tests.support.process_worlds import world

SIZES = (2, 4)
M, N, K, R = 7, 20, 24, 5
GRADIENTS = ("x", "lora_A", "lora_B", "magnitude", "bias")
SPLIT = {"column": ("weight", "lora_B", "magnitude", "bias"), "row": ("x", "x_dropped", "weight", "lora_A")}
FUNCTIONS = {"column": parallel.columnwise_dora_linear, "row": parallel.rowwise_dora_linear}


def problem(dtype, dropped):
    torch.manual_seed(5)
    made = Problem.random(M, N, K, R, dtype, device="cpu")
    with torch.no_grad():
        made.magnitude.mul_(1 + torch.rand(N, dtype=dtype))  # a gain far from 1
        made.weight[3], made.lora_B[3] = 0, 0  # a norm of 0
        if dropped:
            made.x_dropped = made.x * (torch.rand(M, K, dtype=dtype) > 0.5) * 2
    return made


def whole(made, dtype, norm_grad):
    """The definition in dtype: y and gradients by name."""
    tensors = {name: getattr(made, name).detach().to(dtype).requires_grad_() for name in GRADIENTS}
    tensors |= {"weight": made.weight.to(dtype), "scaling": made.scaling}
    if made.x_dropped is not None:
        tensors["x_dropped"] = made.x_dropped.detach().to(dtype).requires_grad_()
    y = dora_linear_ref(**tensors, norm_grad=norm_grad)
    y.backward(made.dy.to(dtype))
    return {"y": y.detach()} | {
        name: t.grad for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_leaf and t.requires_grad
    }


def shards_of(made, rank, size, split):
    """This rank's tensors of a layer that is split, by name; all but the weight want a gradient."""
    shards, dim = {}, {"column": 0, "row": -1}[split]
    for name in (*GRADIENTS, "x_dropped", "weight"):
        tensor = getattr(made, name)
        if tensor is not None:
            shard = tensor.detach().chunk(size, dim)[rank] if name in SPLIT[split] else tensor.detach()
            shards[name] = shard.clone().requires_grad_(name != "weight")
    return shards


def functional(rank, size, split, dtype, norm_grad, dropped):
    """This rank's y and gradients, by name, and how often our forward ran."""
    made = problem(dtype, dropped)
    shards, function = shards_of(made, rank, size, split), FUNCTIONS[split]
    ops.calls.clear()
    y = function(**shards, scaling=made.scaling, norm_grad=norm_grad)
    y.backward(made.dy.chunk(size, -1)[rank] if split == "column" else made.dy)
    gradients = {name: shard.grad for name, shard in shards.items() if name != "weight"}
    return {"y": y.detach()} | gradients, sum(n for (op, _), n in ops.calls.items() if op == "forward")


def joined(split, results):
    """The whole tensors; those that every rank has must be the same to the bit."""
    along = {
        "column": {"y": -1, "lora_B": 0, "magnitude": 0, "bias": 0},
        "row": {"x": -1, "x_dropped": -1, "lora_A": 1},
    }
    tensors = {}
    for name in results[0]:
        pieces = [result[name] for result in results]
        if name in along[split]:
            tensors[name] = torch.cat(pieces, along[split][name])
        else:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces), name
            tensors[name] = pieces[0]
    return tensors


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dropped", (False, True), ids=("plain", "dropout"))
@pytest.mark.parametrize("norm_grad", (False, True), ids=("constant", "norm_grad"))
@pytest.mark.parametrize("split", ("column", "row"))
def test_is_the_whole_layer(split, norm_grad, dropped, size):
    for dtype in (torch.float32, torch.float64):
        results = world(size).run(functional, split, dtype, norm_grad, dropped)
        assert all(count == 1 for _, count in results)
        ours = joined(split, [tensors for tensors, _ in results])
        made = problem(dtype, dropped)
        exact, yardstick = whole(made, torch.float64, norm_grad), whole(made, dtype, norm_grad)
        assert ours.keys() == exact.keys()
        for name, value in ours.items():
            comparison = compare(name, value, yardstick[name], exact[name])
            assert comparison.limit < 1e-3, comparison
            assert comparison.error < 1e-13 if dtype == torch.float64 else comparison.ok, comparison


def rowwise_norm(rank, size, scale):
    made = problem(torch.float32, False)
    weight, lora_A = made.weight * scale, made.lora_A.detach() * scale
    shards = weight.chunk(size, 1)[rank], lora_A.chunk(size, 1)[rank].requires_grad_()
    lora_B = made.lora_B.detach().requires_grad_()
    norm = parallel.rowwise_norm(*shards, lora_B, made.scaling, norm_grad=True)
    norm.backward(torch.ones_like(norm))
    return norm.detach(), shards[1].grad, lora_B.grad


@pytest.mark.parametrize("large", (False, True))
def test_rowwise_norm(large):
    """large: the squares of each half fit into float32, and their sum does not."""
    made, scale = problem(torch.float32, False), 1.0
    weight, lora_A, lora_B = (t.detach().double() for t in (made.weight, made.lora_A, made.lora_B))
    if large:
        halves = (weight + made.scaling * lora_B @ lora_A).unflatten(1, (2, K // 2))
        scale = (1.8e19 / halves.norm(dim=2).max()).item()
    results = world(2).run(rowwise_norm, scale)
    lora_A, lora_B = (lora_A * scale).requires_grad_(), lora_B.requires_grad_()
    norm = torch.linalg.vector_norm(weight * scale + made.scaling * lora_B @ lora_A, dim=1)
    rows = norm != 0
    norm[rows].sum().backward()
    assert not large or norm.detach().max() > 2e19
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][2], results[1][2])
    torch.testing.assert_close(results[0][0].double(), norm.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([r[1] for r in results], 1).double(), lora_A.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][2].double(), lora_B.grad, rtol=1e-4, atol=1e-5 * scale)


class Mlp(nn.Module):
    def __init__(self, dtype=torch.float64, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.up = DoraLinear(24, 22, rank=4, alpha=6.0, dtype=dtype, dropout=dropout)
        self.down = DoraLinear(22, 20, rank=3, alpha=6.0, dtype=dtype)
        for layer in (self.up, self.down):
            layer.lora_B.weight.data.normal_()
            layer.lora_magnitude_vector.data.mul_(1.5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


PLAN = {"up": parallel.DoraColwise, "down": parallel.DoraRowwise}


def steps(model, x):
    """Losses of five steps, clipped, and the outputs in eval mode."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=False)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.1, foreach=False)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        outputs = [model(x), model(x)]
        for parameter in parameters:  # a norm that was kept would be stale
            parameter.mul_(1.5)
        if isinstance(model, FSDPModule):
            model.reshard()
        return losses, [*outputs, model(x)]


def mlp_inputs():
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def split_mlp(rank, size, both):
    """Losses and outputs of a split Mlp, its state dict's shapes, and its whole tensors; 2D with `both`."""
    model = Mlp()
    mesh = init_device_mesh("cpu", (2, size // 2) if both else (size,), mesh_dim_names=("data", "tensor")[not both :])
    parallelize_module(model, mesh["tensor"], {name: style() for name, style in PLAN.items()})
    if both:
        fully_shard(model, mesh=mesh["data"])
    losses, outputs = steps(model, mlp_inputs())
    state = get_model_state_dict(model)
    assert all(isinstance(value, DTensor) for value in state.values())
    return losses, outputs, {name: value.full_tensor() for name, value in state.items()}


@pytest.mark.parametrize("size, both", ((2, False), (4, False), (4, True)), ids=("2", "4", "4 with fully_shard"))
def test_a_split_module_trains_as_the_whole_one(size, both):
    model = Mlp()
    losses, outputs = steps(model, mlp_inputs())
    expected = model.state_dict()
    for its_losses, its_outputs, state in world(size).run(split_mlp, both):
        torch.testing.assert_close(its_losses, losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(its_outputs, outputs, rtol=1e-11, atol=1e-11)
        assert state.keys() == expected.keys()
        torch.testing.assert_close(state, dict(expected), rtol=1e-9, atol=1e-9)


def refusals(rank, size):
    """Each refused call's message."""
    mesh, messages = init_device_mesh("cpu", (size,)), []
    layer, merged, split = Mlp().up, Mlp().up, parallel.shard_dora_linear(Mlp().up, mesh, "row")
    merged.merge()
    before = layer.weight
    made = problem(torch.float64, False)
    tensors = (made.x, made.weight, made.lora_A[:, 1:], made.lora_B, made.magnitude, made.scaling)
    for call in (
        lambda: parallel.shard_dora_linear(nn.Linear(4, 4), mesh, "row"),
        lambda: parallel.shard_dora_linear(layer, mesh, "rows"),
        lambda: parallel.shard_dora_linear(merged, mesh, "row"),
        lambda: parallel.shard_dora_linear(split, mesh, "row"),
        lambda: parallel.shard_dora_linear(DoraLinear(4, 4, 2, 2.0, dropout=0.5, dropout_on="lora"), mesh, "row"),
        lambda: parallel.shard_dora_linear(DoraLinear(1, 4, 2, 2.0), mesh, "row"),
        lambda: parallel.shard_dora_linear(DoraLinear(4, 1, 2, 2.0), mesh, "column"),
        split.merge,
        split.unmerge,
        split.reset_adapter,
        lambda: split.merge(safe_merge=True),
        lambda: serving.norms_and_gains(nn.Sequential(split)),
        lambda: parallel.rowwise_dora_linear(*tensors),
        lambda: parallel.columnwise_dora_linear(*tensors),
        lambda: split(torch.ones(2, 24, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    whole_and_split = nn.Sequential(Mlp().up, split, Mlp().up)
    left = serving.merge_model(whole_and_split)
    assert [type(layer) for layer in whole_and_split] == [nn.Linear, parallel.ParallelDoraLinear, nn.Linear]
    assert list(left) == ["1"]
    messages.append(left["1"])
    assert type(layer) is DoraLinear and layer.weight is before
    return messages


def test_refusals():
    expected = (
        "layer is a Linear; expected a DoraLinear",
        "split is 'rows'; expected one of column, row",
        "layer is merged; expected a dense weight",
        "layer is a ParallelDoraLinear; expected a DoraLinear",
        "dropout_on is 'lora'; expected 'adapter'",
        "in_features is 1; expected at least 2",
        "out_features is 1; expected at least 2",
        "merge: the layer is split row-wise",
        "unmerge: the layer is split row-wise",
        "reset_adapter: the layer is split row-wise",
        "merge: the layer is split row-wise",
        "norm_and_gain: the layer is split row-wise",
        "rowwise_dora_linear: lora_A has shape (5, 23)",
        "columnwise_dora_linear: lora_A has shape (5, 23)",
        "rowwise_dora_linear: x has shape (2, 24) but weight has shape (22, 12)",
        "merged_weight_and_bias: the layer is split row-wise",
    )
    for messages in world(2).run(refusals):
        for message, part in zip(messages, expected, strict=True):
            assert part in message
    assert not distributed.is_initialized()  # in this process, which asks the ranks


@pytest.mark.parametrize("function", (parallel.columnwise_dora_linear, parallel.rowwise_dora_linear))
def test_norm_grad_is_checked_before_anything_is_sent(function):
    """There is no process group here to send to."""
    made = problem(torch.float64, False)
    arguments = (made.x, made.weight, made.lora_A, made.lora_B, made.magnitude, made.scaling)
    with pytest.raises(ValueError, match=f"^{function.__name__}: norm_grad is 1; expected True or False"):
        function(*arguments, norm_grad=1)
    with pytest.raises(ValueError, match="^rowwise_dora_linear: norm_grad is True and norm is given"):
        parallel.rowwise_dora_linear(*arguments, norm=made.magnitude, norm_grad=True)


def orders(loss_of, tensors, split_names, group_sum):
    """The gradients of a loss in `tensors` by name, those of the sum of their squares, and once more."""
    found, loss = [], loss_of()
    for order in range(3):
        gradients = torch.autograd.grad(loss, list(tensors.values()), create_graph=order < 2, allow_unused=True)
        gradients = [
            torch.zeros_like(tensor) if one is None else one
            for tensor, one in zip(tensors.values(), gradients, strict=True)
        ]
        found.append({name: one.detach() for name, one in zip(tensors, gradients, strict=True)})
        sums = {name: one.square().sum() for name, one in zip(tensors, gradients, strict=True)}
        loss = sum(group_sum(one) if name in split_names else one for name, one in sums.items())
    return found


def higher(rank, size, split, norm_grad, dropped):
    """This rank's first, second and third derivatives; and what a batch of gradients says."""
    made = problem(torch.float64, dropped)
    shards, function = shards_of(made, rank, size, split), FUNCTIONS[split]

    def group_sum(tensor):
        return parallel._sum(tensor, None)

    def loss():
        total = function(**shards, scaling=made.scaling, norm_grad=norm_grad).sin().sum()
        return group_sum(total) if split == "column" else total

    leaves = {name: shard for name, shard in shards.items() if name != "weight"}
    found = orders(loss, leaves, SPLIT[split], group_sum)
    y = function(**shards, scaling=made.scaling, norm_grad=norm_grad)
    with pytest.raises(NotImplementedError, match="has a batch of gradients .* expected one at a time"):
        torch.autograd.grad(y, list(leaves.values()), torch.stack([y, y]), is_grads_batched=True)
    return found


@pytest.mark.parametrize("split", ("column", "row"))
@pytest.mark.parametrize(("norm_grad", "dropped"), ((False, True), (True, False)), ids=("dropout", "norm_grad"))
def test_higher_derivatives_are_the_whole_layers(split, norm_grad, dropped):
    results = world(2).run(higher, split, norm_grad, dropped)
    made = problem(torch.float64, dropped)
    leaves = {name: getattr(made, name) for name in (*GRADIENTS, "x_dropped")}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items() if t is not None}

    def loss():
        return dora_linear_ref(**leaves, weight=made.weight, scaling=made.scaling, norm_grad=norm_grad).sin().sum()

    for order, exact in enumerate(orders(loss, leaves, (), None)):
        ours = joined(split, [{"y": torch.zeros(1)} | result[order] for result in results])
        for name, value in exact.items():
            assert value.norm() > 0 and (ours[name] - value).norm() <= 1e-12 * value.norm(), (order, name)


def higher_of_dtensors(rank, size, split):
    """First and second derivatives of an Mlp, whole; of one whose parameters are DTensors with `split`."""
    model, x = Mlp(), mlp_inputs().requires_grad_()
    if split:
        plan = {name: style() for name, style in PLAN.items()}
        parallelize_module(model, init_device_mesh("cpu", (size,)), plan)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"x": x}
    results, loss = [], model(x).sin().sum()
    for order in range(2):
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=order == 0)
        found = [one.full_tensor() if isinstance(one, DTensor) else one for one in found]
        loss = sum(one.square().mean() for one in found)
        results.append({name: one.detach() for name, one in zip(leaves, found, strict=True)})
    return results


def test_second_derivatives_of_dtensors():
    """torch 2.11 ends the graph of a gradient in DTensor.to_local, and that of full_tensor() one order later."""
    whole = higher_of_dtensors(0, 1, False)
    for ours in world(2).run(higher_of_dtensors, True):
        for order, tensors in enumerate(whole):
            for name, exact in tensors.items():
                error = (ours[order][name] - exact).norm()
                assert exact.norm() > 0 and error <= 1e-11 * exact.norm(), (order, name)
