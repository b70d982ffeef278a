"""The planner's choices where something was measured on this GPU; where nothing was, they are the cost model's."""

import itertools
from dataclasses import replace

import pytest
import torch

from dora_kernels.planning import costs, devices, measured, plan, side_costs
from dora_kernels.planning.costs import DEVICES, Shape
from dora_kernels.planning.measured import BESIDE, NOTHING
from tests.support.tuned_tables import H200, entry, forget_tables, pretend_table

CPU = torch.device("cpu")
PLAIN = {"needs_base": False, "adapters_are_wider": False}
ASKS = [{"needs_base": base, "adapters_are_wider": wider} for base, wider in itertools.product((False, True), repeat=2)]
# all that could be won is won, by far
TIMES = {
    "forward": {"split": 100.0, "fused": 80.0, "merged": 90.0},
    "inference": {"split": 100.0, "fused": 80.0, "merged": 90.0},
    "backward": {"none": 100.0, "token sums": 80.0, "low rank": 90.0},
}
SHAPES = [
    Shape(*sizes, itemsize, packed)
    for *sizes, itemsize, packed in itertools.product(
        (0, 16, 512, 8192, 32768), (1024, 4096, 14336), (4096, 8192), (8, 64, 384), (2, 4), (0.0, 0.52)
    )
]


@pytest.fixture
def won(tmp_path, monkeypatch):
    """The table of an H200 on which all was won at 8192 x 4096 x 4096, R = 64; all tensors are on one."""
    pretend_table(monkeypatch, tmp_path, entry(**TIMES))
    yield measured.table_of(H200.name)
    forget_tables()


def saved(sizes=(4096, 4096, 64), asked="auto", dtype=torch.bfloat16, backend="triton", **asks):
    return plan.saved_tensor(asked, dtype, backend, CPU, sizes, **PLAIN | asks)


def forward(shape, asked="auto", norm_given=False, device=DEVICES["NVIDIA H200"], table=NOTHING, **asks):
    return plan.forward_way(asked, norm_given, shape, device, table, **PLAIN | asks)


def by_cost_model(asked, norm_given, shape, device, needs_base, adapters_are_wider):
    """The way of a forward pass that saves nothing, as it was chosen before anything could be measured."""
    if needs_base or asked != "auto":
        return "split" if needs_base else asked
    if adapters_are_wider or (device is DEVICES["cpu"] and shape.itemsize == 2):
        return "split"
    if device is DEVICES["cpu"] and not norm_given:
        return "merged"
    ways = {way: costs.forward_costs(shape, way, device, norm_given) for way in ("split", "merged")}
    return costs.fastest(ways, shape, device)


@pytest.mark.parametrize("name", DEVICES)
def test_without_a_table_the_cost_model_chooses(name):
    """On every device, and with the table of a card on which the other ways have lost."""
    device = DEVICES[name]
    sizes = {(shape.N, shape.K, shape.R) for shape in SHAPES}
    slower = [measured.Entry(8192, *at, (100.0, 99.5, 99.5), (100.0,) * 3, (100.0, None, None, 99.5)) for at in sizes]
    tables = (NOTHING, measured.Table(tuple(slower)))
    ways = set()
    for shape, norm_given, asked, asks in itertools.product(SHAPES, (False, True), ("auto", "split", "merged"), ASKS):
        expected = by_cost_model(asked, norm_given, shape, device, **asks)
        ways.add(expected)
        for table in tables:
            assert forward(shape, asked, norm_given, device, table, **asks) == expected
            if asked != "fused":
                assert plan.beside(asked, shape, device, table) == ()
    assert ways == {"split", "merged"}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("backend", ("auto", "triton", "reference"))
def test_without_a_table_a_training_step_keeps_what_it_has_kept(backend, dtype):
    for asked, device, asks in itertools.product(("auto", "split", "merged"), (CPU, torch.device("cuda")), ASKS):
        split = asks["needs_base"] or asked == "split"
        if asked == "auto":
            split = split or asks["adapters_are_wider"] or dtype.itemsize == 2
        by_gemm = device is CPU and backend != "triton" and dtype == torch.bfloat16 and not any(asks.values())
        expected = ("z_gemm" if by_gemm else "base") if split else "z_merged"
        assert plan.saved_tensor(asked, dtype, backend, device, (4096, 4096, 64), **asks) == expected


def test_what_has_won_is_taken_near_where_it_has(won):
    for N, K, R in ((4096, 4096, 64), (2048, 8192, 16), (8192, 2048, 256)):
        assert saved((N, K, R)) == "z_gemm"
        assert forward(Shape(8192, N, K, R, 2), table=won) == "fused"
        assert plan.beside("auto", Shape(8192, N, K, R, 2), DEVICES["sm_90"], won) == ("token_sums",)
    for N, K, R in ((14336, 4096, 64), (4096, 14336, 64), (4096, 4096, 384), (4096, 4096, 8)):
        assert saved((N, K, R)) == "base"
        shape = Shape(8192, N, K, R, 2)
        assert forward(shape, table=won) == forward(shape) != "fused"
        assert plan.beside("auto", shape, DEVICES["sm_90"], won) == ()


def test_a_merged_weight_that_has_won_in_training_is_kept(tmp_path, monkeypatch):
    pretend_table(monkeypatch, tmp_path, entry(R=384, forward={"split": 500.0, "merged": 450.0, "fused": 480.0}))
    assert saved((4096, 4096, 384)) == "z_merged" and saved((4096, 4096, 64)) == "base"
    forget_tables()


