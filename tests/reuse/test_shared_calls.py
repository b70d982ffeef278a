"""fuse_shared_inputs: which calls may not share, what is kept and for how long, and copies."""

import copy
import functools
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_kernels
from dora_kernels import options, reuse
from dora_kernels.reuse import sharing
from tests.support.problem import DEVICE

pytest.importorskip("peft")

from tests.support.peft_problem import calls, enabled, layers, tensors  # noqa: E402
from tests.support.shared_problem import CLOSE, WIDTHS, attention, batch, net_of, pair, products, shared  # noqa: E402, F401


class TestWhatMayNotBeShared:
    """k is called after q, with something changed in between: it must not take what q made."""

    def both(self, pair, between, forward=2):  # noqa: F811
        """k's output and gradients where `between(net, x)` gives k's x, apart and shared."""
        results = []
        for model, counted in zip(pair, ((0, 0), (forward, 1)), strict=True):
            net, x = net_of(model), batch()[0].requires_grad_()
            with products(*counted):
                q = net.q_proj(x)
                x = between(net, x)
                y = net.k_proj(x)
                dx, dA = torch.autograd.grad(y.square().sum(), (x, net.k_proj.lora_A["default"].weight))
            del q
            results.append((y, dx, dA))
        torch.testing.assert_close(*results, **CLOSE)
        assert results[0][2].abs().max() > 0

    def test_nothing_changed(self, pair):  # noqa: F811
        """The others fail for what they change, and not for how they call."""
        self.both(pair, lambda net, x: x, forward=1)

    def test_x_written_to(self, pair):  # noqa: F811
        def write(net, x):
            x.data = x.data.clone()  # what q saved stays as it was
            with torch.no_grad():
                x.add_(1)
            return x

        self.both(pair, write)

    def test_an_equal_x(self, pair):  # noqa: F811
        self.both(pair, lambda net, x: x.detach().clone().requires_grad_())

    def test_lora_A_written_to(self, pair):  # noqa: F811
        def write(net, x):
            with torch.no_grad():
                net.k_proj.lora_A["default"].weight.mul_(2)
            return x

        self.both(pair, write)

    def test_lora_A_replaced(self, pair):  # noqa: F811
        def replace(net, x):
            lora_A = net.k_proj.lora_A["default"]
            lora_A.weight = nn.Parameter(2 * lora_A.weight.detach())
            return x

        self.both(pair, replace)

    def test_another_autocast(self, pair):  # noqa: F811
        x, _ = batch()
        net = net_of(pair[1])
        with products(2, 0):
            q = net.q_proj(x)
            with torch.autocast(DEVICE, torch.bfloat16):
                k = net.k_proj(x)
        assert q.dtype == torch.float32 and k.dtype == torch.bfloat16

    def test_another_backend(self, pair):  # noqa: F811
        x, _ = batch()
        with products(2, 0):
            q = net_of(pair[1]).q_proj(x)
            with options(backend="triton"):
                net_of(pair[1]).k_proj(x)
        del q

    def test_after_the_backward_pass(self, pair):  # noqa: F811
        """The graph that made it is gone, though q's output holds it."""

        def backward(net, x):
            q = net.q_proj(x)
            q.sum().backward()
            x.grad, net.held = None, q
            return x

        results = []
        for model, made in zip(pair, (0, 2), strict=True):
            net, x = net_of(model), batch()[0].requires_grad_()
            with products(made, made):
                y = net.k_proj(backward(net, x))
                results.append((y, *torch.autograd.grad(y.sum(), (x, net.k_proj.lora_A["default"].weight))))
        torch.testing.assert_close(*results, **CLOSE)

    @pytest.mark.parametrize("config", ({"lora_dropout": 0.5}, {"adapters": 2}), ids=("dropout", "two adapters"))
    def test_calls_of_another_kind(self, config):
        model = enabled(attention(**config))
        x, dy = batch()
        expected = tensors(model, x, dy)
        with products(0, 0):
            torch.testing.assert_close(tensors(shared(model), x, dy), expected, rtol=0, atol=0)

    def test_dropout_in_eval_mode(self):
        model = enabled(attention(lora_dropout=0.5)).eval()
        x, dy = batch()
        expected = tensors(model, x, dy)
        with products(1, 1):
            torch.testing.assert_close(tensors(shared(model), x, dy), expected, **CLOSE)

    def test_without_gradients(self, pair):  # noqa: F811
        x, _ = batch()
        with products(0, 0), torch.no_grad():
            torch.testing.assert_close(pair[1](x), pair[0](x), rtol=0, atol=0)
        with products(0, 0), torch.inference_mode():
            pair[1](x)

    def test_a_member_that_is_not_trained_or_not_ours(self, pair):  # noqa: F811
        x, dy = batch()
        for model in pair:
            net_of(model).k_proj.lora_A.requires_grad_(False)
        expected = tensors(pair[0], x, dy)
        with products(1, 1):
            torch.testing.assert_close(tensors(pair[1], x, dy), expected, **CLOSE)
        for model in pair:
            net_of(model).v_proj.enable_adapters(False)
        expected = tensors(pair[0], x, dy)
        with products(0, 0):  # q alone
            torch.testing.assert_close(tensors(pair[1], x, dy), expected, rtol=0, atol=0)

    def test_a_member_that_drops_alone(self, pair):  # noqa: F811
        x, dy = batch()
        for model in pair:
            net_of(model).k_proj.lora_dropout["default"] = nn.Dropout(0.5)
        expected = tensors(pair[0], x, dy)
        with products(1, 1):
            torch.testing.assert_close(tensors(pair[1], x, dy), expected, **CLOSE)

    def test_a_member_that_is_merged_or_disabled(self, pair):  # noqa: F811
        """Nothing is made for it."""
        net = net_of(pair[1])
        for end in (lambda: net.k_proj.merge(), lambda: setattr(net.v_proj, "_disable_adapters", True)):
            end()
            q = net.q_proj(batch()[0])
            last = net.q_proj.dora_shared.group.thread
            waiting = last.lows() if hasattr(last, "lows") else None
            names = [] if waiting is None else [member.layer() for member in waiting.waiting]
            assert names == ([] if net.v_proj.disable_adapters else [net.v_proj])
            del q, waiting, names

    def test_what_is_not_used_has_no_gradient(self, pair):  # noqa: F811
        net = net_of(pair[1])
        q = net.q_proj(batch()[0])
        factors = [layer.lora_A["default"].weight for layer in (net.q_proj, net.k_proj)]
        of_q, of_k = torch.autograd.grad(q.sum(), factors, allow_unused=True)
        assert of_q is not None and of_k is None


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", (False, True))
    def test_the_whole(self, pair, use_reentrant):  # noqa: F811
        x, dy = batch()
        expected = tensors(pair[0], x, dy)
        call = functools.partial(checkpoint, pair[1], use_reentrant=use_reentrant)
        with products(1 if use_reentrant else 2, 1):
            torch.testing.assert_close(tensors(pair[1], x, dy, call=call), expected, **CLOSE)

    @pytest.mark.parametrize("inside", (("k_proj",), ("q_proj",), ("q_proj", "k_proj", "v_proj")))
    @pytest.mark.parametrize("use_reentrant", (False, True))
    def test_regions_of_single_layers(self, pair, inside, use_reentrant):  # noqa: F811
        """A region recomputes what it has saved, so it may not have taken it from another."""
        x, dy = batch()
        expected = tensors(pair[0], x, dy)
        for name in inside:
            layer = getattr(net_of(pair[1]), name)
            forward = functools.partial(type(layer).forward, layer)
            setattr(net_of(pair[1]), name, Checkpointed(layer, forward, use_reentrant))
        before = calls("shared_low")
        actual = tensors(pair[1], x, dy)
        assert calls("shared_low") > before
        actual = {name.replace(".layer.", "."): value for name, value in actual.items()}
        torch.testing.assert_close(actual, expected, **CLOSE)


