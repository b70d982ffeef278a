"""What a stranger may put into the containers: every constructor and function of theirs, with one or two wrong parts.

    python -m tests.support.container_fuzzer SEED CALLS      # "ok: CALLS calls, ..." and 0, or what went wrong and 1

A process of its own, because what it looks for may end one. A wrong part ends in a ValueError; or it was no wrong one,
and both backends compute the same with it, the kernels in Triton's interpreter. No argument is changed.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import collections
import contextlib
import copy
import functools
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dora_kernels
from dora_kernels import DoraLinear, options, quant
from dora_kernels.extras import dvora, serving
from dora_kernels.extras.dvora import DvoraLinear, VeraProjection
from dora_kernels.functional.rescale import rescale
from dora_kernels.planning.options import current_options
from dora_kernels.quant import QuantizedWeight
from tests.support.packed_weights import KINDS, quantized
from tests.support.problem import BACKENDS, Problem
from tests.support.problem import core as dora_linear_core

M, N, K, R, E = 5, 16, 12, 3, 2
NOT_TENSORS = (None, 3, "weight", [1.0], (), object(), torch.float32)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool)
NUMBERS = (0, 1, -1, 3, 8, 2**31, 2**40, 2**63, 2.0, -0.5, 1e39, 1e-50, float("nan"), float("inf"), 10**400, True)
# no size that torch would try to allocate
SIZES = (0, 1, 2, -1, 2**62, 2**63, 2.5, float("nan"), True)
NOT_NUMBERS = (None, "2", 1j, [2], torch.tensor(2))


def spoilt_tensor(draw: random.Random, tensor: Tensor) -> object:
    """Something else in the place of `tensor`: another kind, dtype, size, layout, device, or strides."""
    axis = draw.randrange(tensor.dim()) if tensor.dim() else None
    ways: list[Callable[[], object]] = [
        lambda: draw.choice(NOT_TENSORS),
        lambda: tensor.to(draw.choice(DTYPES)),
        lambda: tensor.flatten()[:-1],
        lambda: tensor[None],
        lambda: tensor.new_empty(0),
        lambda: tensor.flatten()[:1].sum(),
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        lambda: torch.nested.nested_tensor([tensor, tensor]),
        lambda: nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point()),
        lambda: tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor,  # the same, strided
        lambda: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
        lambda: tensor.mT if tensor.dim() > 1 else tensor,
    ]
    if axis is not None:
        ways += [
            lambda: tensor.narrow(axis, 0, max(0, tensor.shape[axis] - 1)),
            lambda: tensor.narrow(axis, 0, 0),
            lambda: torch.cat((tensor, tensor), axis),
            lambda: (
                tensor.narrow(axis, 0, min(1, tensor.shape[axis])).expand(tensor.shape) if tensor.numel() else tensor
            ),
        ]
    return draw.choice(ways)()


def spoilt(draw: random.Random, name: str, value: object) -> object:
    """Something else in the place of an argument."""
    if isinstance(value, Tensor):
        return spoilt_tensor(draw, value)
    if isinstance(value, (tuple, list)) and value and draw.random() < 0.8:
        parts = list(value)
        which = draw.randrange(len(parts))
        way = draw.randrange(8)
        if way == 0:
            parts.pop(which)
        elif way == 1:
            parts.append(parts[which])
        elif way == 2:
            draw.shuffle(parts)
        elif way == 3:
            return parts if isinstance(value, tuple) else 7
        else:
            parts[which] = spoilt(draw, name, parts[which])
        with contextlib.suppress(TypeError):  # a NamedTuple of another length
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
        return tuple(parts)
    if isinstance(value, torch.dtype):
        return draw.choice((*DTYPES, torch.complex64, "float32", 32))
    if name == "device":  # one that torch knows and the machine has not is torch's to refuse
        return draw.choice(("cpu", "meta", "nowhere", "cpu:x", 2.5, [], torch.float32))
    if isinstance(value, (bool, str)) or value is None:
        return draw.choice((None, "no", "hqq4", "cpu", 1, True, [], torch.tensor(True)))
    if isinstance(value, (int, float)):
        sizes = name in ("in_features", "out_features", "rank", "max_in_features", "max_out_features")
        return draw.choice((*(SIZES if sizes else NUMBERS), *NOT_NUMBERS))
    return draw.choice(NOT_TENSORS)


# Each target: arguments that are fine, and what is done with them, which returns tensors to compare.


def random_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    problem = Problem.random(M, N, K, R, dtype)
    return {name: value for name, value in vars(problem).items() if name not in ("dy", "x_dropped")}


def weight_of(kind: str) -> tuple[dict[str, Any], Callable[..., Any]]:
    weight = quantized(kind, N, K)
    names = ("format", "shape", "dtype", "tensors", "numbers")

    def use(**parts: Any) -> list[Tensor]:
        made = QuantizedWeight(**parts)
        problem = Problem.random(M, *made.shape, R, torch.float32)
        dense = made.dequantize()
        if current_options().backend == "triton":
            from dora_kernels import kernels

            decoded, tolerance = kernels.dense(made, made.dtype), 1e-6 if made.dtype == torch.float64 else 0.0
            same = torch.allclose(decoded, dense, rtol=tolerance, atol=tolerance, equal_nan=True)
            assert same, "the kernel decodes something else"
        return [dense, dora_kernels.weight_norm(made, problem.lora_A, problem.lora_B, 0.5)]

    return {name: getattr(weight, name) for name in names}, use


def bank_fields() -> tuple[dict[str, Any], Callable[..., Any]]:
    tensors = random_tensors()
    adapter = tuple(tensors[name] for name in ("lora_A", "lora_B", "magnitude", "scaling"))
    bank = serving.AdapterBank.of(tensors["weight"], [adapter] * E)
    index = torch.tensor([0, 1, -1, 1, 0])

    def use(**fields: Any) -> list[Tensor]:
        with torch.no_grad():
            return [serving.bank_linear(tensors["x"], tensors["weight"], serving.AdapterBank(**fields), index)]

    return dict(vars(bank)), use


def bank_of() -> tuple[dict[str, Any], Callable[..., Any]]:
    tensors = random_tensors()
    adapter = serving.Adapter(*(tensors[name] for name in ("lora_A", "lora_B", "magnitude", "scaling")))
    arguments = {
        "x": tensors["x"],
        "weight": tensors["weight"],
        "adapters": [adapter, adapter._replace(magnitude=None)],
    }
    arguments |= {"index": torch.tensor([0, 1, -1, 5, 0]), "bias": tensors["bias"]}

    def use(x: Any, weight: Any, adapters: Any, index: Any, bias: Any) -> list[Tensor]:
        bank = serving.AdapterBank.of(weight, adapters)
        with torch.no_grad():
            return [serving.bank_linear(x, weight, bank, index, bias)]

    return arguments, use


def core(**given: Any) -> tuple[dict[str, Any], Callable[..., Any]]:
    """dora_linear_core with what it made in another call."""
    tensors = random_tensors()
    weight, lora_A, lora_B = tensors["weight"], tensors["lora_A"], tensors["lora_B"]
    norm = dora_kernels.weight_norm(weight, lora_A, lora_B, tensors["scaling"])
    gain = tensors["magnitude"] / norm
    made = {"norm": norm, "gain": gain, "merged": gain[:, None] * (weight + tensors["scaling"] * lora_B @ lora_A)}
    made |= {"low": tensors["x"] @ lora_A.T, "x_dropped": tensors["x"] * 1.5}

    def use(**arguments: Any) -> list[Tensor]:
        x = arguments["x"]
        if isinstance(x, Tensor) and x.is_floating_point() and x.is_leaf and not x.is_sparse and not x.is_nested:
            arguments["x"] = x.detach().requires_grad_()
            y = dora_linear_core(**arguments)
            return [y.detach(), *torch.autograd.grad(y.sum(), arguments["x"])]
        return [dora_linear_core(**arguments)]

    return tensors | {name: made[name] for name in given}, use


def dvora_arguments() -> dict[str, Any]:
    tensors = random_tensors()
    arguments = {
        "x": tensors["x"],
        "weight": tensors["weight"],
        "vera_A": tensors["lora_A"],
        "vera_B": tensors["lora_B"],
    }
    arguments |= {"lambda_d": torch.rand(R), "lambda_b": torch.rand(N), "magnitude": tensors["magnitude"]}
    return arguments | {"bias": tensors["bias"]}


def dvora_terms(with_x: bool) -> tuple[dict[str, Any], Callable[..., Any]]:
    arguments = dvora_arguments()
    arguments["terms"] = dvora.norm_terms(arguments["weight"], arguments["vera_A"])
    if with_x:
        return arguments, lambda **parts: [dvora.dvora_linear(**parts)]
    for name in ("x", "magnitude", "bias"):
        del arguments[name]
    return arguments, lambda **parts: [dvora.dvora_norm(**parts)]


def terms_of() -> tuple[dict[str, Any], Callable[..., Any]]:
    arguments = {name: value for name, value in dvora_arguments().items() if name in ("weight", "vera_A")}
    return arguments, lambda **parts: list(dvora.norm_terms(**parts))


def rescaled() -> tuple[dict[str, Any], Callable[..., Any]]:
    tensors = random_tensors()
    base, low = tensors["x"] @ tensors["weight"].T, tensors["x"] @ tensors["lora_A"].T
    arguments = {"base": base, "low": low, "lora_B": tensors["lora_B"], "gain": tensors["magnitude"].float()}
    arguments |= {"scaling": 0.5, "bias": tensors["bias"], "residual": base + 1}
    return arguments, lambda **parts: [rescale(**parts)]


def over_packed(kind: str) -> tuple[dict[str, Any], Callable[..., Any]]:
    arguments = random_tensors() | {"weight": quantized(kind, N, K)}
    return arguments, lambda **parts: [dora_kernels.dora_linear(**parts)]


def decoded() -> tuple[dict[str, Any], Callable[..., Any]]:
    weight = quantized("codebook4 nested", N, K)

    def use(rows: Any, dtype: Any, rounded: Any) -> list[Tensor]:
        return [weight.dequantize(rows, dtype), weight.rounded_to(rounded).dequantize()]

    return {"rows": slice(2, 5), "dtype": torch.bfloat16, "rounded": torch.float16}, use


def layer(cls: type, projection: bool) -> tuple[dict[str, Any], Callable[..., Any]]:
    arguments: dict[str, Any] = {"in_features": K, "out_features": N}
    if projection:
        arguments |= {"projection": VeraProjection(K, N, R), "d_initial": 0.5}
    else:
        arguments |= {"rank": R, "alpha": 1.0, "dropout_on": "lora"}
    arguments |= {"bias": True, "dropout": 0.0, "device": None, "dtype": torch.float32, "adapter_dtype": torch.float32}

    def use(**parts: Any) -> list[Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = cls(**parts).eval()
            if made.weight.device.type == "meta":
                return []
            return [made(torch.ones(M, made.in_features, dtype=made.weight.dtype)).detach()]

    return arguments, use


def projection() -> tuple[dict[str, Any], Callable[..., Any]]:
    arguments = {"max_in_features": K, "max_out_features": N, "rank": R, "seed": 1, "save": True, "device": None}
    arguments |= {"dtype": torch.float32, "in_features": K, "out_features": N}

    def use(in_features: Any, out_features: Any, **parts: Any) -> list[Tensor]:
        return list(VeraProjection(**parts).of(in_features, out_features))

    return arguments, use


def over_linear(cls: type, which: str) -> tuple[dict[str, Any], Callable[..., Any]]:
    """from_linear over a layer whose weight or bias somebody has replaced."""
    linear = nn.Linear(K, N)

    def use(part: Any, how: Any) -> list[Tensor]:
        other = copy.deepcopy(linear)
        if how == "assigned":
            part = part if isinstance(part, nn.Parameter) or not isinstance(part, Tensor) else tensor_as_parameter(part)
            with contextlib.suppress(TypeError):  # nn.Module's own refusal
                setattr(other, which, part)
        else:
            nn.utils.parametrizations.weight_norm(other) if how is None else deprecated_weight_norm(other)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = cls.from_linear(other, *((R, 1.0) if cls is DoraLinear else (VeraProjection(K, N, R),)))
        weight = made.weight
        if weight.device.type == "meta":
            return []
        return [made(torch.ones(M, made.in_features, dtype=weight.dtype)).detach()]

    return {"part": getattr(linear, which).detach(), "how": "assigned"}, use


def tensor_as_parameter(tensor: Tensor) -> object:
    with contextlib.suppress(RuntimeError):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.is_floating_point())
    return tensor


def deprecated_weight_norm(linear: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(linear)


def read_4bit() -> tuple[dict[str, Any], Callable[..., Any]] | None:
    """bitsandbytes' state as a file gives it."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    parameter = bnb.nn.Params4bit(torch.randn(16, 64), requires_grad=False, quant_type="nf4", blocksize=64).to("cpu")
    state = parameter.quant_state
    arguments = {
        name: getattr(state, name) for name in ("absmax", "code", "blocksize", "shape", "dtype", "nested", "offset")
    }
    arguments |= {"inner_absmax": state.state2.absmax, "inner_code": state.state2.code, "data": parameter.data}
    arguments |= {"inner_blocksize": state.state2.blocksize}

    def use(data: Any, **parts: Any) -> list[Tensor]:
        other = copy.deepcopy(parameter)
        for name, value in parts.items():
            owner = other.quant_state.state2 if name.startswith("inner_") else other.quant_state
            setattr(owner, name.removeprefix("inner_"), value)
        with contextlib.suppress(TypeError, RuntimeError):  # torch's own refusal
            other.data = data
        weight = quant.read(other)
        return [dora_kernels.weight_norm(weight, torch.ones(R, weight.shape[1]), torch.ones(weight.shape[0], R), 0.5)]

    return arguments, use


