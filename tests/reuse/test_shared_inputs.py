"""fuse_shared_inputs: the same function as without, by one product for siblings; the report, and the operators."""

import copy
import functools

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import ops, options
from tests.support.problem import BACKENDS, DEVICE, Problem, core

pytest.importorskip("peft")

from tests.support.llama_problem import step, stock_llama  # noqa: E402
from tests.support.peft_problem import assert_as_good, enabled, exact_tensors, layers, tensors  # noqa: E402
from tests.support.quantized_problem import FORMATS  # noqa: E402
from tests.support.shared_problem import CLOSE, WIDTHS, Attention, attention, batch, net_of, pair, products, shared  # noqa: E402, F401

ones = functools.partial(torch.ones, device=DEVICE)
# weight and adapters, autocast, whether PEFT makes half-precision adapters float32
PRECISIONS = {
    "fp32": (torch.float32, None, True),
    "bf16": (torch.bfloat16, None, False),
    "fp16": (torch.float16, None, False),
    "wide adapters": (torch.bfloat16, None, True),
    "autocast": (torch.float32, torch.bfloat16, True),
}


class Cross(nn.Module):
    """An attention whose name says that k and v read another x."""

    def __init__(self):
        super().__init__()
        self.encoder_attn = Attention()

    def forward(self, x):
        return self.encoder_attn(x)


class Backwards(Attention):
    """v first."""

    def forward(self, x):
        v, k, q = self.v_proj(x), self.k_proj(x), self.q_proj(x)
        return torch.cat([q, k, v], -1)


class TestTheSameFunction:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_as_good_as_stock(self, precision, backend):
        dtype, autocast, cast = PRECISIONS[precision]
        model = attention(dtype, autocast_adapter_dtype=cast)
        x, dy = batch(dtype)
        exact, stock = exact_tensors(model, x, dy, autocast=autocast), tensors(model, x, dy, autocast=autocast)
        model = shared(copy.deepcopy(model))
        with options(backend=backend), products(1, 1):
            ours = tensors(model, x, dy, autocast=autocast)
        assert_as_good(ours, stock, exact)
        assert len(ours) == 2 + 9

    @pytest.mark.parametrize("format", ("nf4", "int8", "hqq"))
    def test_a_quantised_base(self, format):
        def net():
            net = Attention()
            for name in WIDTHS:
                setattr(net, name, FORMATS[format](getattr(net, name), torch.float32))
            net.is_loaded_in_4bit, net.is_loaded_in_8bit = format == "nf4", format == "int8"
            return net

        model = enabled(attention(net=net))
        x, dy = batch()
        expected = tensors(model, x, dy)
        with products(1, 1):
            torch.testing.assert_close(tensors(shared(model), x, dy), expected, **CLOSE)

    @pytest.mark.parametrize("way", ("split", "merged"))
    def test_both_ways_and_exactly(self, way):
        model = attention(torch.float64)
        x, dy = batch(torch.float64)
        expected = tensors(model, x, dy)
        with options(way=way), products(1, 1):
            actual = tensors(shared(model), x, dy)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("checkpointing", (None, False, True))
    def test_llama(self, checkpointing):
        """Grouped queries, seven DoRA layers in each of two blocks, and transformers' own checkpointing."""
        stock = stock_llama(layers=2)
        ids = torch.randint(64, (2, 8), device=DEVICE)
        expected, apart = step(stock, ids), step(enabled(stock), ids)
        model = shared(copy.deepcopy(stock))
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        # a reentrant first pass has no gradients, and shares nothing
        with products(8 if checkpointing is False else 4, 4):
            actual = step(model, ids)
        torch.testing.assert_close(actual, apart, **CLOSE)
        torch.testing.assert_close(actual, expected, **CLOSE)
        assert len(actual) == 1 + 14 * 3

    @pytest.mark.parametrize("net, forward, backward", ((Attention, 2, 2), (Cross, 1, 1)))
    def test_k_and_v_of_another_x(self, net, forward, backward):
        """With the query in the group or not, as the name says."""
        apart = enabled(attention(net=net))
        model = shared(copy.deepcopy(apart))
        (x, dy), (other, _) = batch(), batch(seed=1)
        for one in (apart, model):
            part = net_of(one).encoder_attn if net is Cross else net_of(one)
            part.other = other.clone().requires_grad_()
        expected = tensors(apart, x, dy)
        with products(forward, backward):
            actual = tensors(model, x, dy)
        torch.testing.assert_close(actual, expected, **CLOSE)
        torch.testing.assert_close(part.other.grad, apart_part(apart, net).other.grad, **CLOSE)

    def test_another_order(self):
        apart = enabled(attention(net=Backwards))
        x, dy = batch()
        expected = tensors(apart, x, dy)
        with products(1, 1):
            torch.testing.assert_close(tensors(shared(apart), x, dy), expected, **CLOSE)

    @pytest.mark.parametrize("shape", ((1, 24), (2, 3, 24), (0, 24), (2, 0, 24)))
    def test_shapes_of_x(self, pair, shape):  # noqa: F811
        x, dy = batch(shape=shape)
        expected = tensors(pair[0], x, dy)
        with products(1, 1):
            torch.testing.assert_close(tensors(pair[1], x, dy), expected, **CLOSE)

    def test_eval_mode_and_frozen_adapters(self, pair):  # noqa: F811
        x, dy = batch()
        expected = tensors(pair[0], x, dy)
        with products(2, 2), dora_kernels.frozen_adapters(pair[1], keep_merged=True):
            for _ in range(2):
                torch.testing.assert_close(tensors(pair[1], x, dy), expected, **CLOSE)
        pair[1].eval()
        with products(2, 2):
            for _ in range(2):
                torch.testing.assert_close(tensors(pair[1], x, dy), expected, **CLOSE)

    def test_compiled(self, pair):  # noqa: F811
        """Nothing is shared, and nothing breaks the graph."""
        x, dy = batch()
        expected = tensors(pair[0], x, dy)
        torch.compiler.reset()  # other files compile the same functions, which Dynamo does a few times only
        call = torch.compile(pair[1], backend="aot_eager", fullgraph=True)
        with products(0, 0):
            torch.testing.assert_close(tensors(pair[1], x, dy, call=call), expected, **CLOSE)