class Checkpointed(nn.Module):
    def __init__(self, layer, call, use_reentrant):
        super().__init__()
        self.layer, self.call, self.use_reentrant = layer, call, use_reentrant

    def forward(self, x):
        return checkpoint(self.call, x, use_reentrant=self.use_reentrant)


def test_threads(pair):  # noqa: F811
    """Each with an x of its own, at the same time, over one model."""
    names = [name for name, parameter in pair[0].named_parameters() if parameter.requires_grad]
    problems = [batch(seed=seed) for seed in range(4)]

    def gradients(model, x, dy):
        parameters = dict(model.named_parameters())
        return torch.autograd.grad(model(x), [parameters[name] for name in names], dy)

    expected = [gradients(pair[0], *problem) for problem in problems]
    actual, start = [None] * len(problems), threading.Barrier(len(problems))

    def run(at):
        start.wait()
        for _ in range(5):
            actual[at] = gradients(pair[1], *problems[at])

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(problems))]
    with products(20, 20):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_another_thread_in_between(pair):  # noqa: F811
    net, (x, _) = net_of(pair[1]), batch()
    kept = []
    with products(2, 0):
        kept.append(net.q_proj(x))
        thread = threading.Thread(target=lambda: kept.append(net.q_proj(batch(seed=1)[0])))
        thread.start()
        thread.join()
        kept.append(net.k_proj(x))


