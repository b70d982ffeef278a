"""Activation checkpointing and hooks on saved tensors: gradients of a plain step to the bit, and one norm a step."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dora_kernels import DoraLinear, ops, options, reuse, weight_norm
from dora_kernels.functional.rescale import rescale
from tests.support.compile_problem import Recorder
from tests.support.problem import DEVICE

pytest.importorskip("peft")

from tests.support.llama_problem import llama, step  # noqa: E402
from tests.support.peft_problem import build, calls, enabled, tensors  # noqa: E402

EXACT = {"rtol": 0, "atol": 0}
REENTRANT = pytest.mark.parametrize("use_reentrant", (False, True))
FORWARD, NORM = torch.ops.dora_kernels.forward.default, torch.ops.dora_kernels.norm.default


class Rescaled(DoraLinear):
    """A DoRA layer in two pieces whose norm is kept, as layers over other bases are."""

    def forward(self, x):
        A, B = self.lora_A.weight, self.lora_B.weight
        arguments = (self.weight, A, B, self.scaling)
        norm = reuse.norm_reusing(self, arguments[:3], (self.scaling,), lambda: weight_norm(*arguments))
        return rescale(F.linear(x, self.weight), F.linear(x, A), B, self.lora_magnitude_vector / norm, self.scaling)


def rescaled_model():
    torch.manual_seed(0)
    layers = [
        Rescaled(*sizes, rank=5, alpha=7.0, bias=False, device=DEVICE) for sizes in ((24, 40), (40, 24), (24, 20))
    ]
    for layer in layers:
        nn.init.normal_(layer.lora_B.weight)
        layer.lora_magnitude_vector.data.mul_(1 + 0.5 * torch.randn(layer.out_features, device=DEVICE).tanh())
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


MODELS = {
    "peft": lambda: enabled(build()),
    "peft, dropout": lambda: enabled(build(lora_dropout=0.5)),
    "peft, two adapters": lambda: enabled(build(adapters=2)),
    "rescale": rescaled_model,
}


def batch():
    return torch.randn(5, 24, device=DEVICE), torch.randn(5, 20, device=DEVICE)


@REENTRANT
@pytest.mark.parametrize("name", MODELS)
def test_gradients_to_the_bit(name, use_reentrant):
    """y too, unless reentrant: then the first pass is one without gradients, for which plan.py has other ways."""
    model, (x, dy) = MODELS[name](), batch()
    plain = tensors(model, x, dy)
    call = functools.partial(checkpoint, model, use_reentrant=use_reentrant)
    checkpointed = tensors(model, x, dy, call=call)
    if use_reentrant:
        torch.testing.assert_close(checkpointed.pop("y"), plain.pop("y"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(checkpointed, plain, **EXACT)


@REENTRANT
@pytest.mark.parametrize("name", ("peft, dropout", "rescale"))
def test_one_norm_per_layer_and_step(name, use_reentrant, norms):
    model, (x, dy) = MODELS[name](), batch()
    layers = 2 if name.startswith("peft") else 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    call = functools.partial(checkpoint, model, use_reentrant=use_reentrant)
    for number in range(1, 4):
        plain = tensors(model, x, dy)
        norms.clear()
        torch.testing.assert_close(tensors(model, x, dy, call=call), plain, **EXACT)
        assert len(norms) == layers, number
        optimizer.step()


@REENTRANT
def test_transformers_gradient_checkpointing(use_reentrant, norms):
    model = llama(layers=2, lora_dropout=0.1)
    ids = torch.randint(64, (2, 8), device=DEVICE)
    plain = step(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    norms.clear()
    ops.calls.clear()
    torch.testing.assert_close(step(model, ids), plain, **EXACT)
    assert calls("forward") == 28 and calls("backward") == 14
    assert len(norms) == 14


def selective(saved):
    """checkpoint(), saving what the operators `saved` return, and recomputing everything else."""

    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize(
    "saved", ((), (FORWARD,), (NORM,), (FORWARD, NORM)), ids=("nothing", "forward", "norm", "forward and norm")
)
@pytest.mark.parametrize("name", MODELS)
def test_selective_checkpointing(name, saved):
    """It takes the n-th call of an operator for the n-th it saved: none may be left out of the recomputed pass."""
    model, (x, dy) = MODELS[name](), batch()
    plain = tensors(model, x, dy)
    ops.calls.clear()
    tensors(model, x, dy)
    once = calls("forward"), calls("norm")
    ops.calls.clear()
    call = functools.partial(selective(saved), model)
    torch.testing.assert_close(tensors(model, x, dy, call=call), plain, **EXACT)
    assert calls("forward") == once[0] * (1 if FORWARD in saved else 2)
    assert calls("norm") <= once[1] * (1 if NORM in saved else 2)
    assert NORM not in saved or calls("norm") == once[1]


def test_selective_checkpointing_where_one_layer_keeps_its_norm_and_another_cannot():
    """Left out for one layer, the norm saved for it would become the next layer's."""
    model, (x, dy) = rescaled_model(), batch()
    model[2].lora_B.weight.data = model[2].lora_B.weight.data.share_memory_()  # its address says nothing
    plain = tensors(model, x, dy)
    call = functools.partial(selective((NORM,)), model)
    torch.testing.assert_close(tensors(model, x, dy, call=call), plain, **EXACT)


