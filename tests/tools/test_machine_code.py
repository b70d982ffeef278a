"""tools/machine_code.py reads loops, kinds of instructions and loads out of what the compiler writes.

tools/hot_loops.py judges the loads of sm_90 by it and prints the table; tools/targets.py says how many programs fit.
"""

import pathlib
import sys
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import hot_loops  # noqa: E402
import machine_code  # noqa: E402

# _token_sums_kernel for sm_90 as it sums dA (Triton 3.7.1, nvdisasm -c): its loop, and what is around it cut short
SASS = pathlib.Path(__file__).with_name("token_sums.sass").read_text()


def test_a_loop_of_real_machine_code():
    before_and_after, loop = machine_code.loops(machine_code.instructions(SASS))
    body = SASS.partition(".L_x_1:\n")[2].partition(".L_x_0:\n")[0].splitlines()
    assert (before_and_after.name, loop.name) == ("", "1")
    assert len(loop.code) == len(body) == 142
    assert loop.code[-1] == machine_code.Instruction("BRA", "`(.L_x_1)", "!P6")
    counts = loop.counts()
    for kind, text in {
        "LDGSTS.128": " LDGSTS.E.BYPASS.128 ",
        "BAR": " BAR.",
        "HGMMA.64x64x16": " HGMMA.64x64x16.",
    }.items():
        assert counts[kind] == sum(text in line for line in body) > 0, kind
    assert counts["LDGSTS.128"] == 6 and counts["HGMMA.64x64x16"] == 4 and counts["BAR"] == 2
    assert not {"LDS.32", "LDG.128", "SHFL"} & set(counts), "`@!PT LDS RZ, [RZ]` loads nothing"
    assert 0.6 < (counts["integer"] + counts["predicate"]) / counts.total() < 0.9


def test_the_code_outside_a_loop_ends_at_its_exit():
    outside = machine_code.loops(machine_code.instructions(SASS))[0].code
    text = SASS.split(".L_x_1:\n")[0] + SASS.split(".L_x_0:\n")[1].split(".L_x_2:\n")[0]
    assert len(outside) == text.count("*/"), "the branch to itself and the NOPs behind EXIT are never reached"


def _names(*lines: str) -> dict[str, list[str]]:
    """Loop -> its operations, of code given as lines of SASS without offsets."""
    text = "\n".join(line if line.endswith(":") else f"/*{index:04x}*/ {line} ;" for index, line in enumerate(lines))
    found = machine_code.loops(machine_code.instructions(text))
    return {loop.name: [instruction.operation for instruction in loop.code] for loop in found}


def test_loops_nest():
    found = _names(
        "MOV", ".L_x_0:", "IADD3", ".L_x_1:", "FADD", "@P0 BRA `(.L_x_1)", ".L_x_2:", "FMUL", "@!P1 BRA `(.L_x_2)",
        "@UP0 BRA `(.L_x_0)", ".L_x_3:", "FFMA", "BRA.U !UP1, `(.L_x_3)", "EXIT",
    )  # fmt: skip
    assert found == {
        "": ["MOV", "EXIT"],
        "1": ["IADD3", "BRA"],
        "1.1": ["FADD", "BRA"],
        "1.2": ["FMUL", "BRA"],
        "2": ["FFMA", "BRA.U"],
    }


def test_two_branches_to_one_header_are_one_loop():
    found = _names("MOV", ".L_x_0:", "FADD", "@P0 BRA `(.L_x_0)", "FMUL", "@P1 BRA `(.L_x_0)", "EXIT")
    assert found == {"": ["MOV", "EXIT"], "1": ["FADD", "BRA", "FMUL", "BRA"]}


def test_code_that_ptxas_puts_aside_is_no_loop_of_its_own():
    """A slow path behind EXIT jumps backward, into the loop that it is part of or into no loop at all."""
    found = _names(
        ".L_x_0:", "FADD", "@P0 BRA `(.L_x_2)", ".L_x_1:", "FMUL", "@P1 BRA `(.L_x_0)", "MUFU", "@P2 BRA `(.L_x_3)",
        ".L_x_4:", "EXIT", ".L_x_2:", "SHFL", "BRA `(.L_x_1)", ".L_x_3:", "LDG.E", "BRA `(.L_x_4)",
        ".L_x_5:", "BRA `(.L_x_5)",
    )  # fmt: skip
    assert found == {
        "": ["MUFU", "BRA", "EXIT", "LDG.E", "BRA"],
        "1": ["FADD", "BRA", "FMUL", "BRA", "SHFL", "BRA"],
    }


