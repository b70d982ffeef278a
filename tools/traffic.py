"""The bytes that the programs of a launch load: what passes through the L2 cache, from memory or for another time.

Counted, not measured: in Triton's intermediate code a load has the shape and the dtype of a tile, and how often it is
executed follows from the work that the programs share out (kernels/shares.py). Every tile counts as a whole one. What
stands behind a condition does not count: the parts that the last program adds up, a sum for infinite gains.
"""

import math
import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specializations import Specialization

_LOAD = re.compile(r"\btt\.load\b.* : tensor<([\dx]+)x!tt\.ptr<[a-z]*(\d+)\w*>>")


def tile_bytes(ttir: str) -> Counter:
    """Loop -> bytes of the tiles that one pass of it loads, loops inside it apart.

    "" is what is in no loop, "2.1" the first loop in the second one.
    """
    found, children = Counter({"": 0}), Counter()
    regions = [""]  # those that are open: the name of the loop, "?" behind a condition
    for line in ttir.splitlines():
        text = re.sub(r"\s*loc\(.*\)$", "", line.strip())
        if text.startswith("}"):
            regions.pop()
        inner = regions[-1]
        if load := _LOAD.search(text):
            found[inner] += math.prod(map(int, load[1].split("x"))) * int(load[2]) // 8
        if not text.endswith("{"):
            continue
        if "scf.for" in text and inner != "?":
            children[inner] += 1
            inner = f"{inner}.{children[inner]}".lstrip(".")
            found[inner] += 0
        elif re.search(r"\bscf\.(if|while)\b", text) or text == "} else {":
            inner = "?"
        regions.append(inner)
    del found["?"]
    return found


def of_gemm(specialization: "Specialization") -> int:
    """Bytes that all programs of a GEMM in Gluon load: its tiles' blocks of both operands at each step, gain, bias."""
    blocks, sizes = specialization.blocks(), specialization.sizes
    (block_m, block_k), block_n = blocks["x"], blocks["weight"][1 if specialization.constants()["NN"] else 0]
    rows, columns = -(-sizes["M"] // block_m), -(-sizes["N"] // block_n)  # of tiles
    steps = -(-sizes["K"] // block_k) + -(-sizes["R"] // block_k)
    once_a_row = sum(specialization.bytes_of.get(name, 0) for name in ("gain", "bias"))
    return rows * (columns * steps * 2 * (block_m + block_n) * block_k + once_a_row)


def loaded(specialization: "Specialization", ttir: str) -> int:
    """Bytes that all programs load: tiles of a kernel without loops, or with one over blocks and in it one over steps.

    0 where that is not what the kernel has, as where a step walks a high rank.
    """
    tiles, programs = tile_bytes(ttir), math.prod(specialization.grid)
    if set(tiles) == {""}:
        return programs * tiles[""]
    work = specialization.work
    # beside the steps, a block may have loops over its parts: one tile of theirs is as good as none
    steps = max(tiles, key=lambda loop: (loop.count("."), tiles[loop]))
    if work is None or steps.count(".") != 1:
        return 0
    units = work.blocks * work.steps
    bounds = [program * units // programs for program in range(programs + 1)]
    visits = sum(-(-end // work.steps) - start // work.steps for start, end in zip(bounds, bounds[1:], strict=False))
    return programs * tiles[""] + visits * tiles[steps.partition(".")[0]] + units * tiles[steps]
