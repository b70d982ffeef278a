"""What enable() promises of a library's DoRA layers, as checks that run on the library's own class.

A test file lists Cases, and runs each of CHECKS on each of them. The measure of every number is the stock layer in the
same dtypes, both against the stock layer in float64.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dora_kernels
from dora_kernels import ops, options
from dora_kernels.adapters.taking import TakenOver
from dora_kernels.testing import compare, rms_error
from dora_kernels.testing.run import random_like, shared_dropout
from tests.support.problem import DEVICE

STEPS = 10
Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """One kind of layer of one library's.

    build(shapes, dtype): a stock model on DEVICE in train mode, with adapters that have B != 0 and a gain far from 1
        (see `randomise`), and an x for it. shapes draws sizes; torch's own generator is seeded.
    exact(model): the same model in float64.
    call(model, x): y.
    """

    build: Callable[[random.Random, torch.dtype], tuple[nn.Module, Tensor]]
    exact: Callable[[nn.Module], nn.Module] = lambda model: copy.deepcopy(model).double()
    call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        """The model and the x of `seed`."""
        torch.manual_seed(seed)
        model, x = self.build(random.Random(seed), dtype)
        return model.train(), x


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Trained tensors that are zero become random, and every magnitude is spread over 0.5 to 1.5 of its value."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(word in name for word in ("magnitude", "dora_scale", "weight_m")):
            parameter.mul_(0.5 + torch.rand_like(parameter))
        elif not parameter.any():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def enabled(model: nn.Module) -> nn.Module:
    """A copy of `model`, all its DoRA layers taken over."""
    model = copy.deepcopy(model)
    report = dora_kernels.enable(model)
    assert len(report) == len(report.taken_over) > 0, str(report)
    return model


def tensors(case: Case, model: nn.Module, x: Tensor, seed: int = 3) -> Tensors:
    """y, dx and the gradient of every trained parameter, by name; the dropout masks are the same for every dtype."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    with shared_dropout(seed):
        y = case.call(model, x)
    y.backward(random_like(y, seed))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "dx": x.grad} | gradients


def assert_as_good(ours: Tensors, stock: Tensors, exact: Tensors) -> None:
    """Each tensor as close to exact as the stock layer's, which passes through the output's dtype."""
    assert ours.keys() == stock.keys() == exact.keys()
    for name, value in ours.items():
        if stock[name] is None:
            assert value is None, f"{name} has a gradient, and none in the stock layer"
            continue
        assert value is not None, f"{name} has no gradient"
        assert value.dtype == stock[name].dtype and value.shape == stock[name].shape, name
        comparison = compare(name, value, stock[name], exact[name], through=ours["y"].dtype)
        assert comparison.limit < 0.2, comparison  # zeros have an error of 1
        assert comparison.ok, comparison


def check_parity(case: Case, backend: str, seed: int) -> None:
    """Output and every gradient, in train and in eval mode, in each dtype."""
    for dtype in case.dtypes:
        model, x = case.make(seed, dtype)
        for mode in (True, False):
            stock, exact, ours = model.train(mode), case.exact(model).train(mode), enabled(model)
            assert ours.training is mode
            expected = tensors(case, stock, x)
            ops.calls.clear()
            with options(backend=backend):
                actual = tensors(case, ours, x)
            assert {used for _, used in ops.calls} == {backend}, "not computed by dora_kernels"
            assert_as_good(actual, expected, tensors(case, exact, x.double()))