TARGETS: dict[str, Callable[[], tuple[dict[str, Any], Callable[..., Any]] | None]] = {
    **{f"QuantizedWeight {kind}": functools.partial(weight_of, kind) for kind in KINDS},
    "AdapterBank": bank_fields,
    "AdapterBank.of": bank_of,
    "dora_linear_core, norm and gain": functools.partial(core, norm=True, gain=True, merged=True),
    "dora_linear_core, low": functools.partial(core, low=True),
    "dora_linear_core, x_dropped": functools.partial(core, x_dropped=True, norm=True),
    "dora_linear over 4 bits": functools.partial(over_packed, "codebook4 nested"),
    "dora_linear over 8 bits": functools.partial(over_packed, "int8"),
    "dvora_linear": functools.partial(dvora_terms, True),
    "dvora_norm": functools.partial(dvora_terms, False),
    "norm_terms": terms_of,
    "rescale": rescaled,
    "dequantize": decoded,
    "DoraLinear": functools.partial(layer, DoraLinear, False),
    "DvoraLinear": functools.partial(layer, DvoraLinear, True),
    "VeraProjection": projection,
    "DoraLinear.from_linear, weight": functools.partial(over_linear, DoraLinear, "weight"),
    "DoraLinear.from_linear, bias": functools.partial(over_linear, DoraLinear, "bias"),
    "DvoraLinear.from_linear, bias": functools.partial(over_linear, DvoraLinear, "bias"),
    "read, 4 bits": read_4bit,
}


