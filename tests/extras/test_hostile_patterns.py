"""rank_pattern and alpha_pattern: what `re` says of a name, or a ValueError; and in seconds, whatever the pattern."""

import contextlib
import re
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_kernels.extras.patterns import pattern_values
from tests.support import hostile_patterns as patterns
from tests.support import peft_meaning as peft
from tests.support.hostile_files import Hung, bounded, depths
from tests.support.hostile_readers import analyzed, converted

# a field's limit of 10 s, and all else on a machine that is busy
LONGEST = 25.0


def fits(pattern, name):
    """What PEFT says of the end of a name: True, False, "no pattern"; None where `re` takes over 0.1 s."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with bounded(0.1):
                return bool(re.match(rf"(.*\.)?({pattern})$", name))
        except Hung:
            return None
        except (re.error, RecursionError, OverflowError):
            return "no pattern"


def assert_read(read, pattern, modules):
    """alpha is 4 where `re` says that the pattern fits, and 8 elsewhere. Returns what it says, by module."""
    expected = {module: fits(pattern, module) for module in modules}
    for module, fit in expected.items():
        alphas = {True: 4, False: 8, None: read[module][0]}
        assert read[module][0] == alphas.get(fit), f"{pattern:.80} and {module}: {fit}"
    return expected


def adapter(folder, names, **fields):
    return peft.write_adapter(folder / "adapter", peft.CONFIG | fields, peft.adapter_tensors(names))


@depths
def test_harmless_patterns_are_read_as_re_does(case, depth):
    @depth(30)
    @given(found=st.lists(st.sampled_from(patterns.HARMLESS), unique=True, max_size=4))
    def holds(found):
        alphas = {pattern: 2.0**-place for place, pattern in enumerate(found)}
        folder = case()
        source = adapter(folder, peft.MODULES, alpha_pattern=alphas)
        read = converted(folder, source)
        for name in peft.MODULES:
            expected = next((alphas[pattern] for pattern in found if fits(pattern, name)), 8)
            assert read[name][0] == expected

    holds()


@depths
def test_what_is_accepted_is_read_as_re_does(depth):
    """Any pattern over any short name."""
    accepted = []

    @depth(300)
    @given(pattern=patterns.any_pattern, modules=st.lists(patterns.names, min_size=1, max_size=4, unique=True))
    def holds(pattern, modules):
        with bounded(LONGEST), contextlib.suppress(ValueError):
            found = pattern_values("convert", "alpha_pattern", {pattern: 4}, modules, 8)
            accepted.extend(assert_read({name: [alpha] for name, alpha in found.items()}, pattern, modules).values())

    holds()
    assert accepted.count(True) > 50 and accepted.count(False) > 50


@pytest.mark.parametrize("kind", patterns.ENDLESS)
def test_endless_patterns_end(case, kind, monkeypatch):
    """Over names that fit all but to the end. The limit is made short, and is what ends them."""
    monkeypatch.setattr("dora_kernels.extras.patterns.SECONDS", 0.1)
    names = ("a" * 40 + "!", "a" * 900 + "!", "aab" * 10)
    for pattern in patterns.ENDLESS[kind]:
        folder = case()
        base = peft.write_model(folder / "base.safetensors", names)
        source = adapter(folder, names, rank_pattern={"nothing": 4}, alpha_pattern={pattern: 4})
        begun = time.process_time()
        read = converted(folder, source, command=False)
        analyzed(folder, base, source, command=False)
        assert time.process_time() - begun < 4, f"{pattern:.80}"
        if read is not None:
            assert_read(read, pattern, names)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.nightly)])
def test_many_patterns_over_many_modules(case, count):
    """Harmless ones are done in the limit; endless ones, of which each ends by itself, are refused at it."""
    names = [f"layers.{place}.mlp.w1" for place in range(count)]
    folder = case()
    harmless = {rf"layers\.{place}\.nothing": 4 for place in range(count)}
    source = adapter(folder, names, alpha_pattern=harmless)
    read = converted(folder, source, seconds=LONGEST, command=False)
    assert count > 100 or read is not None
    slow = {rf"(.*l){{12}}{place}": 4 for place in range(count)}
    source = adapter(case(), [f"{name}{'l' * 20}!" for name in names], alpha_pattern=slow)
    converted(source.parent, source, seconds=LONGEST, command=False)