def check_training(case: Case, backend: str, seed: int) -> None:
    """STEPS steps of AdamW: the same losses, and they fall."""
    model, x = case.make(seed)
    target = None
    losses = []
    for each in (copy.deepcopy(model), enabled(model)):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(seed)
        losses.append([])
        for _ in range(STEPS):
            with options(backend=backend):
                y = case.call(each, x)
                target = torch.zeros_like(y) if target is None else target
                loss = nn.functional.mse_loss(y, target)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def check_inference(case: Case, backend: str, seed: int) -> None:
    """In eval mode as stock after each write to a parameter: outside `frozen_adapters` one that nobody sees."""
    model, x = case.make(seed)
    stock, ours = model.eval(), enabled(model)

    def assert_same() -> Tensor:
        with options(backend=backend), torch.no_grad():
            actual, expected = case.call(ours, x), case.call(stock, x)
        assert rms_error(actual, expected.double()) < 1e-5
        return expected

    def check_each(write: Callable[[Tensor], object]) -> None:
        first = assert_same()
        for name, parameter in stock.named_parameters():
            if not parameter.requires_grad:
                continue
            for each in (stock, ours):
                write(each.get_parameter(name))
            changed = assert_same()
            assert rms_error(changed, first.double()) > 1e-3, f"{name} does not matter: nothing was tested"
            first = changed

    check_each(lambda parameter: parameter.data.mul_(1.5))
    with dora_kernels.frozen_adapters(ours):
        check_each(lambda parameter: parameter.detach().mul_(0.6))


def check_no_trace(case: Case, backend: str, seed: int) -> None:
    """Names, parameters and state dict stay the library's; a copy is a layer of its own; disable undoes it all."""
    model, x = case.make(seed)
    stock, ours = model.eval(), enabled(model)
    names = [(name, isinstance(module, TakenOver)) for name, module in ours.named_modules()]
    assert any(taken for _, taken in names)
    assert [name for name, _ in names] == [name for name, _ in stock.named_modules()]
    for module, twin in zip(stock.modules(), ours.modules(), strict=True):
        assert isinstance(twin, type(module))
    _assert_same_state(ours, stock)

    with options(backend=backend), torch.no_grad():
        y = case.call(ours, x)
        twin = copy.deepcopy(ours)
        assert torch.equal(case.call(twin, x), y)
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        assert not torch.equal(case.call(twin, x), y)
        assert torch.equal(case.call(ours, x), y)
        classes = [type(module) for module in ours.modules()]
        dora_kernels.enable(ours)  # again
        assert [type(module) for module in ours.modules()] == classes
        assert torch.equal(case.call(ours, x), y)

    dora_kernels.disable(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in stock.modules()]
    _assert_same_state(ours, stock)
    ops.calls.clear()
    with torch.no_grad():
        assert torch.equal(case.call(ours, x), case.call(stock, x))
    assert not ops.calls


def check_enabled_again(case: Case, backend: str, seed: int) -> None:
    """enable() of a model that it has enabled, or of a copy of one, changes nothing, the meaning of dropout neither."""
    model, x = case.make(seed)
    ours = copy.deepcopy(model)
    dora_kernels.enable(ours, dropout="lora")
    for each in (ours, copy.deepcopy(ours)):
        classes = [type(module) for module in each.modules()]
        before = _seeded(case, each, x, backend)
        for again in (dora_kernels.enable(each), dora_kernels.enable(each)):
            assert len(again) == len(again.taken_over) > 0, str(again)
            assert [type(module) for module in each.modules()] == classes
            assert torch.equal(_seeded(case, each, x, backend), before)
        dora_kernels.enable(each, dropout="adapter")
        assert torch.equal(_seeded(case, each, x, backend), _seeded(case, enabled(model), x, backend))


def _seeded(case: Case, model: nn.Module, x: Tensor, backend: str) -> Tensor:
    """y with the same dropout mask each time, by our kernels."""
    torch.manual_seed(0)
    ops.calls.clear()
    with options(backend=backend), torch.no_grad():
        y = case.call(model, x)
    assert ops.calls, "not computed by dora_kernels"
    return y


def _assert_same_state(ours: nn.Module, stock: nn.Module) -> None:
    state, expected = ours.state_dict(), stock.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert type(state[name]) is type(value), name
        if type(value) is Tensor:  # of a quantized tensor there is no equal()
            assert torch.equal(state[name], value), name


CHECKS = {
    "parity": check_parity,
    "training": check_training,
    "inference": check_inference,
    "no trace": check_no_trace,
    "enabled again": check_enabled_again,
}
__all__ = ["CHECKS", "DEVICE", "Case", "assert_as_good", "enabled", "randomise", "tensors"]
