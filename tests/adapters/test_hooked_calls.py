"""Hooks: on one part of a layer the library runs it, and global ones it runs where it computes the same function."""

import pytest
import torch
from torch import nn
from torch.distributed._tools.mod_tracker import ModTracker
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.modules import module as modules
from torch.utils.flop_counter import FlopCounterMode

from dora_kernels import ops
from dora_kernels.adapters.taking import TakenOver
from dora_kernels.planning import devices
from tests.support.layer_kinds import QUANTIZED, STOCK, assert_same, dvora, lora_dropout, pair, some, y_and_gradients

LAYERS = [*STOCK, *QUANTIZED]
ONE_OF_EACH = ("peft", "peft, conv2d", "peft, embedding", "lycoris", "torchtune", "llm", "llava", "megatron", "nf4")


def events(model, x, register):
    """The names of the modules for which hooks ran, in order, and y with the gradients."""
    seen = []
    names = {module: name for name, module in model.named_modules()}
    handles = register(model, lambda module: seen.append(names.get(module, type(module).__name__)))
    try:
        return seen, y_and_gradients(model, x)
    finally:
        for handle in handles:
            handle.remove()


def on_every_module(register):
    return lambda model, see: [register(lambda module, *_: see(module))]


GLOBAL_HOOKS = {
    "forward": on_every_module(modules.register_module_forward_hook),
    "forward, always": on_every_module(lambda hook: modules.register_module_forward_hook(hook, always_call=True)),
    "forward, with keywords": on_every_module(
        lambda hook: modules.register_module_forward_hook(hook, with_kwargs=True)
    ),
    "forward pre": on_every_module(modules.register_module_forward_pre_hook),
    "backward": on_every_module(modules.register_module_full_backward_hook),
    "backward pre": on_every_module(modules.register_module_full_backward_pre_hook),
}


@pytest.mark.parametrize("kind", some(GLOBAL_HOOKS, "forward pre", "backward"))
@pytest.mark.parametrize("name", some(LAYERS, *ONE_OF_EACH))
def test_global_hooks_see_the_parts_that_the_library_calls(name, kind):
    stock, ours, x = pair(name)
    seen, expected = events(stock, x, GLOBAL_HOOKS[kind])
    by_ours, actual = events(ours, x, GLOBAL_HOOKS[kind])
    assert by_ours == seen
    assert_same(actual, expected)
    ops.calls.clear()
    ours(x)
    assert ops.calls  # ours again


@pytest.mark.parametrize("kind", some(("forward", "forward_pre", "full_backward", "full_backward_pre"), "forward"))
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_on_every_part_are_run_as_the_library_runs_them(name, kind):
    """On one part at a time: each of them alone has to be seen."""
    stock, ours, x = pair(name)
    layer = next(key for key, module in ours.named_modules() if isinstance(module, TakenOver))
    parts = [key for key, _ in stock.get_submodule(layer).named_modules() if key]
    assert parts or name.startswith("vl-t5")
    for part in parts:
        path = f"{layer}.{part}"

        def register(model, see, path=path):
            return [getattr(model.get_submodule(path), f"register_{kind}_hook")(lambda module, *_: see(module))]

        seen, expected = events(stock, x, register)
        by_ours, actual = events(ours, x, register)
        assert by_ours == seen, part
        assert_same(actual, expected)


def test_a_global_hook_that_changes_what_a_part_sees_does(caplog):
    stock, ours, x = pair("peft")
    before = stock(x)
    hook = modules.register_module_forward_pre_hook(
        lambda module, arguments: (arguments[0] * 2,) if type(module) is nn.Linear else None
    )
    with hook:
        expected = stock(x)
        assert not torch.allclose(expected, before)
        assert_same(ours(x), expected)
    assert "there is a global module hook, tests.adapters.test_hooked_calls.test_a_global_hook" in caplog.text
    assert_same(ours(x), before)