def test_operands_end_before_what_blackwell_waits_for():
    text = "/*02b0*/  @P1 BAR.SYNC.DEFER_BLOCKING 0x0          &req={4} &wr=0x2 ?trans6;\n/*02c0*/ ERRBAR ?trans1;"
    assert machine_code.instructions(text) == [
        machine_code.Instruction("BAR.SYNC.DEFER_BLOCKING", "0x0", "P1"),
        machine_code.Instruction("ERRBAR"),
    ]


def test_threads_meet_again_where_bssy_says():
    found = _names(
        ".L_x_0:", "BSSY B0, `(.L_x_1)", "@P0 BRA `(.L_x_2)", "BSYNC B0", ".L_x_1:", "@P1 BRA `(.L_x_0)", "EXIT",
        ".L_x_2:", "FADD", "BSYNC B0",
    )  # fmt: skip
    assert found == {"": ["EXIT"], "1": ["BSSY", "BRA", "BSYNC", "BRA", "FADD", "BSYNC"]}


@pytest.mark.parametrize(
    "operation, kind",
    {
        "LDG.E.128": "LDG.128",
        "LDG.E.U16.CONSTANT": "LDG.16",
        "LDG.E.LTC128B.64": "LDG.64",  # the size of a prefetch into the L2 cache, not of the load
        "LDG.E.EF": "LDG.32",
        "LDGSTS.E.BYPASS.LTC128B.128": "LDGSTS.128",
        "LDGSTS.E.64": "LDGSTS.64",
        "LDGDEPBAR": "other",
        "UTMALDG.2D": "UTMALDG",
        "STS.U16": "STS.16",
        "LDSM.16.M88.4": "LDSM",
        "BAR.SYNC.DEFER_BLOCKING": "BAR",
        "DEPBAR.LE": "other",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": "SYNCS",
        "SHFL.BFLY": "SHFL",
        "HGMMA.64x128x16.F32.BF16": "HGMMA.64x128x16",
        "HMMA.16816.F32.BF16": "HMMA.16816",
        "IMAD.WIDE.U32": "integer",
        "IMAD.MOV.U32": "other",
        "UIADD3.X": "integer",
        "UISETP.GE.AND": "predicate",
        "FFMA.FTZ": "other",
    }.items(),
)
def test_kinds(operation, kind):
    assert machine_code.kind(machine_code.Instruction(operation)) == kind


# shortened from _norm_kernel and _project_kernel, Triton 3.7.1
PTX = """
.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 _kernel_param_0,
	.param .u32 _kernel_param_1,
	.param .u64 .ptr .global .align 1 _kernel_param_2
)
{
	ld.param.b64 	%rd1, [_kernel_param_0];
	ld.param.b32 	%r1, [_kernel_param_1];
	ld.param.b64 	%rd2, [_kernel_param_2];
	mul.wide.s32 	%rd3, %r1, 2;
	add.s64 	%rd4, %rd1, %rd3;
	mov.b64 	%rd5, 0;
	@%p1 ld.global.b64 { %rd6 }, [ %rd1 + 24 ];
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	add.s64 	%rd7, %rd4, %rd5;
	@%p2 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd7 + 0 ];
	add.s64 	%rd8, %rd2, %rd5;
	cp.async.ca.shared.global [ %r6 + 0 ], [ %rd8 + 0 ], 0x8, %r7;
	cp.async.cg.shared.global [ %r6 + 64 ], [ %rd8 + 0 ], 0x10, %r7;
	mul.wide.u32 	%rd9, %r2, 4;
	add.s64 	%rd10, %rd2, %rd9;
	ld.global.b16 { %rs1 }, [ %rd10 + 0 ];
	add.s64 	%rd11, %rd6, %rd5;
	ld.global.b32 { %r8 }, [ %rd11 + 0 ];
	add.s64 	%rd5, %rd5, 128;
	setp.lt.s64 	%p3, %rd5, %rd3;
	@%p3 bra 	$L__BB0_1;
	st.global.v4.b32 [ %rd2 + 0 ], { %r2, %r3, %r4, %r5 };
	ret;
}
"""


