"""The user's choices: they nest, are restored, and come from the environment where nobody names them."""

import inspect
import runpy

import pytest

from dora_kernels.planning.options import Options, current_options, options


def test_options_nest_and_are_restored():
    assert current_options() == Options()
    with options(backend="reference", way="split"):
        with options(way="merged"), pytest.raises(KeyError):
            assert current_options() == Options("reference", "merged", "auto")
            raise KeyError
        assert current_options() == Options("reference", "split", "auto")
    assert current_options() == Options()


@pytest.mark.parametrize("name", ("backend", "way", "precision"))
def test_an_unknown_option_is_named(name):
    with pytest.raises(ValueError, match=f"options: {name} is 'fast'; expected one of auto, "):
        with options(**{name: "fast"}):
            pass
    assert current_options() == Options()


def imported_again():
    """The file of the options, which reads the environment when it is imported."""
    return runpy.run_path(inspect.getfile(Options))


@pytest.mark.parametrize(
    ("value", "expected"), (("reference", "reference"), ("auto", "auto"), (None, "auto"), ("", "auto"))
)
def test_the_environment_switch(value, expected, monkeypatch):
    """test_fallback.py has what a process does with it."""
    if value is None:
        monkeypatch.delenv("DORA_KERNELS_BACKEND", raising=False)
    else:
        monkeypatch.setenv("DORA_KERNELS_BACKEND", value)
    assert imported_again()["current_options"]().backend == expected


def test_a_wrong_environment_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("DORA_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="DORA_KERNELS_BACKEND is 'fast'"):
        imported_again()
