"""adapter_config.json, the index of shards and the alphas of a header, whatever JSON or other text they are.

What is taken is held against PEFT's meaning of a config in a few lines (tests/support/peft_meaning.py), so that a file
that is taken for something else than it says fails, too.
"""

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dora_kernels.extras.analysis import analyze
from dora_kernels.extras.convert import Unrepresentable, convert_checkpoint
from tests.support import hostile_files as hostile
from tests.support import peft_meaning as peft
from tests.support.hostile_files import TEXTS, any_json, depths, render, spoilt, value_or_refusal
from tests.support.hostile_readers import analyzed, check_adapter, converted


@depths
def test_a_config_of_any_json(case, depth):
    @depth(30)
    @given(document=any_json)
    def holds(document):
        check_adapter(case, render(document).encode("utf-8", "surrogatepass"))

    holds()


@depths
def test_a_config_with_a_wrong_part(case, depth):
    patterned = peft.CONFIG | {"rank_pattern": {"w1": 4, ".*": 4}, "alpha_pattern": {r"layers\.1\.": 3, "up": 4.5}}

    @depth(100)
    @given(document=spoilt(patterned))
    def holds(document):
        check_adapter(case, render(document).encode("utf-8", "surrogatepass"))

    holds()


HUGE = hostile.Raw("1" + "0" * 400)
WRONG = {
    "r": (0, -4, None, "4", True, 4.0, HUGE, [4], {"a": 4}, 2**31),
    "lora_alpha": (None, "8", True, HUGE, hostile.Raw("NaN"), hostile.Raw("-Infinity"), hostile.Raw("1e999"), [8], {}),
    "rank_pattern": ({"w1": 0}, {"w1": "4"}, {"w1": None}, {"w1": 4.0}, {"w1": HUGE}, [4], "w1", 4),
    "alpha_pattern": ({"w1": "4"}, {"w1": None}, {"w1": True}, {"w1": [4]}, {"w1": {}}, {"w1": HUGE}, [], "w1", 4),
    "use_dora": ("no", 1, 0, "true", [True]),
    "use_rslora": ("no", 1, 0, "true", {}),
    "fan_in_fan_out": ("no", 1, []),
    "peft_type": (3, True, ["LORA"], "LOHA", "lora"),
    "init_lora_weights": (3, {}, ["gaussian"], "pissa", "x" * 5000),
}
PATTERNS = (
    "a{99999999999}",
    "(" * 2000 + ")" * 2000,
    "(",
    "*",
    "[",
    "(?P<a>x)(?P<a>x)",
    r"\p{L}",
    "(?P>x)",
    "x" * 5000,
)
WRONG["rank_pattern"] += tuple({pattern: 4} for pattern in PATTERNS)
WRONG["alpha_pattern"] += tuple({pattern: 4} for pattern in PATTERNS)


@pytest.mark.parametrize("field", WRONG)
def test_a_field_that_is_wrong_is_named(case, field):
    for value in WRONG[field]:
        folder = case()
        source = peft.write_adapter(folder / "adapter", peft.CONFIG | {field: value})
        base = peft.write_model(folder / "base.safetensors")
        for read in (
            lambda source=source: convert_checkpoint(source, source.parent / "out", "peft", "lycoris", no_bias=True),
            lambda source=source, base=base: analyze(base, [source]),
        ):
            message = value_or_refusal(folder, read, source)[1]
            assert field in message and "expected" in message and len(message) < 700, f"{value!r:.80}: {message}"