def test_tokens_count_where_nothing_is_kept(won):
    shapes = {M: Shape(M, 4096, 4096, 64, 2) for M in (1, 4095, 4096, 1 << 20)}
    for norm_given in (False, True):
        ways = {M: forward(shape, norm_given=norm_given, table=won) for M, shape in shapes.items()}
        before = {M: forward(shape, norm_given=norm_given) for M, shape in shapes.items()}
        assert ways == before | {4096: "fused", 1 << 20: "fused"}
    found = [plan.beside("auto", shape, DEVICES["sm_90"], won) for shape in shapes.values()]
    assert found == [(), (), ("token_sums",), ("token_sums",)]


def test_what_a_call_cannot_do_or_does_not_ask_for_is_not_taken(won):
    shape = Shape(8192, 4096, 4096, 64, 2)
    for asks in ({"needs_base": True}, {"adapters_are_wider": True}):
        assert saved(**asks) == "base" and forward(shape, table=won, **asks) == "split"
    assert plan.beside("auto", shape, DEVICES["sm_90"], won, adapters_are_wider=True) == ()
    # the table is of half precision, and of our kernels
    for dtype in (torch.float32, torch.float64):
        assert saved(dtype=dtype) == "z_merged"
    for wide in (shape._replace(itemsize=4), shape._replace(itemsize=8)):
        assert forward(wide, table=won) == forward(wide)
        assert plan.beside("auto", wide, DEVICES["sm_90"], won) == ()
        assert plan.beside("fused", wide, DEVICES["sm_90"], won) == ()
    assert saved(dtype=torch.float16, backend="reference") == "base"
    for asked, kept in (("split", "base"), ("merged", "z_merged"), ("fused", "z_gemm")):
        assert saved(asked=asked) == kept and forward(shape, asked, table=won) == asked
        assert (plan.beside(asked, shape, DEVICES["sm_90"], won) == ()) == (asked != "fused")
    # a quantized weight is decoded beside every way alike, or on the way to a merged one
    assert forward(shape._replace(packed=0.52), table=won) == "fused"


@pytest.mark.parametrize("sizes", ((4100, 4096, 64), (4096, 4100, 64), (4096, 4096, 20)), ids=str)
def test_rows_that_our_gemm_cannot_take_are_not_fused(sizes, won):
    """They are no multiple of 16 bytes; next is what has won by less."""
    assert saved(sizes) == "z_merged"
    assert forward(Shape(8192, *sizes, 2), table=won) == "merged"


def test_no_other_card_is_spoken_for(won, monkeypatch):
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200 NVL", "cpu"):
        monkeypatch.setattr(devices, "device_facts", lambda device, name=name: replace(H200, name=name))
        assert saved() == "base" and measured.table_on(CPU, "auto") is NOTHING


def test_the_fused_way_runs_beside_dx_what_the_cost_model_finds_fastest():
    shapes = [Shape(M, N, K, R, 2) for M in (0, 64, 8192) for N, K, R in ((4096, 14336, 16), (8192, 8192, 64))]
    shapes += [Shape(8192, 4096, 4096, 0, 2), Shape(8192, 0, 4096, 64, 2)]
    for device in (DEVICES["NVIDIA H200"], DEVICES["NVIDIA H100 80GB HBM3"]):
        found = [plan.beside("fused", shape, device) for shape in shapes]
        assert found == [BESIDE[side_costs.fastest_beside(shape, device)] for shape in shapes]
        assert any(found) and not any(found[:2]) and not any(found[-2:])
    for name in ("cpu", "sm_80", "sm_100", "gfx942"):  # no GEMM of ours
        assert not any(plan.beside("fused", shape, DEVICES[name]) for shape in shapes)


def test_the_fused_way_goes_by_what_was_measured_where_something_was(won):
    shape, device = Shape(8192, 8192, 8192, 64, 2), DEVICES["NVIDIA H200"]
    assert plan.beside("fused", shape, device) == BESIDE["low rank"]
    # the first entry is better with the token sums, the second with nothing
    assert plan.beside("fused", shape, device, won) == BESIDE["token sums"]
    (only,) = won.entries
    none = measured.Table((only._replace(backward=(100.0, 120.0, 101.0, None)),))
    assert plan.beside("fused", shape, device, none) == ()


def test_choices_are_kept_by_all_that_they_were_made_from(won):
    shape, device = Shape(8192, 4096, 4096, 64, 2), DEVICES["NVIDIA H200"]
    asked = [(shape, table) for shape in (shape, shape._replace(M=16)) for table in (NOTHING, won)]
    for _ in range(2):
        assert [forward(shape, table=table) for shape, table in asked] == ["merged", "fused", "split", "split"]
        found = [plan.beside("auto", shape, device, table) for shape, table in asked]
        assert found == [(), ("token_sums",), (), ()]
    (only,) = won.entries
    other = measured.Table(
        (only._replace(inference=(None,) * 3, backward=(None,) * 4),)
    )  # of the same card, read again
    assert forward(shape, table=other) == "merged" and plan.beside("auto", shape, device, other) == ()
    for known in (plan._faster_forward, plan._faster_beside):
        assert known.cache_info().maxsize is not None, "M varies, and a long run must not fill the memory"
