"""The operators obey torch.library's rules: schema, fake results, autograd registration, tracing."""

import inspect
import operator
import re
from types import NoneType

import pytest
import torch

from dora_kernels import ops
from dora_kernels.quant import QuantizedWeight, flatten_weight
from dora_kernels.types import Call, DoraWeight, Given, How, Needs, Saved
from tests.support.problem import BACKENDS, EXACT_DTYPE, Problem

DTYPES = (torch.float32, torch.bfloat16)
# opcheck calls the bare operators, whose autograd lives in functional/autograd.py
pytestmark = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")


def forward_arguments(problem, backend, keep, dropped, norm=None, exact=False):
    x_dropped = (problem.x + 1).detach().requires_grad_(problem.x.requires_grad) if dropped else None
    return (
        problem.x, x_dropped, *flatten_weight(problem.weight), problem.lora_A, problem.lora_B,
        problem.magnitude, problem.bias, norm, None, 0.75, problem.x.dtype, "auto", keep, bool(keep), exact, backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_merge(dtype, requires_grad, transposed, backend):
    problem = Problem.random(5, 12, 10, 3, dtype)
    weight = problem.weight.T.contiguous().T if transposed else problem.weight
    lora_A, lora_B = (tensor.requires_grad_(requires_grad) for tensor in (problem.lora_A, problem.lora_B))
    torch.library.opcheck(ops.norm, (*flatten_weight(weight), lora_A, lora_B, 0.75, dtype, backend))
    gain = torch.ones(12, device=weight.device)
    torch.library.opcheck(ops.merge, (*flatten_weight(weight), lora_A, lora_B, gain, 0.75, dtype, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("keep", "dropped", "exact"),
    (
        ("", False, False),
        ("base", False, True),
        ("z_gemm", False, False),
        ("z_merged", False, False),
        ("base", True, False),
    ),
)
@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(dtype, requires_grad, keep, dropped, exact, backend):
    problem = Problem.random(5, 12, 10, 3, dtype)
    for name in ("x", "lora_A", "lora_B", "magnitude", "bias"):
        getattr(problem, name).requires_grad_(requires_grad)
    arguments = forward_arguments(problem, backend, keep, dropped, exact=exact)
    torch.library.opcheck(ops.forward, arguments)
    with torch.no_grad():
        _, norm, gain, low, kept = ops.forward(*arguments)
    needs = [True, dropped, True, bool(keep), bool(keep), True]
    torch.library.opcheck(
        ops.backward,
        (
            problem.dy, problem.x.detach(), *flatten_weight(problem.weight), problem.lora_A, problem.lora_B, norm, gain,
            low if keep else None, kept if keep else None, None, 0.75, dtype, "auto", keep, dropped, False, needs,
            torch.float32, dtype, backend,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtypes", "layout"),
    (
        ((torch.float16, torch.float16), "transposed"),
        ((torch.bfloat16, torch.float32), "expanded"),
        ((EXACT_DTYPE, EXACT_DTYPE), "every other"),
    ),
    ids=str,
)
def test_dtypes_and_layouts(dtypes, layout, backend):
    """Outputs keep the shapes, dtypes and strides that the fake says whatever the strides of the inputs are."""
    problem = Problem.random(5, 12, 10, 3, *dtypes)

    def laid_out(tensor: torch.Tensor) -> torch.Tensor:
        if layout == "expanded":
            return tensor[:1].expand(tensor.shape)
        if layout == "transposed":
            return tensor.T.contiguous().T if tensor.dim() == 2 else tensor
        return tensor.new_empty((*tensor.shape, 2))[..., 0].copy_(tensor)

    for name in ("x", "weight", "lora_A", "lora_B", "magnitude", "bias", "dy"):
        setattr(problem, name, laid_out(getattr(problem, name)).requires_grad_(name not in ("weight", "dy")))
    dtype = torch.promote_types(*dtypes)
    adapter = (*flatten_weight(problem.weight), problem.lora_A, problem.lora_B)
    torch.library.opcheck(ops.norm, (*adapter, 0.75, dtype, backend))
    gain = laid_out(torch.ones(12, dtype=torch.promote_types(dtypes[0], torch.float32), device=problem.x.device))
    torch.library.opcheck(ops.merge, (*adapter, gain, 0.75, dtype, backend))
    for keep, way in (("base", "split"), ("z_merged", "merged")):
        arguments = forward_arguments(problem, backend, keep, dropped=False)
        arguments = (*arguments[:13], dtype, way, *arguments[15:])
        torch.library.opcheck(ops.forward, arguments)
        with torch.no_grad():
            _, norm, gain, low, kept = ops.forward(*arguments)
        torch.library.opcheck(
            ops.backward,
            (
                problem.dy, problem.x, *adapter, norm, gain, low, kept, None, 0.75, dtype, way, keep, False,
                way == "split", [True, False, True, True, True, True], problem.magnitude.dtype, problem.bias.dtype,
                backend,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", (1, 3))
def test_norms_of_several_layers(layers, backend):
    """Of other N and K; and the adapters are taken in the dtype that is asked for, here a narrower one."""
    problems = [Problem.random(1, N, K, 3, torch.float32, seed=N) for N, K in ((12, 10), (7, 18), (5, 4))][:layers]
    names = ("weight", "lora_A", "lora_B", "magnitude")
    arguments = [[getattr(problem, name) for problem in problems] for name in names]
    scalings = [0.75, 1.5, 2.0][:layers]
    torch.library.opcheck(ops.grouped_norm, (*arguments, scalings, torch.bfloat16, backend))
    norm, gain = ops.grouped_norm(*arguments, scalings, torch.bfloat16, backend)
    each = zip(problems, scalings, strict=True)
    alone = [ops.norm(*flatten_weight(p.weight), p.lora_A, p.lora_B, s, torch.bfloat16, backend) for p, s in each]
    assert torch.equal(norm, torch.cat(alone))
    torch.testing.assert_close(gain, torch.cat(arguments[3]) / norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_the_norm_takes_the_adapters_in_the_dtype_that_is_asked_for(backend):
    problem, dtype = Problem.random(1, 12, 10, 3, torch.float32), torch.bfloat16
    norm = torch.linspace(0.5, 2.0, 12, device=problem.x.device)
    stored, adapter, needs = flatten_weight(problem.weight), (problem.lora_A, problem.lora_B), [True, True]
    wide, narrow = (
        ops.norm_backward(norm - 1, *stored, *factors, norm, 0.75, dtype, needs, backend)
        for factors in (adapter, [factor.to(dtype) for factor in adapter])
    )
    for one, other in zip(wide, narrow, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one.to(dtype), other)


def test_a_given_norm_is_not_aliased():
    problem = Problem.random(5, 12, 10, 3, torch.float32)
    norm = torch.ones(12, device=problem.x.device)
    torch.library.opcheck(ops.forward, forward_arguments(problem, "reference", "", False, norm=norm))


SCHEMA_TYPES = {
    "Tensor": torch.Tensor, "Tensor?": (torch.Tensor, NoneType), "Tensor[]": list, "ScalarType": torch.dtype,
    "str": str, "float": float, "bool": bool, "int[]": list, "bool[]": list,
}  # fmt: skip


def schema_arguments(operation):
    """(type, name) of each argument, as the schema has them."""
    listed = re.search(r"\((.*?)\) ->", str(operation._schema))[1].split(", ")
    return [tuple(one.partition("=")[0].split(" ")) for one in listed if one != "*"]


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_what_runs_has_the_schema_s_arguments(name):
    run = {"forward": ops.unflatten_forward, "backward": ops.unflatten_backward}.get(name, ops.OPERATORS[name])
    assert list(inspect.signature(run).parameters) == [one for _, one in schema_arguments(getattr(ops, name))]


# (save_low, exact, dropped, norm_grad), so that no two of them can be mistaken for each other
FLAGS = [tuple(flag == one for flag in range(4)) for one in range(4)]


def a_call(flags, weight):
    """No two of its tensors, dtypes, names or numbers are the same."""
    tensors = [torch.empty(number) for number in range(8)]
    lora_A, lora_B = torch.empty(3, 10), torch.empty(12, 3)
    layer, given = DoraWeight(weight, lora_A, lora_B, tensors[0], 0.75), Given(*tensors[1:5])
    how = How(torch.float32, torch.bfloat16, "auto", "base", "reference", *flags)
    return Call(tensors[5], tensors[6], layer, tensors[7], given, how)


WEIGHTS = {
    "dense": torch.empty(12, 10),
    "row8": QuantizedWeight(
        "row8", (12, 10), torch.float16, (torch.zeros(12, 10, dtype=torch.int8), torch.ones(12)), ()
    ),
}


def by_name(layer, *more, **renamed):
    """What a schema calls the fields of these tuples -> their values."""
    tensors, weight_format, numbers, dtype = flatten_weight(layer.weight)
    weight = {"weight": tensors, "weight_format": weight_format, "weight_numbers": numbers, "weight_dtype": dtype}
    fields = {}
    for one in (layer, *more):
        fields |= {renamed.get(name, name): value for name, value in one._asdict().items()}
    return fields | weight | {"keep": fields["save"], "keep_low": fields["save_low"]}


def assert_flattened(operation, flat, expected):
    arguments = schema_arguments(operation)[: len(flat)]
    for (kind, name), value in zip(arguments, flat, strict=True):
        assert isinstance(value, SCHEMA_TYPES[kind]), name
        both = zip(value, expected[name], strict=True) if kind == "Tensor[]" else [(value, expected[name])]
        assert all(one is other or (not isinstance(one, torch.Tensor) and one == other) for one, other in both), name


def assert_same(actual, expected):
    """Field by field, tensors by identity; a quantized weight is another object of the same parts."""
    for name, one, other in zip(expected._fields, actual, expected, strict=True):
        if name == "weight" and not isinstance(other, torch.Tensor):
            one, other = (dict(vars(weight)) for weight in (one, other))
            assert one.keys() == other.keys()
            assert all(map(operator.is_, one.pop("tensors"), other.pop("tensors"))) and one == other
        else:
            assert one is other or (not isinstance(other, torch.Tensor) and one == other), name


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_call_is_flattened_as_the_schema_has_it(weight, flags):
    call = a_call(flags, WEIGHTS[weight])
    flat = ops.flatten_forward(call)
    expected = by_name(call.layer, call, call.given, call.how)
    assert_flattened(ops.forward, flat, expected)
    assert schema_arguments(ops.forward)[len(flat) :] == [("Tensor?", "given_low")]
    again = ops.unflatten_forward(*flat, given_low=call.given.low)
    assert again.x is call.x and again.x_dropped is call.x_dropped and again.bias is call.bias
    assert_same(again.layer, call.layer)
    assert_same(again.given, call.given._replace(merged=None))
    assert_same(again.how, call.how._replace(dropped=False, norm_grad=False))


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_backward_pass_is_flattened_as_the_schema_has_it(weight, flags):
    call = a_call(flags, WEIGHTS[weight])
    saved = Saved(call.x, *call.given[:2], call.given.low, call.bias, call.given.merged, torch.float64, torch.float16)
    needs = Needs(True, True, False, True, False, False, True)
    flat = ops.flatten_backward(call.x_dropped, saved, call.layer, call.how, needs)
    expected = by_name(call.layer, call.how, saved, intermediate="kept") | {"dy": call.x_dropped, "needs": list(needs)}
    assert_flattened(ops.backward, flat, expected)
    assert len(schema_arguments(ops.backward)) == len(flat)
    dy, *again, again_needs = ops.unflatten_backward(*flat)
    assert dy is call.x_dropped and again_needs == needs
    layer, how = call.layer._replace(magnitude=None), call.how._replace(save_low=False, exact=False)
    for one, other in zip(again, (saved, layer, how), strict=True):
        assert_same(one, other)


def test_calls_are_counted():
    problem = Problem.random(5, 12, 10, 3, torch.float32)
    before = ops.calls["norm", "reference"]
    ops.norm(*flatten_weight(problem.weight), problem.lora_A, problem.lora_B, 0.75, torch.float32, "reference")
    assert ops.calls["norm", "reference"] == before + 1
