"""The table of what was measured on a GPU: what of it is read, and what it says of shapes that were not measured."""

import itertools
import json
import logging
import random

import pytest
import torch

from dora_kernels.planning import configs, measured
from dora_kernels.planning.measured import NOTHING, PARTS, fastest, table_of
from tests.support.tuned_tables import H200, entry, forget_tables, pretend_table

TUNED = sorted(configs.TUNED_FOLDER.glob("*.json"))
SIZES = 4096, 4096, 64
CONFIGS = {"2": {"norm": {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3}}}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that writes the file of an H200, and returns what is read of it."""

    def write(*entries, **parts):
        pretend_table(monkeypatch, tmp_path, *entries, **parts)
        return table_of(H200.name)

    yield write
    forget_tables()


def entries_of(*found):
    """Entries as they are read."""
    return tuple(measured._entry(one, "ways[0]") for one in found)


def test_an_entry_is_read_as_it_was_written(table):
    times = {"forward": {"split": 463, "fused": 441.5}, "backward": {"none": 472.8, "token sums": 451.3}}
    read = table(entry(**times), entry(M=2048, inference={"merged": 3.5})).entries
    assert read[0] == (8192, 4096, 4096, 64, (463, 441.5, None), (None,) * 3, (472.8, None, 451.3, None))
    assert read[1] == (2048, 4096, 4096, 64, (None,) * 3, (None, None, 3.5), (None,) * 4)
    assert table_of("NVIDIA H100 80GB HBM3") is table_of("cpu") is NOTHING


def test_a_file_is_read_once_and_need_not_be_there(table, tmp_path, caplog):
    read = table(entry())
    (tmp_path / "nvidia-h200.json").write_text("{")
    assert table_of(H200.name) is read and table_of("Some GPU") is NOTHING
    (tmp_path / "some-gpu.json").write_text("{")
    assert table_of("Some GPU") is NOTHING and not caplog.records


def test_either_part_may_be_missing(table, caplog):
    assert len(table(entry()).entries) == 1 and configs.tuned_configs(H200.name, H200.target) == {}
    tuned = table(configs=CONFIGS)
    assert tuned.entries == () and len(configs.tuned_configs(H200.name, H200.target)) == 1
    (configs.TUNED_FOLDER / "nvidia-h200.json").write_text('{"meta": {}}')
    forget_tables()
    assert table_of(H200.name) is NOTHING and configs.tuned_configs(H200.name, H200.target) == {}
    assert not caplog.records


BROKEN = [
    ({"forward": {"split": 1}}, "ways is {"),
    (None, "ways is None; expected a list"),
    ([entry(), []], "ways[1] is []; expected an object"),
    ([entry(M=0)], "ways[0].M is 0; expected a size"),
    ([entry(N=-4096)], "ways[0].N is -4096"),
    ([entry(K=4096.0)], "ways[0].K is 4096.0"),
    ([entry(R=True)], "ways[0].R is True"),
    ([entry(R=1 << 40)], "ways[0].R is 1099511627776"),
    ([{"M": 1, "N": 1, "K": 1}], "ways[0].R is None"),
    ([entry(), entry(forwards={})], "ways[1].forwards is unknown; expected M, N, K, R, forward, inference, backward"),
    ([entry(forward=[1.0])], "ways[0].forward is [1.0]; expected an object"),
    ([entry(forward={"split": 1, "none": 1})], "ways[0].forward.none is unknown; expected split, fused, merged"),
    ([entry(backward={"split": 1})], "ways[0].backward.split is unknown; expected none, low rank, token sums, all"),
    ([entry(inference={"fused": 0})], "ways[0].inference.fused is 0; expected microseconds, more than 0"),
    ([entry(inference={"fused": -1.5})], "ways[0].inference.fused is -1.5"),
    ([entry(inference={"fused": float("nan")})], "ways[0].inference.fused is nan"),
    ([entry(inference={"fused": float("inf")})], "ways[0].inference.fused is inf"),
    ([entry(inference={"fused": 10**400})], "ways[0].inference.fused is 10000"),
    ([entry(inference={"fused": "440"})], "ways[0].inference.fused is '440'"),
    ([entry(inference={"fused": None})], "ways[0].inference.fused is None"),
    ([entry(inference={"fused": True})], "ways[0].inference.fused is True"),
]


@pytest.mark.parametrize(("ways", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_a_broken_entry_is_named_and_takes_nothing_else_with_it(ways, said, table, caplog):
    with caplog.at_level(logging.WARNING, "dora_kernels"):
        read = table(configs=CONFIGS, ways=ways)
        assert read is NOTHING and table_of(H200.name) is NOTHING
        assert len(configs.tuned_configs(H200.name, H200.target)) == 1
    (record,) = caplog.records
    message = record.getMessage()
    assert "nvidia-h200.json: " in message and "ignores 'ways' of" in message and "expected" in message
    assert message.partition("json: ")[2].startswith(said) and len(message) < 400


@pytest.mark.parametrize(
    ("tuned", "said"),
    (
        ([], "configs is []; expected an object"),
        ({"2": []}, "configs.2 is []; expected an object"),
        ({"two": {"norm": {}}}, "configs.two.norm is unknown; expected"),
        ({"2": {"gemm": {}}}, "configs.2.gemm is unknown; expected"),
        ({"2": {"norm": CONFIGS["2"]["norm"] | {"BLOCK_N": 96}}}, "configs.2.norm.BLOCK_N is 96; expected a power"),
        ({"2": {"norm": CONFIGS["2"]["norm"] | {"BLOCK_Q": 64}}}, "configs.2.norm.BLOCK_Q is unknown; expected"),
    ),
)
def test_broken_configurations_are_named_and_take_no_entry_with_them(tuned, said, table, caplog):
    with caplog.at_level(logging.WARNING, "dora_kernels"):
        assert len(table(entry(), configs=tuned).entries) == 1
        assert configs.tuned_configs(H200.name, H200.target) == {}
    (record,) = caplog.records
    assert "ignores 'configs' of" in record.getMessage() and f"nvidia-h200.json: {said}" in record.getMessage()


@pytest.mark.parametrize("text", ("", "{", "[]", "null", "[" * 100000, '{"ways": [}', "\0"), ids=lambda text: text[:9])
def test_a_file_that_is_no_table_is_said_once(text, table, tmp_path, caplog):
    table()
    (tmp_path / "nvidia-h200.json").write_text(text)
    forget_tables()
    with caplog.at_level(logging.WARNING, "dora_kernels"):
        assert table_of(H200.name) is NOTHING and configs.tuned_configs(H200.name, H200.target) == {}
    (record,) = caplog.records
    assert f"dora_kernels ignores {tmp_path / 'nvidia-h200.json'}: " in record.getMessage()


@pytest.mark.parametrize("path", TUNED, ids=lambda path: path.stem)
def test_every_table_of_the_package_has_whole_entries(path, caplog):
    table = json.loads(path.read_text())
    forget_tables()
    assert len(table_of(table["meta"]["device"]).entries) == len(table.get("ways", [])) and not caplog.records


def test_no_table_speaks_for_pytorchs_steps_or_for_a_gpu_that_is_not_there(table):
    read, cpu = table(entry()), torch.device("cpu")
    assert measured.table_on(cpu, "auto") is measured.table_on(cpu, "triton") is read
    assert measured.table_on(cpu, "reference") is NOTHING and measured.entries_on(cpu, "reference") == ()
    assert measured.entries_on(cpu, "auto") is read.entries
    there = torch.cuda.device_count()
    assert measured.entries_on(torch.device("cuda", there), "auto") == ()  # a fake tensor's device


# The rule.
WON, LOST = {"split": 100.0, "fused": 99.0}, {"split": 100.0, "fused": 99.1}


def forward(*found, sizes=SIZES, M=None, part="forward", otherwise="split"):
    return fastest(entries_of(*found), part, sizes, otherwise, M)


def test_a_way_has_to_save_one_percent():
    assert forward(entry(forward=WON)) == "fused" and forward(entry(forward=LOST)) == "split"
    assert forward() == forward(entry()) == forward(entry(inference=WON)) == "split"
    assert forward(entry(forward={"fused": 1.0})) == forward(entry(forward={"split": 1.0})) == "split"
    # against what is otherwise taken
    both = entry(inference={"split": 100.0, "fused": 90.0, "merged": 90.5})
    assert forward(both, part="inference", otherwise="merged", M=8192) == "merged"
    assert forward(both, part="inference", otherwise="split", M=8192) == "fused"


def test_of_several_ways_that_have_won_the_fastest_is_taken():
    times = {"none": 100.0, "low rank": 95.0, "token sums": 94.9, "all": 99.5}
    assert forward(entry(backward=times), part="backward", otherwise="none", M=8192) == "token sums"
    # each of them at every entry: the mean decides
    other = entry(M=16384, backward={"none": 100.0, "low rank": 80.0, "token sums": 90.0, "all": 99.5})
    assert forward(entry(backward=times), other, part="backward", otherwise="none", M=8192) == "low rank"


@pytest.mark.parametrize(
    ("sizes", "near"),
    [
        ((2048, 4096, 64), True),
        ((8192, 8192, 64), True),
        ((2047, 4096, 64), False),
        ((4096, 8193, 64), False),
        ((4096, 4096, 16), True),
        ((4096, 4096, 256), True),
        ((4096, 4096, 15), False),
        ((4096, 4096, 257), False),
        ((4096, 4096, 0), False),
        ((0, 4096, 64), False),
    ],
)
def test_an_entry_speaks_for_sizes_near_its_own(sizes, near):
    assert forward(entry(forward=WON), sizes=sizes) == ("fused" if near else "split")


def test_all_entries_near_a_shape_have_to_agree():
    at = {N: entry(N=N, forward=WON) for N in (4096, 8192)}
    assert forward(*at.values(), sizes=(6000, 4096, 64)) == "fused"
    assert forward(at[4096], entry(N=8192, forward=LOST), sizes=(6000, 4096, 64)) == "split"
    assert forward(at[4096], entry(N=8192), sizes=(6000, 4096, 64)) == "split"  # not measured there
    assert forward(at[4096], entry(N=16384, forward=LOST), sizes=(6000, 4096, 64)) == "fused"  # too far to speak


def test_what_was_measured_at_these_sizes_speaks_alone():
    near = entry(N=8192, forward=LOST), entry(R=16, forward=LOST)
    assert forward(entry(forward=WON), *near) == "fused"
    assert forward(entry(forward=LOST), entry(N=8192, forward=WON)) == "split"


def test_what_is_saved_is_decided_by_entries_of_any_tokens():
    assert forward(entry(M=16, forward=WON)) == forward(entry(M=1 << 20, forward=WON)) == "fused"
    assert forward(entry(forward=WON), entry(M=2048, forward=LOST)) == "split"


@pytest.mark.parametrize(
    ("won", "lost", "taken"),
    [
        ((8192,), (), (4096, 1 << 30)),
        ((2048, 8192), (), (1024, 1 << 30)),
        ((8192,), (2048,), (4096, 1 << 30)),  # too few there
        ((2048,), (8192,), None),  # more tokens made it worse: not understood, not taken
        ((2048, 32768), (8192,), (16384, 1 << 30)),
    ],
)
def test_from_half_of_the_tokens_on(won, lost, taken):
    found = [entry(M=M, inference=WON) for M in won] + [entry(M=M, inference=LOST) for M in lost]
    for M in (1, 1023, 1024, 4095, 4096, 8192, 16383, 16384, 1 << 30):
        expected = "fused" if taken and taken[0] <= M <= taken[1] else "split"
        assert forward(*found, part="inference", M=M) == expected, M


def test_split_is_for_up_to_twice_the_tokens():
    """Where the cost model merges, whose merged weight more tokens repay."""
    found = entry(inference={"split": 90.0, "merged": 100.0})
    ways = [forward(found, part="inference", M=M, otherwise="merged") for M in (1, 8192, 16384, 16385)]
    assert ways == ["split", "split", "split", "merged"]
    # and at all with fewer, not more
    for M, won, taken in ((2048, False, "merged"), (32768, False, "split"), (32768, True, "split")):
        other = entry(M=M, inference={"split": 90.0 if won else 100.0, "merged": 100.0})
        assert forward(found, other, part="inference", M=8192, otherwise="merged") == taken


def drawn(rng, part):
    """Entries of a few shapes that are near each other, times within some percent."""
    ways = PARTS[part]
    return [
        entry(
            M=rng.choice((512, 2048, 8192, 32768)),
            N=rng.choice((4096, 8192)),
            K=rng.choice((4096, 5120)),
            R=rng.choice((16, 64)),
            **{part: {way: 100 + rng.uniform(-6, 6) for way in rng.sample(ways, rng.randint(2, len(ways)))}},
        )
        for _ in range(rng.randint(1, 4))
    ]


@pytest.mark.parametrize("part", PARTS)
def test_the_rule_is_monotone_and_does_not_see_the_order(part):
    rng, plain = random.Random(17), PARTS[part][0]
    changed = 0
    for _ in range(400):
        found = drawn(rng, part)
        sizes = rng.choice((4096, 6000, 8192)), rng.choice((4096, 5120)), rng.choice((16, 32, 64))
        otherwise, M = rng.choice(PARTS[part]), rng.choice((None, 256, 1024, 4096, 50000))
        chosen = forward(*found, sizes=sizes, part=part, otherwise=otherwise, M=M)
        for order in itertools.permutations(found):
            assert forward(*order, sizes=sizes, part=part, otherwise=otherwise, M=M) == chosen
        if chosen == otherwise:
            continue
        changed += 1
        # a way that is faster still is still taken
        faster = [one | {part: one[part] | {chosen: 0.9 * one[part].get(chosen, 1e6)}} for one in found]
        assert forward(*faster, sizes=sizes, part=part, otherwise=otherwise, M=M) == chosen
        # of two, the one taken is taken with more tokens, too; the one that no tokens repay with fewer
        two = [one | {part: {way: one[part][way] for way in (chosen, otherwise) if way in one[part]}} for one in found]
        for factor in (0.5, 0.25) if chosen == plain else (2, 100):
            further = None if M is None else max(1, int(factor * M))
            assert forward(*two, sizes=sizes, part=part, otherwise=otherwise, M=further) == chosen
    assert changed > 20


def test_a_table_is_known_by_identity():
    """The planner's caches ask for its hash in every call."""
    one, other = measured.Table(entries_of(entry())), measured.Table(entries_of(entry()))
    assert one != other and len({one, other, one}) == 2
