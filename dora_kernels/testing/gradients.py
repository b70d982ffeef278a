"""check_gradients: output and every gradient against a float64 oracle and, where small enough, finite differences."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.functional import linear
from dora_kernels.functional.arguments import check_callable, check_flag, check_seed, check_type, described
from dora_kernels.functional.validate import check_tensor
from dora_kernels.modules import DoraLinear
from dora_kernels.reference import dora_linear_ref
from dora_kernels.testing.measure import compare
from dora_kernels.testing.report import Report, Row
from dora_kernels.testing.run import OfInputs, Outcome, random_like, run, same, shared_dropout
from dora_kernels.types import DoraWeight, Given

# Finite differences run the function in float64, in Triton's interpreter too: 2 calls for each input
FINITE_DIFFERENCE_ELEMENTS = 1 << 17
FINITE_DIFFERENCE_STEP = 1e-6
# a central difference of step h has h^2 of curvature and 1e-16 / h of rounding: 1e-10 both; sums lose some of it
FINITE_DIFFERENCE_TOLERANCE = 1e-6


def check_gradients(
    function: Callable[..., Tensor] | nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    reference: Callable[..., Tensor] | nn.Module | None = None,
    *,
    dy: Tensor | None = None,
    finite_differences: bool = True,
    seed: int = 0,
) -> Report:
    """Check `function` and its backward pass against `reference`. In a test suite call the Report's raise_if_failed().

    function: called with `inputs` as keyword arguments, returns one tensor. An nn.Module is called with one tensor,
        `inputs`, and may return (output, bias to be added); its parameters that require a gradient are differentiated
        too. It runs as it is: in train or eval mode, on its device, under the options and autocast around this call.
    inputs: tensors that require a gradient are differentiated. All are passed as they are, strides included.
    reference: plain PyTorch that computes the same from the same arguments. It runs in float64, which gives the exact
        result, and in the inputs' own dtypes, which gives the measure: the limit is twice PyTorch's own error plus
        2 ulp (see dora_kernels.testing.compare). None for dora_linear and DoraLinear: the definition in reference.py.
    dy: the gradient of the output; random by default.
    finite_differences: differentiate `function` itself in float64, if it takes float64 and is small enough. With a
        `reference` of your own, pass False for a function whose gradient is not its derivative (a detached norm).

    It fails on: an error over the limit; a NaN or inf where the exact value is finite (fresh memory is filled with NaN,
    so an element that nobody wrote as well); zeros, a missing gradient, another shape or dtype; an exact result that is
    zero everywhere, which tests nothing; a changed input; a second run that is not bitwise equal to the first.

    Raises ValueError if reference is None and none is known, where the inputs are not those that the function takes,
    and for what is not of the kinds above; what `function` itself raises is its own.
    """
    inputs = _by_name(function, inputs)
    if reference is not None:
        check_callable("check_gradients", "reference", reference)
    if dy is not None:
        check_tensor("check_gradients", "dy", dy, None)
    check_flag("check_gradients", "finite_differences", finite_differences)
    seed = check_seed("check_gradients", seed)
    title = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "function")
    known = reference is None
    reference = _known_reference(function) if reference is None else reference
    given = inputs
    if isinstance(function, nn.Module):
        inputs |= {name: value for name, value in function.named_parameters() if value.requires_grad}
    actual, again = (run(_call(function), inputs, seed, dy) for _ in range(2))
    yardstick = run(_call(reference), inputs, seed, dy)
    exact = run(_call(_in_float64(reference)), _in_float64(inputs), seed, dy)
    rows = _accuracy(actual, yardstick, exact)
    rows.append(_nothing_changed("inputs", actual.mutated, "changed"))
    differing = [name for name, tensor in actual.tensors().items() if not _same(tensor, again.tensors()[name])]
    rows.append(_nothing_changed("repeat", differing, "differs in a second run"))
    if finite_differences:
        differentiable = _with_constant_norm(function, given) if known else function
        rows += _finite_differences(_in_float64(differentiable), _in_float64(inputs), seed)
    return Report(title, tuple(rows))


def _by_name(function: Callable[..., Tensor] | nn.Module, inputs: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    """The inputs by name. Raises ValueError unless `function` can be called with these names."""
    check_callable("check_gradients", "function", function)
    if isinstance(inputs, Tensor):
        inputs = {"x": inputs}
    check_type("check_gradients", "inputs", inputs, Mapping, "a tensor, or the arguments by name")
    if isinstance(function, nn.Module):
        if list(inputs) != ["x"]:
            raise ValueError(f"check_gradients: inputs is {described(dict(inputs))}; expected a module's one tensor, x")
        check_type("check_gradients", "inputs['x']", inputs["x"], Tensor, "a torch.Tensor")
        return dict(inputs)
    try:
        inspect.signature(function).bind(**inputs)
    except TypeError as error:
        found = f"{described(dict(inputs))}: {error}"
        raise ValueError(
            f"check_gradients: inputs is {found}; expected the arguments of {described(function)}"
        ) from error
    except ValueError:  # a builtin that does not tell its arguments
        pass
    return dict(inputs)


def _known_reference(function: Callable[..., Tensor] | nn.Module) -> Callable[..., Tensor] | nn.Module:
    if function is linear.dora_linear:
        return dora_linear_ref
    if isinstance(function, DoraLinear):
        definition = copy.deepcopy(function)
        definition.__class__ = _Definition
        return definition
    name = getattr(function, "__name__", type(function).__name__)
    raise ValueError(
        f"check_gradients: reference is None and function is {name}; expected a reference, which is only known for "
        "dora_linear and DoraLinear"
    )


class _Definition(DoraLinear):
    """DoraLinear as reference.py defines it."""

    def forward(self, x: Tensor) -> Tensor:
        dropping = self.training and self.dropout > 0
        return dora_linear_ref(
            x,
            self.weight,
            self.lora_A.weight,
            self.lora_B.weight,
            self.lora_magnitude_vector,
            self.scaling,
            self.bias,
            x_dropped=nn.functional.dropout(x, self.dropout) if dropping else None,
        )


def _with_constant_norm(function: Callable[..., Tensor] | nn.Module, inputs: dict[str, Any]) -> Any:
    """`function` with the norm, a constant in its backward pass, given: finite differences can check it. Or None."""
    if isinstance(function, nn.Module):
        return None
    if inputs.get("norm_grad"):
        return function
    double = _in_float64(inputs)
    with torch.no_grad():
        direction = double["weight"] + double["scaling"] * double["lora_B"] @ double["lora_A"]
    norm = torch.linalg.vector_norm(direction, dim=1)

    def with_norm(x: Tensor, bias: Tensor | None = None, **arguments: Any) -> Tensor:
        layer = DoraWeight(**{name: arguments.pop(name) for name in DoraWeight._fields})
        return linear.dora_linear_core(x, layer, bias, given=Given(norm), **arguments)[0]

    return with_norm


def _call(function: Callable[..., Tensor] | nn.Module) -> OfInputs:
    """`function` as a function of a dict of inputs; a module's are x and its parameters."""
    if not isinstance(function, nn.Module):
        return lambda inputs: function(**inputs)

    def call(inputs: dict[str, Any]) -> Tensor:
        parameters = {name: value for name, value in inputs.items() if name != "x"}
        return with_bias(torch.func.functional_call(function, parameters, (inputs["x"],)))

    return call