def test_loads_of_ptx_and_the_arguments_that_they_read():
    assert machine_code.loads(PTX, ["weight_ptr", "", "factor_ptr"]) == [
        machine_code.Load("", "weight_ptr", 8, False),
        machine_code.Load("1", "weight_ptr", 16, False),
        machine_code.Load("1", "factor_ptr", 8, True),
        machine_code.Load("1", "factor_ptr", 16, True),
        machine_code.Load("1", "factor_ptr", 2, False),  # a gather: the address is factor's, the index was loaded
        machine_code.Load("1", "weight_ptr->", 4, False),  # the address itself was loaded
    ]


def _compiled(
    *loads: tuple,
    name: str = "_other_kernel",
    rank: int = 64,
    loops: dict | None = None,
    roles: tuple = (),
    **constants,
):
    """(job, compiled) with these loads (loop, argument, bytes, asynchronous); the machine code has them too."""
    loads = [machine_code.Load(*load) for load in loads]
    if loops is None:
        loops = {}
        for load in loads:
            kind = f"{'LDGSTS' if load.asynchronous else 'LDG'}.{8 * load.bytes}"
            loops.setdefault(load.loop, {})[kind] = 1
    specialization = SimpleNamespace(
        name=name,
        target=SimpleNamespace(name="sm_90", multiprocessors=132),
        grid=(64, 4),
        constants=lambda: constants,
        flags=lambda: "dense",
        tiles=lambda: "BLOCK_N=64 warps=4 stages=3",
        bytes_of={"dy": 3 << 20, "dB": 1 << 20},
        walks_blocks=lambda: name == "_walking_kernel",
    )
    job = SimpleNamespace(variant="bf16", rank=rank, call="train", shape=(8192, 4096, 4096))
    job.specialization = specialization
    resources = {"registers": 140, "spills": 0, "shared": 65536, "programs": 3, "limited_by": "registers", "error": ""}
    return job, SimpleNamespace(loops=loops, loads=loads, roles=roles, through_l2=2345678, **resources)


def _complaints(*results, everything: bool = False) -> list[str]:
    return [line.partition("sm_90: ")[2] or line for line in hot_loops.complaints(results, everything)]


def test_a_load_in_a_loop_is_asynchronous_and_of_16_bytes():
    assert not _complaints(_compiled(("1", "dy", 16, True), ("", "dy", 2, False)))
    found = _complaints(_compiled(("1", "saved", 16, False), ("1.1", "dy", 8, True)))
    assert found == ["saved is loaded synchronously", "dy is loaded in 8 bytes a thread, expected 16"]


def test_without_a_loop_all_loads_count():
    assert _complaints(_compiled(("", "saved", 16, False))) == ["saved is loaded synchronously"]


def test_what_is_loaded_once_a_block_is_not_judged():
    loads = ("1", "lora_B", 16, False), ("1.1", "dy", 16, False)
    assert _complaints(_compiled(*loads, name="_walking_kernel")) == ["dy is loaded synchronously"]
    assert len(_complaints(_compiled(*loads))) == 2


def test_a_walk_that_cannot_be_found_is_noticed():
    """A compiler that took the two loops apart otherwise would leave nothing to judge."""
    assert _complaints(_compiled(("1", "dy", 16, False), name="_walking_kernel")) == [
        "no loop over the steps of a block loads anything"
    ]


def test_rows_of_8_numbers_may_come_in_halves(monkeypatch):
    monkeypatch.setattr(hot_loops, "EXEMPTIONS", ())
    assert not _complaints(_compiled(("1", "low", 8, True), rank=8))
    assert _complaints(_compiled(("1", "low", 4, True), rank=8))
    assert _complaints(_compiled(("1", "low", 8, True), rank=64))
    assert _complaints(_compiled(("1", "dy", 8, True), rank=8)), "its rows are long"