# before it the partitioner saved what it should recompute: right numbers, and the memory of no checkpointing
needs_recomputed_functions = pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="mended in torch 2.12: https://github.com/pytorch/pytorch/pull/177396"
)


@pytest.mark.parametrize(
    "saved", (pytest.param(None, marks=needs_recomputed_functions), FORWARD), ids=("nothing", "forward")
)
def test_compiled_checkpointing(saved):
    """One graph; the operator is recomputed in the backward graph unless its results are saved."""
    torch._dynamo.reset()
    model, (x, dy), recorder = enabled(build()), batch(), Recorder()
    region = functools.partial(checkpoint, use_reentrant=False) if saved is None else selective((saved,))
    expected = tensors(model, x, dy)
    torch.testing.assert_close(
        tensors(model, x, dy, call=recorder.compile(lambda x: region(model, x))), expected, **EXACT
    )
    backward = {"backward": 2} if saved else {"backward": 2, "forward": 2}
    assert recorder.graphs == [("forward", {"forward": 2}), ("backward", backward)]
    torch._dynamo.reset()


HOOKED = MODELS | {"peft, bfloat16": lambda: enabled(build(dtype=torch.bfloat16))}


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_on_saved_tensors(name):
    """Every saved tensor passes through them, an ordinary one; what they return is what the backward pass reads."""
    model, (x, dy) = HOOKED[name](), batch()
    x = x.to(torch.bfloat16 if "bfloat16" in name else torch.float32)
    plain, packed, unpacked = tensors(model, x, dy), [], []

    def pack(tensor):
        assert type(tensor) in (torch.Tensor, nn.Parameter)
        packed.append(tensor)
        return tensor.detach().clone(memory_format=torch.preserve_format)

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor.clone(memory_format=torch.preserve_format)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        torch.testing.assert_close(tensors(model, x, dy), plain, **EXACT)
    assert len(packed) == len(unpacked) > 10
    if name in ("rescale", "peft, two adapters"):
        return  # here torch divides by the norm: 0 / 0
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.zeros_like):  # nothing is read past the hooks
        zeros = tensors(model, x, dy)
    for parameter in ("dx", *[key for key in zeros if "lora_" in key]):
        assert not zeros[parameter].any(), parameter


@pytest.mark.parametrize("pin", (False, pytest.param(True, marks=pytest.mark.gpu)))
def test_offload_to_the_cpu(pin):
    if pin and DEVICE == "cpu":
        pytest.skip("pinned memory needs a GPU")
    model, (x, dy) = enabled(build(lora_dropout=0.5)), batch()
    plain = tensors(model, x, dy)
    with torch.autograd.graph.save_on_cpu(pin_memory=pin):
        torch.testing.assert_close(tensors(model, x, dy), plain, **EXACT)


def test_a_second_backward_through_a_checkpoint_raises_torchs_error():
    model, (x, _) = enabled(build()), batch()
    loss = checkpoint(model, x.requires_grad_(), use_reentrant=False).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time|extra time"), options(backend="reference"):
        loss.backward()