def apart_part(model, net):
    return net_of(model).encoder_attn if net is Cross else net_of(model)


class TestReport:
    def test_who_shares_with_whom(self):
        report = dora_kernels.enable(stock_llama(layers=2), fuse_shared_inputs=True)
        (_, k, _, o, gate, up, down), prefix = report.layers[:7], "base_model.model.model.layers.0."
        assert k.shares_with == tuple(prefix + f"self_attn.{name}_proj" for name in "qv")
        assert gate.shares_with == (prefix + "mlp.up_proj",) and up.shares_with == (prefix + "mlp.gate_proj",)
        assert o.shares_with == down.shares_with == ()
        assert "10 share the product of x and lora_A, in 4 groups" in str(report)

    def test_without_it_nothing_is_said(self):
        assert "share" not in str(dora_kernels.enable(attention()))

    def test_layers_of_different_widths_are_no_group(self):
        model = attention()
        net_of(model).k_proj.in_features = 25
        report = dora_kernels.enable(model, fuse_shared_inputs=True)
        assert not any(layer.shares_with for layer in report.layers)

    def test_what_is_asked_has_to_be_a_bool(self):
        model = attention()
        with pytest.raises(ValueError, match="enable: fuse_shared_inputs is 'yes'; expected True or False"):
            dora_kernels.enable(model, fuse_shared_inputs="yes")
        assert not any("DoraKernels" in type(layer).__name__ for layer in layers(model))


class TestTheOperators:
    @pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    def test_opcheck(self, dtype, backend):
        problem = Problem.random(5, 12, 10, 3, dtype, torch.float32)
        lora_As = [problem.lora_A, problem.lora_A[:2]]
        torch.library.opcheck(ops.shared_low, (problem.x, lora_As, torch.float32, backend))
        low = ops.shared_low(problem.x, lora_As, torch.float32, backend)
        assert low.shape == (5, 5)
        dlows = list(low.split([3, 2], 1))
        torch.library.opcheck(ops.shared_low_backward, (problem.x, dlows, torch.float32, backend))
        first, second = ops.shared_low_backward(problem.x, dlows, torch.float32, backend)
        assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()

    @pytest.mark.parametrize("way", ("split", "merged"))
    def test_a_given_low(self, way):
        """dA comes through it alone; its own gradient is that of low in the formula."""
        problem = Problem.random(5, 12, 10, 3, torch.float64)

        def given(x, weight, lora_A, *arguments):
            low = x.detach() @ lora_A.T
            return core(x, weight, lora_A, *arguments, low=low)

        with options(way=way):
            torch.testing.assert_close(problem.run(given), problem.exact(), rtol=1e-9, atol=1e-9)
            doubled = problem.run(lambda x, W, A, *more: core(x, W, A, *more, low=2 * (x.detach() @ A.T)))
        torch.testing.assert_close(doubled["lora_B"], 2 * problem.exact()["lora_B"], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        "low, more, message",
        (
            (ones(5, 2), {}, r"low is torch.float32 \(5, 2\); expected torch.float32 \(5, 3\)"),
            (ones(5, 3, dtype=torch.float64), {}, "low is torch.float64"),
            (ones(5, 3, device="meta"), {}, "low is on meta but lora_A is on .*; expected one device"),
            (ones(5, 3), {"norm_grad": True}, "low is given with x_dropped or norm_grad"),
            (ones(5, 3), {"x_dropped": ones(5, 10)}, "low is given with x_dropped or norm_grad"),
        ),
    )
    def test_a_low_that_does_not_fit(self, low, more, message):
        problem = Problem.random(5, 12, 10, 3, torch.float32)
        arguments = (problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, 1.0)
        with pytest.raises(ValueError, match="dora_linear: " + message):
            core(*arguments, low=low, **more)