def test_loads_that_only_the_machine_code_has_are_noticed(monkeypatch):
    monkeypatch.setattr(hot_loops, "EXEMPTIONS", (hot_loops.Exemption("merge", "*", "all of them"),))
    read = _compiled(("1", "dy", 16, True), loops={"": {"LDG.32": 1}, "1": {"LDGSTS.128": 4, "LDG.128": 1}})
    assert _complaints(read) == ["LDG.128 is not in the PTX"]
    merged = _compiled(("", "weight.pointers[0]", 16, False), name="_merge_kernel", loops={"": {"LDG.8": 1}})
    assert _complaints(merged) == ["LDG.8 is not in the PTX"], "no exemption covers it"


def test_an_exemption_covers_its_kernel_argument_and_condition_alone(monkeypatch):
    entry = hot_loops.Exemption(
        "norm", "weight.pointers.[12]", "why", lambda one: one.constants()["FORMAT"].name == "hqq4"
    )
    monkeypatch.setattr(hot_loops, "EXEMPTIONS", (entry,))
    gather = ("1", "weight.pointers[1]", 2, False)
    assert not _complaints(_compiled(gather, name="_norm_kernel", FORMAT=SimpleNamespace(name="hqq4")), everything=True)
    assert _complaints(_compiled(gather, name="_norm_kernel", FORMAT=SimpleNamespace(name="dense")))
    assert _complaints(_compiled(gather, name="_merge_kernel", FORMAT=SimpleNamespace(name="hqq4")))
    assert _complaints(
        _compiled(("1", "weight.pointers[0]", 2, False), name="_norm_kernel", FORMAT=SimpleNamespace(name="hqq4"))
    )


def test_a_narrow_load_may_be_exempt_where_a_synchronous_one_is_not(monkeypatch):
    monkeypatch.setattr(hot_loops, "EXEMPTIONS", (hot_loops.Exemption("*", "low", "a small tile", narrow=True),))
    assert not _complaints(_compiled(("1", "low", 4, True)))
    assert _complaints(_compiled(("1", "low", 4, False))) == ["low is loaded synchronously"]


def test_an_exemption_that_nothing_needs_is_complained_of(monkeypatch):
    entries = hot_loops.Exemption("*", "gain_ptr", "first"), hot_loops.Exemption("epilogue", "gain_ptr", "second")
    monkeypatch.setattr(hot_loops, "EXEMPTIONS", entries)
    needs_the_first = _compiled(("", "gain_ptr", 4, False), name="_epilogue_kernel")
    assert not _complaints(needs_the_first)
    found = _complaints(needs_the_first, everything=True)
    assert found == ["hot_loops.EXEMPTIONS: nothing needs epilogue gain_ptr (second)"]


def test_the_table_has_a_row_for_what_is_outside_and_for_each_loop():
    counts = {"": {"other": 7}, "1": {"integer": 5, "predicate": 2, "LDG.128": 8, "BAR": 5, "other": 1}}
    inner = {"LDGSTS.128": 8, "STS.32": 1, "SHFL": 4, "HGMMA.64x128x16": 4}
    outside, outer, inner = (
        dict(zip(hot_loops.HEADER, row, strict=True))
        for row in hot_loops.rows(*_compiled(loops=counts | {"1.1": inner}), every=True)
    )
    assert (outside["kernel"], outside["target"], outside["M, N, K, R"]) == ("other", "sm_90", "8192, 4096, 4096, 64")
    assert (outside["registers"], outside["programs"]) == ("140", "3 (registers)")
    assert (outside["grid"], outside["waves"], outside["loop"], outside["instructions"]) == ("64x4", "0.65", "-", "7")
    assert (outside["memory"], outside["L2"]) == ("4.2", "2.3")
    assert (outer["kernel"], outer["loop"]) == ("", "1")
    assert (outer["instructions"], outer["int+pred"], outer["BAR"], outer["SHFL"]) == ("21", "7", "5", "0")
    assert outer["device memory"] == "8 LDG.128" and not outer["shared memory"] and not outer["tensor cores"]
    assert (inner["kernel"], inner["loop"], inner["instructions"], inner["SHFL"]) == ("", "1.1", "17", "4")
    assert (inner["device memory"], inner["shared memory"]) == ("8 LDGSTS.128", "1 STS.32")
    assert inner["tensor cores"] == "4 HGMMA.64x128x16"