def numbers_of(value: object) -> list[Tensor]:
    """Copies of the tensors that can be compared among an argument's parts."""
    if isinstance(value, Tensor):
        dense = value.layout is torch.strided and not value.is_nested and value.device.type != "meta"
        return [value.detach().clone()] if dense else []
    if isinstance(value, QuantizedWeight):
        return numbers_of(value.tensors)
    return [copied for part in value for copied in numbers_of(part)] if isinstance(value, (tuple, list)) else []


def outcome(use: Callable[..., Any], arguments: dict[str, Any], backend: str) -> list[Tensor] | ValueError:
    with options(backend=backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return use(**arguments)
        except ValueError as error:
            return error


def fault(name: str, arguments: dict[str, Any], use: Callable[..., Any]) -> tuple[str, bool]:
    """What is wrong with a call, "" if nothing; and whether it was a ValueError."""
    before = [copied for value in arguments.values() for copied in numbers_of(value)]
    results = []
    for backend in BACKENDS:
        try:
            results.append(outcome(use, arguments, backend))
        except Exception as error:
            return f"{backend} raises {type(error).__name__}: {str(error)[:200]}", False
    after = [copied for value in arguments.values() for copied in numbers_of(value)]
    if not all(
        torch.equal(one.double().nan_to_num(), other.double().nan_to_num())
        for one, other in zip(before, after, strict=True)
    ):
        return "an argument is changed", False
    refused = [isinstance(result, ValueError) for result in results]
    if any(refused):
        # float64 beside another dtype is the reference's alone
        fair = all(refused) or "the kernels do not take" in str(results[1])
        return "" if fair else f"one backend alone says {results[refused.index(True)]}", True
    for one, other in zip(*results, strict=True):
        size = one[one.isfinite()].abs().max() if one.isfinite().any() else 0.0
        if one.dtype != other.dtype or not torch.allclose(
            one, other, rtol=0.02, atol=0.02 * float(size), equal_nan=True
        ):
            return f"the backends compute {one.flatten()[:4]} and {other.flatten()[:4]}", False
    return "", False


def main(seed: int, calls: int) -> int:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    targets = {name: made for name, make in TARGETS.items() if (made := make()) is not None}
    for name, (arguments, use) in targets.items():
        why, refused = fault(name, dict(arguments), use)
        assert not why and not refused, f"{name} fails without a change: {why or outcome(use, arguments, 'reference')}"
    counted: collections.Counter[str] = collections.Counter()
    failures = []
    for call in range(calls):
        name = draw.choice(list(targets))
        fine, use = targets[name]
        names = draw.sample(sorted(fine), min(len(fine), draw.choice((1, 1, 2))))
        try:
            changes = {changed: spoilt(draw, changed, fine[changed]) for changed in names}
        except (RuntimeError, NotImplementedError):  # torch cannot make that
            continue
        shown = {changed: describe(value) for changed, value in changes.items()}
        print(f"{seed} {call} {name} {shown}", file=sys.stderr, flush=True)  # the last line, where the process ends
        why, refused = fault(name, fine | changes, use)
        counted["refused" if refused else "right"] += 1
        if why:
            failures.append(f"{name}({shown}): {why}")
    print("\n".join(dict.fromkeys(failures)))
    print(f"{'failed' if failures else 'ok'}: {sum(counted.values())} calls, {counted['refused']} refused")
    return 1 if failures else 0


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else tuple(value.shape)
        return f"{value.layout} {value.dtype} {shape} on {value.device}"
    return (
        f"{type(value).__name__} of {[describe(part) for part in value]}"
        if isinstance(value, tuple | list)
        else repr(value)[:60]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