class TestNothingIsKept:
    def test_a_step_leaves_nothing(self, pair):  # noqa: F811
        x, dy = batch()
        x.requires_grad_()
        lows, made = [], sharing.SharedLow.apply
        gc.disable()
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sharing.SharedLow, "apply", lambda *a: [lows.append(t) or t for t in made(*a)])
                y = pair[1](x)
            references = [weakref.ref(low) for low in lows] + [weakref.ref(x)]
            lows.clear()
            y.backward(dy)
            del y, x
            assert len(references) == 4 and all(reference() is None for reference in references)
        finally:
            gc.enable()

    @pytest.mark.parametrize("backward", (False, True))
    def test_what_was_not_taken_goes_with_the_graph(self, pair, backward):  # noqa: F811
        x = batch()[0].requires_grad_()
        net = net_of(pair[1])
        gc.disable()
        try:
            q = net.q_proj(x)
            lows = net.q_proj.dora_shared.group.thread.lows
            assert [low.shape for _, _, low in lows().waiting.values()] == [(7, 3), (7, 4)]
            if backward:
                q.sum().backward()
                assert not lows().waiting
            references = [lows, weakref.ref(x)]
            del q, x
            assert all(reference() is None for reference in references)
        finally:
            gc.enable()

    def test_one_copy_of_x_is_saved_under_autocast(self, pair):  # noqa: F811
        x, _ = batch()
        sizes = []
        for model in pair:
            saved = {}
            with (
                torch.autograd.graph.saved_tensors_hooks(
                    lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
                ),
                torch.autocast(DEVICE, torch.bfloat16),
            ):
                y = model(x)
            sizes.append(sum(1 for t in saved.values() if t.shape == x.shape and t.dtype == torch.bfloat16))
            del y
        assert sizes == [3, 1]


class TestTheModelStaysWhatItIs:
    def test_state_dict_modules_and_parameters(self, pair):  # noqa: F811
        assert list(pair[0].state_dict()) == list(pair[1].state_dict())
        assert [name for name, _ in pair[0].named_modules()] == [name for name, _ in pair[1].named_modules()]

    @pytest.mark.parametrize("copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
    def test_copies_share_within_themselves(self, pair, copied):  # noqa: F811
        x, dy = batch()
        twin = copied(pair[1])
        groups = [{layer.dora_shared.group for layer in layers(model)} for model in (pair[1], twin)]
        assert all(len(group) == 1 for group in groups) and groups[0].isdisjoint(groups[1])
        for group, model in zip(groups, (pair[1], twin), strict=True):
            members = [member() for member in next(iter(group)).members]
            assert [member.layer() for member in members] == layers(model)
        expected = tensors(pair[0], x, dy)
        with products(1, 1):
            torch.testing.assert_close(tensors(twin, x, dy), expected, **CLOSE)

    def test_a_copy_of_one_layer_shares_with_nobody(self, pair):  # noqa: F811
        layer = net_of(pair[1]).q_proj
        twin = copy.deepcopy(layer)
        assert len(twin.dora_shared.group.members) == 1 and len(layer.dora_shared.group.members) == 3
        x = batch()[0]
        with products(0, 0):
            torch.testing.assert_close(twin(x), net_of(pair[0]).q_proj(x), rtol=0, atol=0)
        # as after DataParallel's replicate: the attributes of a layer in another module
        replica = layer.__new__(type(layer))
        replica.__dict__ = layer.__dict__.copy()
        with products(0, 0):
            replica(x)

    def test_disable_and_enable_end_it(self, pair):  # noqa: F811
        x, dy = batch()
        for end in (dora_kernels.disable, dora_kernels.enable):
            shared(pair[1])
            end(pair[1])
            assert not any("dora_shared" in vars(layer) for layer in layers(pair[1]))
            with products(0, 0):
                tensors(pair[1], x, dy)


def fused_step(model):
    lora_As = [net_of(model).get_submodule(name).lora_A["default"].weight for name in WIDTHS]
    for lora_A in lora_As:
        lora_A.grad = torch.ones_like(lora_A)
    versions = [lora_A._version for lora_A in lora_As]
    torch.optim.AdamW(lora_As, lr=0.1, fused=True).step()
    assert [lora_A._version for lora_A in lora_As] == versions
    for lora_A in lora_As:
        lora_A.grad = None


def write_and_invalidate(model):
    for name in WIDTHS:
        net_of(model).get_submodule(name).lora_A["default"].weight.data.mul_(2)
    dora_kernels.invalidate(model)


@pytest.mark.parametrize("change", (fused_step, write_and_invalidate))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_sibling_s_low_is_not_taken_beyond_a_write(dtype, change):
    """q made it for k, then k's lora_A changed and its version did not. The step is the first that anybody counts."""
    ours = shared(attention(dtype))
    x, _ = batch(dtype)
    reuse.store._counting = False
    net = net_of(ours)
    q = net.q_proj(x)
    change(ours)
    alone = enabled(copy.deepcopy(ours))
    expected = net_of(alone).k_proj(x)
    k = net.k_proj(x)
    torch.testing.assert_close(k, expected, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(y.float().square().sum(), [one.lora_A["default"].weight, one.lora_B["default"].weight])
        for y, one in ((k, net.k_proj), (expected, net_of(alone).k_proj))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    assert q.grad_fn is not None