def under_a_global_hook(model, x):
    with modules.register_module_forward_hook(lambda *_: None):
        return model(x)


def counted(model, x):
    with FlopCounterMode(display=False):
        return model(x)


def tracked(model, x):
    with ModTracker():
        return model(x)


def comm_debugged(model, x):
    with CommDebugMode():
        return model(x)


def compared(model, x):
    """For torch's trackers: the calls that one of them sees, and y with the gradients."""
    calls = {}

    class Recorder(ModTracker):
        def _fw_pre_hook(self, mod, input):
            super()._fw_pre_hook(mod, input)
            name = self._get_mod_name(mod)
            calls[name] = calls.get(name, 0) + 1

    with Recorder():
        return calls, y_and_gradients(model, x)


TRACKERS = {
    "FlopCounterMode": counted,
    "ModTracker": tracked,
    "CommDebugMode": comm_debugged,
}


@pytest.mark.parametrize("tracks", some(TRACKERS, "FlopCounterMode", "CommDebugMode"))
@pytest.mark.parametrize("name", some(LAYERS, *ONE_OF_EACH))
def test_torch_s_own_trackers_of_modules_leave_every_call_ours(name, tracks, caplog, monkeypatch):
    if name.startswith("megatron") and tracks == "CommDebugMode":
        pytest.skip("a module is called twice, where CommDebugMode fails whoever calls it")
    monkeypatch.setattr(devices, "_logged", set())
    stock, ours, x = pair(name)
    expected = y_and_gradients(stock, x)
    ops.calls.clear()
    y = ours(x)
    plain = ops.calls.copy()
    for _ in range(2):  # what the first has left behind would be seen by the second
        ops.calls.clear()
        assert_same(TRACKERS[tracks](ours, x), y)
        assert ops.calls == plain
    ops.calls.clear()
    assert_same(y_and_gradients(ours, x), expected)
    assert ops.calls["backward", "reference"] or ops.calls["rescale_backward", "reference"]
    assert not caplog.text


def test_a_tracker_of_somebody_else_s_is_a_hook_like_any_other():
    """Its class may do anything."""
    stock, ours, x = pair("peft")
    seen, expected = compared(stock, x)
    by_ours, actual = compared(ours, x)
    assert by_ours == seen and "Sequential.0.base_layer" in seen
    assert_same(actual, expected)


def test_comm_debug_mode_has_the_parameters_of_the_modules_that_are_called():
    _, ours, x = pair("peft")
    with CommDebugMode() as mode:
        ours(x)
    assert "Sequential.0" in mode.advanced_module_tracker.module_helper_dict


@pytest.mark.parametrize("looks", ("a hook", *TRACKERS))
def test_what_only_looks_leaves_a_function_that_the_library_does_not_have_ours(looks, caplog, monkeypatch):
    monkeypatch.setattr(devices, "_logged", set())
    under = TRACKERS.get(looks, under_a_global_hook)
    for model, x in (*(lora_dropout(name) for name in ("peft", "conv1d", "llm")), dvora()):
        results = []
        for call in (under, nn.Module.__call__):
            torch.manual_seed(0)
            y = call(model, x)
            results.append(torch.autograd.grad(y.pow(2).sum(), [p for p in model.parameters() if p.requires_grad]))
        assert_same(results[0], results[1])
    logged = "which sees no parts of a layer that PEFT would compute otherwise" in caplog.text
    assert logged is (looks == "a hook")


def test_a_model_compiled_under_a_global_hook():
    """What comes or goes after compiling is not seen, of stock either: torch.compile does not guard on hooks."""
    stock, ours, x = pair("peft")
    torch._dynamo.reset()
    before = stock(x)
    double = modules.register_module_forward_pre_hook(
        lambda module, arguments: (arguments[0] * 2,) if type(module) is nn.Linear else None
    )
    with double:
        expected = stock(x)
        assert_same(torch.compile(ours, backend="eager")(x), expected)
    assert not torch.allclose(expected, before)
