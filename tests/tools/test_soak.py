"""The soak itself: right twins do not differ; planted faults are found, shortened, and found again by their seed."""

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import soak  # noqa: E402
from soaking import comparing  # noqa: E402
from soaking.changes import OPERATIONS  # noqa: E402
from soaking.models import Kind, of_adapter  # noqa: E402
from soaking.walks import Walk, replay, shrunk, walk  # noqa: E402

from dora_kernels.adapters.peft.linear import TakenOverLinear  # noqa: E402
from dora_kernels.adapters.peft.merging import Merging  # noqa: E402
from dora_kernels.reuse import sharing  # noqa: E402

# seeds are even: those models share the inputs of q, k and v
SMALL = Kind(1, others=False, dtype=torch.float32, dropout=0.0, wide=False, backend="reference", seed=2)
DROPS = Kind(1, others=False, dtype=torch.float32, dropout=0.4, wide=False, backend="reference", seed=2)
HALF = Kind(1, others=False, dtype=torch.bfloat16, dropout=0.0, wide=False, backend="reference", seed=2)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def an_invalidation_that_drops_nothing(patch):
    patch.setattr("dora_kernels.invalidate", lambda model: None)


def a_fused_step_that_nobody_counts(patch):
    # torch.optim has a name of the same spelling
    patch.setattr(sys.modules["torch.optim.optimizer"], "_global_optimizer_post_hooks", OrderedDict())


def a_merge_that_forgets_an_adapter(patch):
    merged = Merging._merged

    def forgetful(layer, names, safe_merge=False):
        return merged(layer, names[:1], safe_merge)[0], merged(layer, names, safe_merge)[1]

    patch.setattr(Merging, "_merged", forgetful)


def a_dropout_that_scales_otherwise(patch):
    dropped = TakenOverLinear._dropped
    patch.setattr(TakenOverLinear, "_dropped", lambda layer, adapter, x: 0.98 * dropped(layer, adapter, x))


def a_low_of_another_time(patch):
    patch.setattr(sharing, "_key", lambda x, operand, dtypes: ())


def an_output_that_is_1e_5_off(patch):
    one_adapter = TakenOverLinear.one_adapter
    patch.setattr(TakenOverLinear, "one_adapter", lambda *arguments: 1.00001 * one_adapter(*arguments))


def an_output_in_half_precision_that_is_off(patch):
    one_adapter = TakenOverLinear.one_adapter
    patch.setattr(TakenOverLinear, "one_adapter", lambda *arguments: 1.05 * one_adapter(*arguments))


def an_unmerge_that_forgets_what_it_kept(patch):
    unmerge = Merging._unmerge

    def forgetful(layer):
        kept = dict(layer._caches)
        unmerge(layer)
        layer._caches = kept

    patch.setattr(Merging, "_unmerge", forgetful)


def another_error(patch):
    def merge(layer, safe_merge=False, adapter_names=None):
        raise TypeError("planted")

    patch.setattr(Merging, "merge", merge)


# the fault, the model, and some of the operations among which it has to be found
FAULTS = [
    (an_invalidation_that_drops_nothing, SMALL, ("open_scope", "write", "mode")),
    (a_fused_step_that_nobody_counts, SMALL, ("open_scope", "train", "mode")),
    (a_merge_that_forgets_an_adapter, SMALL, ("add", "activate_several", "merge", "unmerge")),
    (a_dropout_that_scales_otherwise, DROPS, ("mode", "train", "infer")),
    (a_low_of_another_time, SMALL, ("one_by_one", "mode")),
    (an_output_that_is_1e_5_off, SMALL, ("mode", "copies")),
    (an_output_in_half_precision_that_is_off, HALF, ("mode", "copies")),
    (an_unmerge_that_forgets_what_it_kept, SMALL, ("mode", "merge", "unmerge")),
]


