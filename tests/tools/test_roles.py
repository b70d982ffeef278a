"""tools/roles.py tells the roles of a warp-specialised kernel apart, and counts their registers."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import machine_code  # noqa: E402
import roles  # noqa: E402


def instructions(*lines: str) -> list[machine_code.Instruction]:
    text = "\n".join(line if line.endswith(":") else f"/*{index:04x}*/ {line} ;" for index, line in enumerate(lines))
    return machine_code.instructions(text)


# As Triton writes it: workers wait in .L_x_1 for a role, and jump to it; the launched warps are the other consumer.
KERNEL = instructions(
    "S2R R9, SR_TID.X", "@!P0 BRA `(.L_x_0)",
    ".L_x_1:", "USETMAXREG.DEALLOC.CTAPOOL 0x78", "LDS.U8 R2, [R3]", "@P0 BRA `(.L_x_1)", "BRX R2 -0x180",
    ".L_x_2:", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", "@!P0 BRA `(.L_x_2)",
    ".L_x_3:", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "@!P1 BRA `(.L_x_9)", ".L_x_4:",
    "@P2 BRA `(.L_x_3)", "BRA `(.L_x_1)",
    ".L_x_5:", "USETMAXREG.DEALLOC.CTAPOOL 0x18", ".L_x_6:", "UTMALDG.2D [UR8], [UR4]", "IADD3 R6, R6, 0x1, RZ",
    "@P0 BRA `(.L_x_6)", ".L_x_7:", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x78", "@!P0 BRA `(.L_x_7)", "BRA `(.L_x_1)",
    ".L_x_0:", "USETMAXREG.DEALLOC.CTAPOOL 0xf0", ".L_x_8:", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
    "STSM.16.M88.4 [R7], R168", "@P0 BRA `(.L_x_8)", "EXIT",
    ".L_x_9:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR18+0x386d0], R2", "@!P0 BRA `(.L_x_9)", "BRA `(.L_x_4)",
)  # fmt: skip


def test_a_role_is_what_is_executed_between_two_changes_of_the_registers():
    found = roles.roles(KERNEL, 168)
    named = [role for role in found if role.name]
    assert [(role.name, role.limit) for role in named] == [("consumer 0", 240), ("producer", 24), ("consumer 1", 240)]
    assert [role.limit for role in found if not role.name] == [168, 120, 120]
    first, producer, second = named
    assert "SYNCS.PHASECHK.TRANS64.TRYWAIT" in [one.operation for one in first.code], "what stands behind all others"
    for other in (producer, second):
        assert "SYNCS.PHASECHK.TRANS64.TRYWAIT" not in [one.operation for one in other.code]
    assert "UTMALDG.2D" not in [one.operation for one in (*first.code, *second.code)]


def test_registers_are_counted_to_the_end_of_what_an_operand_takes():
    found = {role.name: role.registers for role in roles.roles(KERNEL, 168) if role.name}
    assert found == {"consumer 0": 24 + 128, "producer": 7, "consumer 1": 172}
    assert roles.roles(KERNEL, 168)[0].registers == 10, "what is executed before any of it"


def test_loops_of_a_role_are_its_own():
    producer = next(role for role in roles.roles(KERNEL, 168) if role.name == "producer")
    outside, loop = machine_code.loops(producer.code)
    assert loop.counts()["UTMALDG"] == 1 and not outside.counts()["UTMALDG"]


@pytest.mark.parametrize(
    "text, registers",
    {
        "LDS.128 R4, [R2]": 8,
        "LDS.64 R4, [R20]": 21,
        "LDG.E R4, [R20.64]": 22,
        "STG.E.64 [R2.64+0x10], R30": 32,
        "IMAD.WIDE.U32 R30, R2, 0x4, R4": 32,
        "IADD3 R3, R2, -R8, RZ": 9,
        "UIADD3 UR60, UR4, 0x1, URZ": 0,
        "LDSM.16.M88.2 R10, [R3]": 12,
    }.items(),
)
def test_registers(text, registers):
    assert roles.registers(instructions(text)) == registers


def test_without_a_change_of_registers_there_are_no_roles():
    text = Path(__file__).with_name("token_sums.sass").read_text()
    assert roles.roles(machine_code.instructions(text), 128) == []
