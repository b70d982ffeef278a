"""tools/atomics.py finds in machine code what would let the last of several programs miss what another has stored."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import atomics  # noqa: E402
import machine_code  # noqa: E402

# shortened from what Triton 3.7.1 makes for sm_90 of: for ...: tl.store, tl.debug_barrier, tl.atomic_add, if last: sum
SASS = """
/*0000*/ S2R R3, SR_TID.X ;
.L_x_0:
/*0010*/ STG.E.128 desc[UR6][R12.64], R4 ;
/*0020*/ STG.E.128 desc[UR6][R12.64+0x800], R8 ;
/*0030*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
/*0040*/ @P0 BRA `(.L_x_1) ;
/*0050*/ MEMBAR.ALL.GPU ;
/*0060*/ ERRBAR ;
/*0070*/ ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR6][R4.64], R7 ;
/*0080*/ CCTL.IVALL ;
.L_x_1:
/*0090*/ @!P0 STS [UR4], R2 ;
/*00a0*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
/*00b0*/ LDS R4, [UR4] ;
/*00c0*/ @P1 BRA `(.L_x_0) ;
/*00d0*/ LDG.E.128 R4, desc[UR6][R30.64] ;
/*00e0*/ STG.E.128 desc[UR6][R2.64], R8 ;
/*00f0*/ EXIT ;
"""
# Triton 3.6.0 has no branch around it
PREDICATED = SASS.replace("@P0 BRA `(.L_x_1) ;", "NOP ;")
for operation in ("MEMBAR", "ERRBAR", "ATOMG", "CCTL"):
    PREDICATED = PREDICATED.replace(f" {operation}.", f" @P1 {operation}.")
COUNT = "ATOMG.E.ADD.STRONG.GPU PT, R2"


def faults(sass: str) -> list[str]:
    return atomics.faults(machine_code.instructions(sass))


@pytest.mark.parametrize("sass", (SASS, PREDICATED), ids=("branch", "predicate"))
def test_what_the_last_program_needs_is_asked_for_and_no_more(sass):
    assert faults(sass) == []
    for missing, told in {
        "/*0030*/ BAR.SYNC.DEFER_BLOCKING 0x0": "tl.debug_barrier() lacks",
        "/*00a0*/ BAR.SYNC.DEFER_BLOCKING 0x0": "before it knows",
        "MEMBAR.ALL.GPU": "releases nothing",
        "CCTL.IVALL": "acquires nothing",
    }.items():
        assert missing in sass
        found = faults(sass.replace(missing, "/*0000*/ NOP"))
        assert len(found) == 1 and told in found[0]


def test_a_barrier_counts_only_where_all_threads_meet_at_it():
    for other in ("@P2 BAR.SYNC.DEFER_BLOCKING 0x0", "BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", "BAR.ARV 0x1, 0x80"):
        assert faults(SASS.replace("BAR.SYNC.DEFER_BLOCKING 0x0", other, 1)), other
    # nor before the stores, nor on one of two ways
    before = SASS.replace("BAR.SYNC.DEFER_BLOCKING 0x0", "NOP", 1).replace("S2R R3, SR_TID.X", "BAR.SYNC 0x0")
    assert faults(before)
    assert faults(SASS.replace("/*0020*/", "/*0020*/ @P3 BRA `(.L_x_2) ;\n/*0021*/").replace(
        "/*0040*/", ".L_x_2:\n/*0040*/"))  # fmt: skip


@pytest.mark.parametrize(
    "other",
    (
        "ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU PT, R2",  # of data, in whatever order
        "ATOMG.E.ADD.STRONG.SM PT, R2",
        "ATOMG.E.ADD.64.STRONG.GPU PT, R2",
        "ATOMG.E.EXCH.STRONG.GPU PT, R2",
        "ATOMS.ADD RZ",
        "RED.E.ADD.STRONG.GPU",
        "REDG.E.ADD.F32.FTZ.RN.STRONG.GPU",
    ),
)
def test_there_is_no_other_atomic(other):
    found = faults(SASS.replace(COUNT, other))
    assert len(found) == 1 and found[0].startswith(other.split()[0])


def test_tensor_memory_is_accounted_for_in_shared_memory():
    for line in ("ATOMS.OR RZ, [UR4], R3", "ATOMS.AND RZ, [UR4], R3"):
        assert faults(SASS.replace("S2R R3, SR_TID.X", line)) == []


def test_code_without_atomics_has_no_faults():
    assert faults("/*0000*/ STG.E [R2.64], R3 ;\n/*0010*/ EXIT ;") == []


AMD = "\ts_barrier\n\tbuffer_wbl2 sc1\n\ts_waitcnt vmcnt(0)\n\tglobal_atomic_add v1, v1, v2, s[4:5] sc0\n"


def test_on_amd_no_program_may_count_on_what_another_has_stored():
    plain = "\ts_barrier\n\tglobal_load_dwordx4 v[0:3], v4, s[0:1]\n\tds_read_b32 v0, v1"
    assert atomics.amd_faults(plain, whole=False) == atomics.amd_faults(AMD, whole=True) == []
    assert len(atomics.amd_faults(AMD, whole=False)) == 1
    for other in ("global_atomic_add_f32", "global_atomic_pk_add_bf16", "buffer_atomic_add", "ds_add_u32"):
        found = atomics.amd_faults(AMD.replace("global_atomic_add", other), whole=True)
        assert len(found) == 1 and found[0].startswith(f"{other}: ")