ROLES = (("", 3, 168), ("producer", 7, 24), ("", 0, 24), ("consumer 1", 176, 240))
OF_ROLES = {
    "producer": {"other": 9},
    "producer: 1": {"integer": 40},
    "producer: 1.1": {"UTMALDG": 2, "SYNCS": 2},
    "producer: 1.1.1": {"SYNCS": 1, "other": 1},  # it waits
    "consumer 1": {"BAR": 2},
    "consumer 1: 1": {"UTMASTG": 8, "STSM": 32},
    "consumer 1: 1.1": {"HGMMA.64x256x16": 4, "BAR": 2, "SYNCS": 2},
}


def test_of_a_kernel_with_roles_the_loops_that_copy_or_multiply_have_rows():
    found = _compiled(name="gemm_kernel", loops=OF_ROLES, roles=ROLES)
    rows = [dict(zip(hot_loops.HEADER, row, strict=True)) for row in hot_loops.rows(*found)]
    expected = [("producer: 1.1", "7 of 24"), *((f"consumer 1: {loop}", "176 of 240") for loop in ("1", "1.1"))]
    assert [(row["loop"], row["registers"]) for row in rows] == expected
    assert [row["kernel"] for row in rows] == ["gemm", "", ""]
    assert (rows[0]["device memory"], rows[0]["shared memory"]) == ("2 UTMALDG", "2 SYNCS")
    assert [row[hot_loops.HEADER.index("loop")] for row in hot_loops.rows(*found, every=True)] == list(OF_ROLES)


def test_a_role_loads_by_the_copy_engine_alone():
    assert not _complaints(_compiled(name="gemm_kernel", loops=OF_ROLES, roles=ROLES))
    loops = OF_ROLES | {"consumer 1: 1": {"LDG.32": 64}}
    said = _complaints(_compiled(name="gemm_kernel", loops=loops, roles=ROLES))
    assert said == ["LDG.32 in consumer 1: 1; expected the copy engine alone"]


def test_a_kernel_without_a_loop_has_one_row_and_others_one_for_each_loop():
    def loops(**found: dict) -> list[str]:
        return [row[hot_loops.HEADER.index("loop")] for row in hot_loops.rows(*_compiled(loops={"": {}} | found))]

    assert loops() == ["-"]
    assert loops(**{"1": {}, "1.1": {}}) == ["1", "1.1"]


def test_of_a_walk_over_blocks_its_steps_have_a_row():
    found = {"": {}, "1": {"LDGSTS.128": 6}, "1.1": {"LDGSTS.128": 2}, "1.2": {"LDG.32": 1}, "2": {}, "2.1": {}}

    def loops(name: str, every: bool = False, **without: dict) -> list[str]:
        table = hot_loops.rows(*_compiled(name=name, loops=found | without), every)
        return [row[hot_loops.HEADER.index("loop")] for row in table]

    assert loops("_walking_kernel") == ["1.1"] and loops("_other_kernel") == [name for name in found if name]
    assert loops("_walking_kernel", every=True) == ["-", *(name for name in found if name)]
    assert loops("_walking_kernel", **{"1.1": {}}) == [name for name in found if name]


@pytest.mark.parametrize(
    "name, registers, shared, warps, expected",
    [
        ("sm_90", 24, 0, 8, (8, "threads")),  # 64 warps
        ("sm_90", 128, 24576, 8, (2, "registers")),
        ("sm_90", 129, 24576, 8, (1, "registers")),  # 136: registers come in units of 256 a warp
        ("sm_90", 168, 0, 4, (3, "registers")),  # three warps on each scheduler
        ("sm_90", 64, 113 * 1024, 4, (2, "shared memory")),  # 1 KiB more each is 228 KiB
        ("sm_90", 64, 113 * 1024 + 1, 4, (1, "shared memory")),
        ("sm_90", 32, 0, 1, (32, "programs")),
        ("sm_86", 32, 0, 1, (16, "programs")),
        ("sm_120", 32, 0, 8, (6, "threads")),  # 48 warps
        ("gfx942", 128, 32768, 8, (2, "registers")),  # 512 of each of the four schedulers' lanes
        ("gfx942", 129, 0, 8, (1, "registers")),
        ("gfx942", 64, 32769, 4, (1, "shared memory")),
    ],
)
def test_programs_a_multiprocessor_holds(name, registers, shared, warps, expected):
    pytest.importorskip("triton")
    from targets import TARGETS

    assert TARGETS[name].resident(registers, shared, warps) == expected
