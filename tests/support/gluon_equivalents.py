"""Mutants of the GEMM for Hopper that are as right as it is, and why: nothing can tell them from it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.support.gluon_mutants import Mutant


@dataclass(frozen=True)
class Equivalent:
    """Mutants of a function in which a statement that holds `before` became one that holds `after`."""

    function: str
    before: str
    after: str
    reason: str

    def covers(self, mutant: Mutant) -> bool:
        """True if the mutant is one of these."""
        return self.function == mutant.function and self.before in mutant.before and self.after in mutant.after


def _twice(function: str, statement: str, reason: str) -> Equivalent:
    return Equivalent(function, statement, f"{statement}; {statement}", reason)


_WAITED = "to wait for what has ended is nothing"
_NEVER_ABOVE = "it is never above"
_FREE = "neither reads what the other makes"
_BOTH = "both are there, or neither"
_ONE_DTYPE = "x and weight have one dtype (launch.why_not_gemm)"
_DEFAULT = "the default"
_EXPECTED = "a phase ends when all bytes have come and its one arrival, which expects them, was made: in either order"
_GROUP = "warps are launched in groups of four, of which the producer's does the work of one"
_READY, _EMPTY = "mbarrier.wait(ring.ready.index(stage), phase)", "mbarrier.wait(ring.empty.index(stage), phase)"
_LEFT = "left = ring.left.index(stage).slice(WHICH * ROWS, ROWS, dim=0)"
_RIGHT = "right = ring.right.index(stage) if NN else ring.right.index(stage).permute((1, 0))"
_DRAIN, _STEP = (
    "acc = warpgroup_mma_wait(0, deps=(acc,))",
    "acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))",
)
EQUIVALENTS = (
    Equivalent("next_stage", "phase ^ 1", "stage >= STAGES", _NEVER_ABOVE),
    Equivalent("next_stage", "== STAGES, 0, stage)", "stage >= STAGES", _NEVER_ABOVE),
    _twice("next_stage", "stage = gl.where(stage == STAGES, 0, stage)", "0 stays 0"),
    Equivalent("load_step", "tma_load(left", "if NN:; tma_load(left", _FREE),
    Equivalent("load_columns", "if gain is not None:", "if bias is not None:; if gain", _FREE),
    Equivalent("produce", "STAGES: gl.constexpr", "ring.right.type.shape[0]", "both rings have as many"),
    Equivalent("add_products", "STAGES: gl.constexpr", "ring.right.type.shape[0]", "both rings have as many"),
    Equivalent("produce", "if low is not None", "if lora is not None", _BOTH),
    _twice("produce", _EMPTY, _WAITED),
    Equivalent("produce", "if k == STAGES * BLOCK_K:; load_step", "ring, stage, NN); if k ==", _EXPECTED),
    Equivalent(
        "produce",
        "mbarrier.expect",
        "load_columns(gain, bias, columns, column, ring.ready.index(stage)); mbar",
        _EXPECTED,
    ),
    Equivalent("produce", "mbarrier.expect", "load_step(low, lora, row, column, r, ring, stage, NN); mbar", _EXPECTED),
    _twice("start_product", _READY, _WAITED),
    _twice("start_product", _LEFT, "a name for the same part"),
    _twice("start_product", _RIGHT, "a name for the same part"),
    Equivalent("start_product", ", dim=0)", "slice(WHICH * ROWS, ROWS)", _DEFAULT),
    _twice("add_products", _DRAIN, _WAITED),
    _twice("add_products", _STEP, _WAITED),
    Equivalent("add_products", "index(stage), count=1)", "index(stage))", _DEFAULT),
    Equivalent("add_products", "index(before), count=1)", "index(before))", _DEFAULT),
    Equivalent("add_products", "next_stage(stage,", "next_stage(before,", "before is stage there"),
    Equivalent("load_row", ".to(gl.float32)", "lambda value: value", "a product with float32 is in float32"),
    _twice("store", "tma_store_wait(SLOTS - 1)", _WAITED),
    _twice("store", "buffer.store(value.to(output.dtype))", "the same bytes, before the fence"),
    _twice("store", "fence_async_shared()", "nothing was written between"),
    Equivalent(
        "store_part", "STORES: gl.constexpr", "else 6", "another order of the slots, which all are used in turn"
    ),
    Equivalent("store_part", "part * STORES + 1", "part * STORES - 1", "another order of the slots"),
    Equivalent("store_part", "store(y", "if z is not None:; store(y", "z is stored before y"),
    Equivalent("store_part", "load_row(gain, part, z_part)", "load_row(gain, part, y_part)", "both are as wide"),
    Equivalent("store_part", "load_row(bias, part, z_part)", "load_row(bias, part, y_part)", "both are as wide"),
    Equivalent("consume", "if PARTS == 4", "if PARTS >= 4", _NEVER_ABOVE),
    _twice("consume", "tma_store_wait(0)", _WAITED),
    Equivalent("gemm_kernel", "LOW_RANK: gl.constexpr", "lora is not None", _BOTH),
    _twice("gemm_kernel", "gl.static_assert(PARTS == 2 or PARTS == 4)", "asserted twice"),
    _twice("gemm_kernel", "gl.static_assert((PARTS if z is None else 2 * PARTS) % SLOTS == 0)", "asserted twice"),
    Equivalent("gemm_kernel", "% SLOTS == 0)", "% SLOTS <= 0)", "no remainder is below 0"),
    Equivalent("gemm_kernel", "ring = Ring(", "allocate_shared_memory(weight.dtype, [STAGES] + x.", _ONE_DTYPE),
    Equivalent("gemm_kernel", "ring = Ring(", "allocate_shared_memory(x.dtype, [STAGES] + weight.", _ONE_DTYPE),
    _twice("gemm_kernel", "fence_async_shared()", "nothing was written between"),
    Equivalent(
        "gemm_kernel", "mbarrier.init(ring.ready", "mbarrier.init(ring.empty.index(stage), count=CONSUMERS); m", _FREE
    ),
    Equivalent("gemm_kernel", "if CONSUMERS == 2", "if CONSUMERS >= 2", _NEVER_ABOVE),
    Equivalent("gemm_kernel", "gl.warp_specialize", "[(consume, (1, other_slots, ", "the consumers are alike"),
    Equivalent("gemm_kernel", "gl.warp_specialize", "[4, 2]", _GROUP),
    Equivalent("gemm_kernel", "gl.warp_specialize", "[4, 4]", _GROUP),
    Equivalent("gemm_kernel", "gl.warp_specialize", "[2], [PRODUCER", _GROUP),
    Equivalent("gemm_kernel", "gl.warp_specialize", "[4], [PRODUCER", _GROUP),
)