def with_bias(returned: Any) -> Any:
    """The output of a module, plus its bias if it returns (output, bias), as parallel layers do."""
    if not (isinstance(returned, tuple) and len(returned) == 2):
        return returned
    y, bias = returned
    return y if bias is None else y + bias


def _in_float64(value: Any) -> Any:
    """A module, or inputs by name, in float64; anything else as it is."""
    if isinstance(value, nn.Module):
        double = copy.deepcopy(value).double()
        for module in double.modules():
            for wrapped in getattr(module, "org_module", ()):  # LyCORIS' list, which .double() does not reach
                wrapped.double()
        return double
    if isinstance(value, dict):
        return {name: _in_float64(entry) for name, entry in value.items()}
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _accuracy(actual: Outcome, yardstick: Outcome, exact: Outcome) -> list[Row]:
    tensors = actual.tensors(), yardstick.tensors(), exact.tensors()
    # for the gradients a function may save y, or its terms, rounded to y's dtype
    return [_compared(name, *(results[name] for results in tensors), through=actual.y.dtype) for name in tensors[0]]


def _compared(
    name: str, actual: Tensor | None, yardstick: Tensor | None, exact: Tensor | None, through: torch.dtype
) -> Row:
    if yardstick is None or exact is None:
        return Row(
            "accuracy", name, actual is None, "" if actual is None else "a gradient where the reference has none"
        )
    if actual is None:
        return Row("accuracy", name, False, "no gradient came")
    for what in ("shape", "dtype"):
        found, expected = (getattr(tensor, what) for tensor in (actual, yardstick))
        if found != expected:
            return Row("accuracy", name, False, f"{what} is {_text(found)}; expected {_text(expected)}")
    if not exact.isfinite().all():
        return Row("accuracy", name, False, "the reference itself is not finite in float64: nothing to compare with")
    if exact.numel() and not exact.any():
        return Row("accuracy", name, False, "the exact result is zero everywhere, which tests nothing")
    comparison = compare(name, actual, yardstick, exact, through=None if name == "y" else through)
    if comparison.ok:
        return Row("accuracy", name, True, comparison=comparison)
    reason = f"rms error above {comparison.limit:.2e} or max error above {comparison.max_limit:.2e}"
    if not actual.isfinite().all():
        reason = "not finite; fresh memory is filled with NaN, so perhaps nobody wrote some of it"
    elif not actual.any():
        reason = "zero everywhere"
    return Row("accuracy", name, False, reason, comparison)