@depths
def test_a_config_that_is_right(case, depth):
    """What no reader may refuse: any rank, alpha and flags, harmless patterns, and settings that say nothing."""
    alphas = st.integers(1, 64) | st.sampled_from((0.5, 1.5, 32.0, 2**-20))
    patterns = st.sampled_from(
        (r"layers\.\d+\.mlp\.up", "w1", ".*", "^layers.0.mlp.w1", "(mlp.up|w1)", "[a-z]+", "w1$")
    )

    @depth(40)
    @given(
        rank=st.integers(1, 9),
        alpha=alphas,
        rslora=st.booleans(),
        alpha_pattern=st.dictionaries(patterns, alphas, max_size=3),
        order=st.randoms(use_true_random=False),
    )
    def holds(rank, alpha, rslora, alpha_pattern, order):
        config = peft.CONFIG | {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "alpha_pattern": alpha_pattern}
        config |= {"rank_pattern": {"nothing": 3}, "auto_mapping": {"a": [1]}, "peft_version": "0.19", "revision": None}
        keys = list(config)
        order.shuffle(keys)
        folder = case()
        source = peft.write_adapter(folder / "a", {key: config[key] for key in keys}, peft.adapter_tensors(rank=rank))
        base = peft.write_model(folder / "base.safetensors")
        assert len(analyze(base, [source]).points) == 3
        with contextlib.suppress(Unrepresentable):  # no alpha / R that is alpha / sqrt(R) to the last bit
            for adapter in convert_checkpoint(source, folder / "out", "peft", "dora_kernels", no_bias=True):
                assert adapter.scaling == peft.scaling_of(config, adapter.module)[1]

    holds()


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_a_config(case, name):
    check_adapter(case, TEXTS[name](render(peft.CONFIG).encode()))


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_an_index(case, name):
    check_index(case, TEXTS[name](render(peft.INDEX).encode()))


ELSEWHERE = (
    "",
    ".",
    "..",
    "../secret.safetensors",
    "./one.safetensors",
    "sub/one.safetensors",
    "one.safetensors/",
    "/",
)


def check_index(case, text):
    """A model of shards with this text as its index, as the base and as what was tuned."""
    folder = case()
    base = peft.write_model(folder / "base.safetensors")
    peft.write_model(folder / "secret.safetensors", seed=2)
    sharded = folder / "sharded"
    (sharded / "sub").mkdir(parents=True)
    for name in ("one.safetensors", "two.safetensors", "sub/one.safetensors"):
        peft.write_model(sharded / name, seed=3)
    (sharded / "model.safetensors.index.json").write_bytes(text)
    for pair in ((base, sharded), (sharded, base)):
        result = analyzed(folder, *pair, sharded)
        for point in result.points if result else ():
            weights = [load_file(sharded / "one.safetensors" if path == sharded else path) for path in pair]
            expected = peft.change(*(tensors[f"{point.layer}.weight"] for tensors in weights))
            assert (point.delta_magnitude, point.delta_direction) == pytest.approx(expected, rel=1e-6)
    if result is not None:
        files = set(json.loads(text)["weight_map"].values())
        assert files <= {"one.safetensors", "two.safetensors"}, "a file of another folder was read"


@depths
def test_an_index_of_any_json(case, depth):
    @depth(40)
    @given(document=any_json | st.builds(lambda inner: {"weight_map": inner}, any_json))
    def holds(document):
        check_index(case, render(document).encode("utf-8", "surrogatepass"))

    holds()


@depths
def test_an_index_with_a_wrong_part(case, depth):
    @depth(30)
    @given(document=spoilt(peft.INDEX, st.sampled_from(ELSEWHERE) | st.just("/proc/self/mem") | hostile.leaves))
    def holds(document):
        check_index(case, render(document).encode("utf-8", "surrogatepass"))

    holds()


def check_header_alphas(case, text):
    """A file of our format with this text as its alphas."""
    folder = case()
    source = folder / "ours.safetensors"
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in peft.adapter_tensors().items()}
    save_file(tensors, source, {"dora_alpha": text})
    read = converted(folder, source, source_format="dora_kernels")
    if read is not None:
        alphas = json.loads(text)
        assert {module: alpha for module, (alpha, *_) in read.items()} == alphas
        assert all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas.values())


@depths
def test_alphas_in_a_header(case, depth):
    alphas = dict.fromkeys(peft.MODULES, 8)

    @depth(40)
    @given(document=any_json | spoilt(alphas) | st.just(alphas))
    def holds(document):
        text = render(document)
        check_header_alphas(case, text.encode("utf-8", "replace").decode())

    holds()


@pytest.mark.parametrize("name", [name for name in TEXTS if "UTF" not in name and "Latin" not in name])
def test_the_text_of_alphas_in_a_header(case, name):
    check_header_alphas(case, TEXTS[name](render(dict.fromkeys(peft.MODULES, 8)).encode()).decode("utf-8", "replace"))
