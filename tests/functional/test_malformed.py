"""A malformed call is a ValueError that names the function, whatever is wrong with it, and changes nothing.

Every argument of the public functions has a list of values that it must not have; a call gets one to three of them.
"""

import contextlib
import fractions
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, options
from dora_kernels.planning.options import current_options
from tests.support.problem import DEVICE, Problem

M, N, K, R = 5, 8, 6, 2
SHAPES = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "magnitude": (N,), "bias": (N,)}
FIRST = ("weight", "lora_A", "lora_B")
NOT_TENSORS = (
    None,
    3,
    2.5,
    "weight",
    [1.0],
    np.zeros((N, K), dtype=np.float32),
    nn.Linear(K, N),
    torch.float32,
    object,
)
DTYPES = (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
NOT_NUMBERS = (None, "2", 1j, True, [1.0], torch.tensor(1.0), fractions.Fraction(1, 2))
NOT_FINITE = (float("nan"), float("inf"), -float("inf"), 10**400)
NOT_SIZES = (None, "2", 2.5, True, -1, float("nan"), [2], torch.tensor(2))
NOT_DTYPES = (*DTYPES, "float32", 32, np.float32, torch.device("cpu"))


def zeros(*shape: int, **arguments) -> torch.Tensor:
    return torch.zeros(shape, **{"device": DEVICE} | arguments)


def wrong_tensors(name: str) -> list[object]:
    """What the tensor `name` must not be."""
    shape = SHAPES[name]
    wrong = [value for value in NOT_TENSORS if not (name == "bias" and value is None)]
    wrong += [zeros(*shape).to(dtype) for dtype in DTYPES]
    wrong += [zeros(*shape, device="meta")]
    wrong += [zeros(*shape).to_sparse(), zeros(*shape, dtype=torch.bfloat16).to_sparse()]
    if DEVICE == "cpu":
        wrong += [zeros(*shape).to_mkldnn()]
    if len(shape) == 2:
        wrong += [torch.nested.nested_tensor([zeros(3), zeros(4)]), zeros(*shape).to_sparse_csr()]
    for axis, size in enumerate(shape):
        # what M may be is for the caller to say, and R is what lora_A and lora_B agree on
        if (name, axis) != ("x", 0):
            wrong += [zeros(*shape[:axis], other, *shape[axis + 1 :]) for other in (0, size - 1, size + 1)]
    wrong += [zeros(), zeros(*shape, 1)]
    if name == "x":
        wrong += [zeros(*shape, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]
    else:
        wrong += [zeros(1, *shape), zeros(*shape).flatten()[:-1]]
    if name in ("lora_A", "lora_B"):
        wrong += [zeros(*shape, dtype=torch.float64), zeros(*shape, dtype=torch.bfloat16), zeros(*shape).T]
    if name == "weight":
        wrong += [zeros(*shape).requires_grad_(), nn.Parameter(zeros(*shape)), zeros(*shape).T]
    return wrong


def tensors_of(*names: str) -> dict[str, list[object]]:
    return {name: wrong_tensors(name) for name in names} | {"scaling": [*NOT_NUMBERS, *NOT_FINITE]}


FLAGS = (None, "no", 1, 0.0, torch.tensor(True))
# function -> its name in messages, and for every argument what it must not be
WRONG: dict[Callable, tuple[str, dict[str, list[object]]]] = {
    dora_kernels.dora_linear: (
        "dora_linear",
        tensors_of("x", *FIRST, "magnitude", "bias") | {"norm_grad": list(FLAGS)},
    ),
    dora_kernels.weight_norm: ("weight_norm", tensors_of(*FIRST)),
    dora_kernels.merge_weight: ("merge_weight", tensors_of(*FIRST, "magnitude")),
    DoraLinear: (
        "DoraLinear",
        {
            "in_features": list(NOT_SIZES),
            "out_features": list(NOT_SIZES),
            "rank": [*NOT_SIZES, 0],
            "alpha": [*NOT_NUMBERS, *NOT_FINITE],
            "bias": list(FLAGS),
            "dropout": [*NOT_NUMBERS, *NOT_FINITE, -0.1, 1.0, 1, 2],
            "device": ["nowhere", 2.5, "cpu:x", [0], torch.float32],
            "dtype": list(NOT_DTYPES),
            "adapter_dtype": list(NOT_DTYPES),
        },
    ),
    DoraLinear.from_linear: (
        "DoraLinear",
        {
            "linear": [
                None,
                nn.Linear,
                zeros(N, K),
                nn.Conv1d(K, N, 1),
                nn.Bilinear(K, K, N),
                nn.Linear(K, N, dtype=torch.complex64),
                DoraLinear(K, N, R, 1.0),
                nn.modules.linear.NonDynamicallyQuantizableLinear(K, N),
            ],
            "rank": [*NOT_SIZES, 0],
            "alpha": [*NOT_NUMBERS, *NOT_FINITE],
            "dropout": [*NOT_NUMBERS, *NOT_FINITE, -0.1, 1.0],
        },
    ),
    options: (
        "options",
        {
            name: ["", "Triton", "cuda", 3, True, ["auto"], ("auto",), b"auto", np.zeros(2), torch.zeros(2), object()]
            for name in ("backend", "way", "precision")
        },
    ),
}


def fine(function: Callable) -> dict[str, object]:
    """Arguments with which `function` succeeds."""
    problem = Problem.random(M, N, K, R, torch.float32)
    if function is DoraLinear:
        return {"in_features": K, "out_features": N, "rank": R, "alpha": 1.0, "device": DEVICE}
    if function == DoraLinear.from_linear:
        return {"linear": nn.Linear(K, N, device=DEVICE), "rank": R, "alpha": 1.0}
    if function is options:
        return {}
    names = [name for name in WRONG[function][1] if name != "norm_grad"]
    return {name: getattr(problem, name) for name in names}


def call(function: Callable, arguments: dict[str, object]) -> None:
    result = function(**arguments)
    if function is options:
        with result:
            pass


def raised_by(function: Callable, changes: dict[str, object]) -> str:
    """Why this call is not the ValueError that it should be; "" where it is."""
    arguments = fine(function) | changes
    kept = {name: value.clone() for name, value in arguments.items() if name in SHAPES and name not in changes}
    before = current_options()
    try:
        with contextlib.redirect_stderr(None):
            call(function, arguments)
    except ValueError as error:
        why = "" if str(error).startswith(WRONG[function][0]) else f"says {error}"
    except Exception as error:
        why = f"is {type(error).__name__}: {str(error).splitlines()[:1]}"
    else:
        why = "succeeds"
    if not all(torch.equal(arguments[name], value) for name, value in kept.items()):
        why += " and changes its arguments"
    if current_options() != before:
        why += " and leaves options behind"
    shown = {name: (value if not isinstance(value, torch.Tensor) else f"{value.layout} {value.dtype} {value.device}")
             for name, value in changes.items()}  # fmt: skip
    return why and f"{WRONG[function][0]}({shown}) {why}"


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__qualname__)
def test_the_calls_are_fine_without_the_changes(function):
    call(function, fine(function))


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__qualname__)
def test_every_wrong_value_is_a_value_error(function):
    failures = [raised_by(function, {name: value}) for name, values in WRONG[function][1].items() for value in values]
    assert len(failures) > 30 and not any(failures), "\n".join(filter(None, failures))


def could_be_right(value: object) -> bool:
    """A tensor of another shape or dtype: two of them may fit each other."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided


def test_a_thousand_malformed_calls():
    draw = random.Random(0)
    failures = []
    for _ in range(1000):
        function = draw.choice(list(WRONG))
        wrong = WRONG[function][1]
        names = draw.sample(sorted(wrong), draw.randint(1, min(3, len(wrong))))
        changes = {name: draw.choice(wrong[name]) for name in names}
        for name in [name for name, value in changes.items() if could_be_right(value)][1:]:
            del changes[name]
        failures.append(raised_by(function, changes))
    assert len(failures) == 1000 and not any(failures), "\n".join(filter(None, failures))
