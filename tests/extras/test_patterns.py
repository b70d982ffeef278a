"""rank_pattern and alpha_pattern mean what they mean in PEFT, and no pattern of a stranger's takes for ever."""

import re
import time
import tracemalloc

import pytest
from peft.utils.other import get_pattern_key

from dora_kernels.extras import patterns
from dora_kernels.extras.patterns import pattern_values, whole

MODULES = (
    "q_proj", "a.q_proj", "aq_proj", "layers.0.q_proj", "layers.10.q_proj", "model.layers.0.mlp.w1", "layersX0.q_proj",
    "a{e}", "b.a{e}", "a.b^c", "layers.0", "a]b[c", "Q_PROJ", "a\\b", "a b", "été.ñ", "x.", ".x", "q_proj\n",
)  # fmt: skip
KEYS = (
    "q_proj", "layers.0.q_proj", r"layers\.0\.q_proj", r"layers\.\d+\.q_proj", ".*_proj", "^q_proj", "^layers.0.q_proj",
    "(q|k)_proj", "(?:q|k)_proj", "[a-z]+", "[^a-z]*", "w1|q_proj", "a{e\\}", r"a\{e\}", "^a.q_proj$", "x{2,3}|q_proj",
    "q_proj$", "", ".*", r"\w+", r"layers\.1{0,1}0\.q_proj", "(?!a)q_proj", "(?<=a)q_proj", r"(?P<n>l).*(?P=n)?",
    "[a-z]+?", r"\Aq_proj\Z", r"\bq_proj\b", "a[]]b[[]c", "a\\\\b", "a b", "été.ñ", r"été\.ñ", "(", "a**", "x{,2}",
    "[[a]b]", "[a--b]", "[a||b]", "[a&&b]c", "[a~~]", "a{0}", "a{2}{3}", "(?s:.)", "x*+",
    *map(whole, MODULES),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Possible")
@pytest.mark.parametrize("key", KEYS)
def test_a_pattern_fits_what_it_fits_in_peft(key):
    """Or is refused: what PEFT cannot ask, and what the two libraries for regular expressions need not agree about."""
    try:
        expected = {module: bool(re.match(rf"(.*\.)?({key})$", module)) for module in MODULES}
    except re.error:
        with pytest.raises(ValueError, match=r"^f: rank_pattern is .* expected \{pattern: number\}"):
            pattern_values("f", "rank_pattern", {key: True}, MODULES, False)
        return
    if key in ("a{e\\}", "(?s:.)"):
        with pytest.raises(ValueError, match="not all regular expressions read it in the same way"):
            pattern_values("f", "rank_pattern", {key: True}, MODULES, False)
        return
    assert pattern_values("f", "rank_pattern", {key: True}, MODULES, False) == expected
    assert all((get_pattern_key([key], module) == key) >= fits for module, fits in expected.items())


def test_the_first_pattern_that_fits_counts():
    found = {"a.q": 1, whole("a.q"): 2, ".*": 3, whole("b"): 4}
    assert pattern_values("f", "r", found, ("a.q", "aXq", "x.a.q", "b", "c"), 0) == {
        "a.q": 1, "aXq": 1, "x.a.q": 1, "b": 3, "c": 3,
    }  # fmt: skip
    found = {whole("a.q"): 2, "a.q": 1}
    assert pattern_values("f", "r", found, ("a.q", "aXq", "c"), 0) == {"a.q": 2, "aXq": 1, "c": 0}
    assert pattern_values("f", "r", None, ("a",), 5) == pattern_values("f", "r", {}, ("a",), 5) == {"a": 5}


@pytest.mark.parametrize(
    "key",
    [
        "a{99999999999}", "(" * 400 + ")" * 400, "(" * 2000 + ")" * 2000, "(?:a{65535}){65535}", "a" * 1001, "(a", "[",
        "a{e}", "(?:ab){e<=2}", "a{1,e}", "[[:alpha:]]", "[a[:alpha:]]", r"\p{L}",
        r"\X", r"\L<a>", "(?i)a", "(?V1)a", "(?e)a", "(?|a|b)", "(?R)", "(?1)", "(*FAIL)", r"(?<n>a)", "(?(1)a|b)",
        "a)(b", r"\1",
        "x" * 100_000,
    ],
    ids=lambda key: key[:30],
)  # fmt: skip
def test_what_cannot_be_asked_of_both_libraries_is_refused(key):
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^f: rank_pattern is .* expected \{pattern: number\}") as raised:
        pattern_values("f", "rank_pattern", {key: 4}, ["a"], 8)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20 and len(str(raised.value)) < 600
    tracemalloc.stop()


@pytest.mark.parametrize("key", ["(a+)+", "(a|aa)+", "(a|a?)+", "(.*a){25}", "(x+x+)+y", "((a*)*)*", r"(\w*)*\."])
def test_patterns_that_backtrack_for_ever_end(key, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    start = time.monotonic()
    for name in ("a" * 40 + "!", "a" * 999 + "!", "x" * 60):
        try:
            assert pattern_values("f", "rank_pattern", {key: 4}, [name], 8)[name] in (4, 8)
        except ValueError as error:
            assert "in time; expected less than 0.5 s" in str(error)
    assert time.monotonic() - start < 5


def test_all_patterns_and_modules_have_one_limit(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(
        ValueError, match="alpha_pattern has 1000 patterns, and was not done .* expected less than 0.3 s"
    ):
        pattern_values("f", "alpha_pattern", {f"x{i}.*": i for i in range(1000)}, [f"y.{i}" for i in range(10**6)], 8)
    assert time.monotonic() - start < 5


def test_patterns_of_whole_names_take_no_longer_for_many(monkeypatch):
    """As `convert` writes them: PEFT asks every pattern of every module, 10^9 times of these."""
    names = [f"model.layers.{i}.mlp.experts.{j}.down_proj" for i in range(100) for j in range(300)]
    values = pattern_values("f", "r", {whole(name): place for place, name in enumerate(names)}, names, -1)
    assert list(values.values()) == list(range(len(names)))
