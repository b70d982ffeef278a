"""disable() and enable() while another thread is in a call: before each line that the call runs in a layer's code.

The other thread is played by a trace function: it acts between two lines, where a thread can be made to wait.
"""

import contextlib
import copy
import itertools
import math
import sys
import threading

import pytest
import torch

import dora_kernels
from dora_kernels.adapters import taking
from tests.support import shared_problem
from tests.support.layer_kinds import STOCK, assert_same, dvora, lora_dropout, pair, some, taken_over

OURS = ("dora_kernels/adapters/", "dora_kernels/reuse/")
THEIRS = ("peft/tuners/lora/", "torchtune/modules/peft/", "lycoris/", "tests/support/restated_layers.py")


def interrupted(model, x, act, line, where):
    """y with act() before that line, of those that the call runs in the files `where`; None where it has fewer."""
    lines = itertools.count()

    def trace(frame, event, argument):
        if not any(part in frame.f_code.co_filename for part in where):
            return None
        if event == "line" and next(lines) == line:
            sys.settrace(None)
            act(model)
            return None
        return trace

    sys.settrace(trace)
    try:
        y = model(x)
    finally:
        sys.settrace(None)
    return y if next(lines) > line else None


def disable_and_enable(model):
    dora_kernels.disable(model)
    dora_kernels.enable(model)


def scope(model, training):
    """Around the calls in eval mode: what frozen_adapters keeps is made for all layers of a model."""
    return contextlib.nullcontext() if training else dora_kernels.frozen_adapters(model)


def y_and_gradients(y, model):
    return y.detach(), torch.autograd.grad(y.pow(2).sum(), [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("act", (dora_kernels.disable, pytest.param(disable_and_enable, marks=pytest.mark.nightly)))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", some(STOCK, "peft", "lycoris", "torchtune, bias", "llm"))
def test_disabled_in_the_middle_of_a_call(name, training, act):
    stock, ours, x = pair(name)
    expected = y_and_gradients(stock.train(training)(x), stock)
    for line in itertools.count():
        model = copy.deepcopy(ours).train(training)
        assert taken_over(model)
        with scope(model, training):
            y = interrupted(model, x, act, line, OURS)
            if y is None:
                break
            assert_same(y_and_gradients(y, model), expected)
            assert_same(model(x), expected[0])
    assert line > 20


@pytest.mark.parametrize("name", some(STOCK, "peft", "peft, embedding", "lycoris", "torchtune", "llm"))
def test_enabled_in_the_middle_of_a_call(name):
    stock, _, x = pair(name)
    expected = y_and_gradients(stock(x), stock)
    for line in itertools.count():
        model = copy.deepcopy(stock)
        y = interrupted(model, x, dora_kernels.enable, line, THEIRS)
        if y is None:
            break
        assert_same(y_and_gradients(y, model), expected)
        assert_same(model(x), expected[0])
    assert line > 2


def test_siblings_are_disabled_one_after_the_other():
    """Layers that share a product look at each other: the first still is ours when the next is not."""
    stock = shared_problem.attention().double()
    x, _ = shared_problem.batch(torch.float64)
    expected = y_and_gradients(stock(x), stock)
    _, second, third = (module for module in stock.modules() if hasattr(module, "lora_magnitude_vector"))
    names = {id(module): name for name, module in stock.named_modules()}

    def act(model):
        for layer in (second, third):
            taking.give_back(model.get_submodule(names[id(layer)]))

    for line in itertools.count():
        model = shared_problem.shared(copy.deepcopy(stock))
        y = interrupted(model, x, act, line, ("dora_kernels/reuse/sharing",))
        if y is None:
            break
        assert_same(y_and_gradients(y, model), expected)
    assert line > 20


def failing(monkeypatch, model, meanwhile, times=1):
    """Make the first so many computations of the model's layer fail, after meanwhile()."""
    cls, left = type(taken_over(model)), [None] * times
    compute = cls.compute

    def fail(*arguments):
        if not left:
            return compute(*arguments)
        left.pop()
        meanwhile()
        raise AttributeError("no method of ours")

    monkeypatch.setattr(cls, "compute", fail)


def test_a_call_that_fails_in_the_middle_of_a_switch_is_computed_again(monkeypatch):
    """The class is changed, and nothing says yet that it was."""
    _, ours, x = pair("peft")
    y = ours(x)
    monkeypatch.setitem(taking._last_switch, taken_over(ours), math.inf)
    failing(monkeypatch, ours, lambda: None)
    assert_same(ours(x), y)


def test_a_call_that_is_computed_again_may_be_switched_again(monkeypatch):
    _, ours, x = pair("peft")
    y = ours(x)
    failing(monkeypatch, ours, lambda: disable_and_enable(ours), times=3)
    assert_same(ours(x), y)
    assert_same(ours(x), y)


@pytest.mark.parametrize("make", (dvora, lambda: lora_dropout("peft"), lambda: pair("peft")[1:]))
@pytest.mark.parametrize("others", (dora_kernels.disable, disable_and_enable))
def test_another_model_s_switch_hides_no_error(monkeypatch, make, others):
    """Least of all by the library's forward of a layer whose function the library does not have."""
    ours, x = make()
    _, other, _ = pair("peft")
    failing(monkeypatch, ours, lambda: others(other))
    with pytest.raises(AttributeError, match="no method of ours"):
        ours(x)
    ours(x)


def test_a_layer_that_the_library_cannot_compute_is_never_given_to_it(monkeypatch):
    """Disabled, which leaves it alone, while an error of somebody's code is on its way."""
    ours, x = dvora()
    failing(monkeypatch, ours, lambda: disable_and_enable(ours))
    with pytest.raises(AttributeError, match="no method of ours"):
        ours(x)


def test_an_error_of_somebody_s_code_is_not_hidden():
    """What is computed again is what failed because of disable(), and nothing else."""
    _, ours, x = pair("peft")
    del ours[0].cast_input_dtype_enabled
    with pytest.raises(AttributeError, match="cast_input_dtype_enabled"):
        ours(x)


def test_threads():
    """The same with threads, which meet where they like: a loop that had one error in about 40 calls."""
    stock, ours, x = pair("peft")
    expected, errors, end = stock(x), [], threading.Event()

    def call():
        while not end.is_set():
            try:
                assert_same(ours(x), expected)
            except Exception as error:
                errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=call) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(100):
            dora_kernels.enable(ours)
            dora_kernels.disable(ours)
    finally:
        end.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not errors, errors[0]