def _text(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and same(one, other))


def _nothing_changed(check: str, names: Any, verb: str) -> Row:
    names = list(names)
    return Row(check, ", ".join(names) or "all", not names, f"{', '.join(names)} {verb}" if names else "")


def _finite_differences(function: Any, inputs: dict[str, Any], seed: int) -> list[Row]:
    """A row for each input: the slope of <dy, function> along a random direction against the gradient's component."""
    if function is None:
        return []
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    elements = sum(tensor.numel() for tensor in tensors.values())
    if elements > FINITE_DIFFERENCE_ELEMENTS:
        reason = f"{elements} elements; at most {FINITE_DIFFERENCE_ELEMENTS} are differentiated"
        return [Row("finite differences", "all", None, reason)]
    call = _call(function)
    try:
        result = run(call, inputs, seed)
    except ValueError as error:
        return [Row("finite differences", "all", None, f"float64 is not taken: {error}")]
    dy = random_like(result.y, seed)
    rows = []
    for name, gradient in result.gradients.items():
        if gradient is None:
            continue
        direction = random_like(gradient, seed + 1)
        slopes = []
        for sign in (1, -1):
            moved = inputs | {name: inputs[name].detach() + sign * FINITE_DIFFERENCE_STEP * direction}
            with torch.no_grad(), shared_dropout(seed):
                slopes.append((call(moved) * dy).sum().item())
        slope = (slopes[0] - slopes[1]) / (2 * FINITE_DIFFERENCE_STEP)
        # relative to the size of the terms: their sum may cancel
        size = (gradient.norm() * direction.norm()).item()
        error = abs(slope - (gradient * direction).sum().item()) / size if size else abs(slope)
        reason = f"off by {error:.1e} of the gradient; at most {FINITE_DIFFERENCE_TOLERANCE:.0e}"
        ok = error <= FINITE_DIFFERENCE_TOLERANCE
        rows.append(Row("finite differences", f"d{name}", ok, "" if ok else reason))
    return rows