@pytest.mark.parametrize("fault, kind, kinds", FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_found(fault, kind, kinds, monkeypatch):
    """Within 20 operations of its kinds, which do not differ without the fault."""
    with monkeypatch.context() as patch:
        fault(patch)
        found = walk(kind, 20, kinds)
    assert found.difference is not None
    assert replay(kind, found.done).difference is None


def test_a_failing_walk_is_shortened(monkeypatch):
    """To opening a scope and a write: the rest can go."""
    an_invalidation_that_drops_nothing(monkeypatch)
    found = walk(SMALL, 20, ("open_scope", "write", "mode"))
    assert len(found.done) > 2
    short = shrunk(SMALL, found.done)
    assert [name for name, _ in short] == ["open_scope", "write"]


@pytest.mark.nightly
@pytest.mark.parametrize("fault, kind, kinds", FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_found_among_all_operations(fault, kind, kinds, monkeypatch):
    """Within 400 operations."""
    fault(monkeypatch)
    for seed in range(2, 18, 2):
        if walk(Kind(**vars(kind) | {"seed": seed}), 50).difference is not None:
            return
    pytest.fail("not found")


def test_an_error_of_another_class_is_a_difference(monkeypatch):
    another_error(monkeypatch)
    found = walk(SMALL, 20, ("merge",))
    assert "TypeError('planted')" in str(found.difference)


def test_a_report_names_the_walk_and_its_end(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        an_output_that_is_1e_5_off(patch)
        seed = next(seed for seed in range(100) if Kind.draw(seed).dtype is torch.float64)
        assert soak.main(["--walk", str(seed), "--backend", "reference", "--length", "2", "--shrink", "1"]) == 1
    text = capsys.readouterr().out
    assert f"--walk {seed} --backend reference" in text and "shrunk to" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the models are on the CPU, and the kernels in the interpreter")
def test_no_difference_on_the_kernels(capsys):
    assert soak.main(["--walk", "2", "--backend", "triton", "--length", "1"]) == 0
    assert "no difference" in capsys.readouterr().out


def test_the_limit_is_stock_s_error():
    """A tensor 20 times as far from exact as stock is a difference, one as far as stock is none."""
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    noise = torch.tensor([1e-4, -1e-4], dtype=torch.float64).repeat(50)
    stock = {"y": (exact * (1 + noise)).float()}
    for factor, good in ((20, False), (-1, True)):
        ours = {"y": (exact * (1 + factor * noise)).float()}
        found = comparing.judged(ours, stock, 1e-7, exact=lambda: {"y": exact}, again=lambda: stock)
        assert (found is None) is good, found
    mean = {name: (exact * (1 + 3 * noise)).float() for name in "abc"}
    found = comparing.judged(
        mean,
        dict.fromkeys("abc", stock["y"]),
        1e-7,
        lambda: dict.fromkeys("abc", exact),
        lambda: dict.fromkeys("abc", stock["y"]),
    )
    assert found is not None and "in the mean of 3" in str(found)


def test_what_stock_has_no_digit_of_is_no_limit():
    """Nor is it none for NaN."""
    exact = torch.full((100,), 1e-7, dtype=torch.float64)
    stock = {"dlora_A": (-2 * exact).bfloat16()}
    for ours, good in ((-20 * exact, True), (exact * float("nan"), False)):
        found = comparing.judged({"dlora_A": ours.bfloat16()}, stock, 2**-7, lambda: {"dlora_A": exact}, lambda: stock)
        assert (found is None) is good, found


def test_a_walk_ends_at_rows_that_cannot_be_unmerged():
    made = Walk(Kind(**vars(HALF) | {"dtype": torch.float16}))
    for twin in (made.stock, made.ours):
        for path, parameter in of_adapter(twin.model, "a0"):
            if "magnitude" in path:
                parameter.data[0] = 0
    assert made.step("merge", 0) and made.step("unmerge", 0)
    assert made.lost and not made.is_comparable() and "by ours alone" in str(made.refused)


def test_every_kind_of_operation_is_drawn():
    assert len(OPERATIONS) >= 20 and all(one.weight > 0 for one in OPERATIONS.values())
