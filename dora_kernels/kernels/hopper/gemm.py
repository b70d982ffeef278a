"""The GEMM of a layer with its adapter, gain and bias in it, one kernel for sm_90. Device code; launch.py launches it.

    z = x @ weight.T + scaling * low @ lora.T        y = gain * z + bias

Of 12 warps one produces: it has the copy engine (TMA) fill the ring, STAGES buffers that each hold one step of a tile.
Two groups of four consume: each owns half the rows of the tile, which it multiplies (wgmma) and stores through SLOTS
buffers of its own. A buffer of the ring goes round by two barriers: `ready` when its bytes have come, `empty` when
every consumer has read it. The product of rank R comes first, so that it alone is scaled; then the steps over K.

tests/support/gluon_simulator.py executes this source on a CPU, with the order of events drawn at random.
"""

from typing import Any, NamedTuple

from dora_kernels.kernels.hopper.language import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


class Sizes(NamedTuple):
    """The sizes of the product, and how many rows of tiles are walked side by side."""

    M: Any
    N: Any
    K: Any
    R: Any
    group_m: Any


class Operands(NamedTuple):
    """The descriptors of what the producer loads."""

    x: Any
    weight: Any
    low: Any  # or None, and so is lora
    lora: Any
    gain: Any  # or None
    bias: Any  # or None


class Ring(NamedTuple):
    """Buffers in shared memory and their barriers, STAGES of each."""

    left: Any  # [STAGES, BLOCK_M, BLOCK_K]
    right: Any  # [STAGES, BLOCK_N, BLOCK_K]; NN: [STAGES, BLOCK_K, BLOCK_N]
    ready: Any
    empty: Any


class Columns(NamedTuple):
    """The gain and the bias of a tile in shared memory, [BLOCK_N]; None where there is none."""

    gain: Any
    bias: Any


class Outputs(NamedTuple):
    """The descriptors of what the consumers store."""

    y: Any
    z: Any  # or None


@gluon.jit
def tile_count(sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The number of tiles that all programs share: each has every num_programs-th."""
    return gl.cdiv(sizes.M, BLOCK_M) * gl.cdiv(sizes.N, BLOCK_N)


@gluon.jit
def corner_of(tile, sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first row and column of a tile, in groups of group_m rows of tiles that share columns of the weight in L2."""
    per_group = sizes.group_m * gl.cdiv(sizes.N, BLOCK_N)
    first = (tile // per_group) * sizes.group_m
    rows = gl.minimum(gl.cdiv(sizes.M, BLOCK_M) - first, sizes.group_m)
    inside = tile % per_group
    return (first + inside % rows) * BLOCK_M, (inside // rows) * BLOCK_N


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next buffer of the ring. The phase of its barriers flips once a round."""
    stage += 1
    phase = gl.where(stage == STAGES, phase ^ 1, phase)
    stage = gl.where(stage == STAGES, 0, stage)
    return stage, phase


@gluon.jit
def load_step(left, right, row, column, k, ring, stage, NN: gl.constexpr):
    """Start the copies of one step: blocks (row, k) of the left operand, (column, k) or (k, column) of the right."""
    bar = ring.ready.index(stage)
    tma_load(left, [row, k], bar, ring.left.index(stage))
    if NN:
        tma_load(right, [k, column], bar, ring.right.index(stage))
    else:
        tma_load(right, [column, k], bar, ring.right.index(stage))


@gluon.jit
def load_columns(gain, bias, columns, column, bar):
    """Start the copies of a tile's gain and bias."""
    if gain is not None:
        tma_load(gain, [column], bar, columns.gain)
    if bias is not None:
        tma_load(bias, [column], bar, columns.bias)


@gluon.jit
def produce(operands, columns, ring, sizes, NN: gl.constexpr):
    """Fill the ring, tile by tile: the steps over R, whose columns past R come as zeros, then those over K.

    gain and bias of a tile come with step number STAGES over K. That step waits until step 0 over K of the same tile is
    empty, when both consumers have done with the gain and bias of the tile before: they need no barrier of their own.
    """
    x, weight, low, lora, gain, bias = operands
    STAGES: gl.constexpr = ring.left.type.shape[0]
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight.block_type.shape[1 if NN else 0]
    STEP_BYTES: gl.constexpr = x.block_type.nbytes + weight.block_type.nbytes
    GAIN_BYTES: gl.constexpr = 0 if gain is None else gain.block_type.nbytes
    BIAS_BYTES: gl.constexpr = 0 if bias is None else bias.block_type.nbytes
    stage = 0
    phase = 1  # a fresh barrier counts as past the phase before its first: the ring starts empty
    for tile in range(gl.program_id(0), tile_count(sizes, BLOCK_M, BLOCK_N), gl.num_programs(0)):
        row, column = corner_of(tile, sizes, BLOCK_M, BLOCK_N)
        if low is not None:
            for r in range(0, sizes.R, BLOCK_K):
                mbarrier.wait(ring.empty.index(stage), phase)
                mbarrier.expect(ring.ready.index(stage), STEP_BYTES)
                load_step(low, lora, row, column, r, ring, stage, NN)
                stage, phase = next_stage(stage, phase, STAGES)
        for k in range(0, sizes.K, BLOCK_K):
            mbarrier.wait(ring.empty.index(stage), phase)
            if k == STAGES * BLOCK_K:
                mbarrier.expect(ring.ready.index(stage), STEP_BYTES + GAIN_BYTES + BIAS_BYTES)
                load_columns(gain, bias, columns, column, ring.ready.index(stage))
            else:
                mbarrier.expect(ring.ready.index(stage), STEP_BYTES)
            load_step(x, weight, row, column, k, ring, stage, NN)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def start_product(acc, ring, stage, phase, WHICH: gl.constexpr, NN: gl.constexpr):
    """acc, to which the product of this buffer is being added: it starts once the buffer is full."""
    ROWS: gl.constexpr = acc.type.tensor_type.shape[0]
    mbarrier.wait(ring.ready.index(stage), phase)
    left = ring.left.index(stage).slice(WHICH * ROWS, ROWS, dim=0)
    right = ring.right.index(stage) if NN else ring.right.index(stage).permute((1, 0))
    return warpgroup_mma(left, right, acc, is_async=True)


@gluon.jit
def add_products(acc, steps, ring, stage, phase, WHICH: gl.constexpr, NN: gl.constexpr):
    """acc with the products of the next so many steps added, and the place in the ring behind them.

    One product stays in flight: a buffer is given back when the product after the one that reads it has been started.
    """
    STAGES: gl.constexpr = ring.left.type.shape[0]
    acc = start_product(warpgroup_mma_init(acc), ring, stage, phase, WHICH, NN)
    for _ in range(1, steps):
        before = stage
        stage, phase = next_stage(stage, phase, STAGES)
        acc = start_product(acc, ring, stage, phase, WHICH, NN)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        mbarrier.arrive(ring.empty.index(before), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index(stage), count=1)
    stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def halves(value):
    """The left and the right half of the columns. A column's top bit is one of the register: no data moves."""
    rows: gl.constexpr = value.shape[0]
    half: gl.constexpr = value.shape[1] // 2
    return value.reshape((rows, 2, half)).permute((0, 2, 1)).split()


@gluon.jit
def load_row(vector, part, beside):
    """Part number `part` of a vector in shared memory, a row of float32 as wide as what it stands beside."""
    WIDTH: gl.constexpr = beside.shape[1]
    layout: gl.constexpr = gl.SliceLayout(0, beside.type.layout)
    return gl.expand_dims(vector.slice(part * WIDTH, WIDTH).load(layout).to(gl.float32), 0)


@gluon.jit
def store(output, slots, number: gl.constexpr, value, row, column):
    """Round value into the slot of store `number` of a tile, and start its copy to the output."""
    SLOTS: gl.constexpr = slots.type.shape[0]
    tma_store_wait(SLOTS - 1)  # copies end in order: with SLOTS - 1 under way, the one from this slot has read it
    buffer = slots.index(number % SLOTS)
    buffer.store(value.to(output.dtype))
    fence_async_shared()
    tma_store(output, [row, column], buffer)


@gluon.jit
def store_part(part, z_part, outputs, slots, columns, row, column):
    """Part number `part` of a tile's columns to y and, if it is there, to z."""
    y, z = outputs
    gain, bias = columns
    WIDTH: gl.constexpr = y.block_type.shape[1]
    STORES: gl.constexpr = 1 if z is None else 2
    y_part = z_part
    if gain is not None:
        y_part *= load_row(gain, part, z_part)
    if bias is not None:
        y_part += load_row(bias, part, z_part)
    store(y, slots, part * STORES, y_part, row, column + part * WIDTH)
    if z is not None:
        store(z, slots, part * STORES + 1, z_part, row, column + part * WIDTH)


@gluon.jit
def consume(
    WHICH: gl.constexpr,
    slots,
    outputs,
    columns,
    ring,
    sizes,
    scaling,
    LOW_RANK: gl.constexpr,
    NN: gl.constexpr,
):
    """Multiply and store rows WHICH * ROWS and on of every tile, ROWS being the height of an output's block."""
    BLOCK_M: gl.constexpr = ring.left.type.shape[1]
    BLOCK_K: gl.constexpr = ring.left.type.shape[2]
    BLOCK_N: gl.constexpr = ring.right.type.shape[2 if NN else 1]
    ROWS: gl.constexpr = slots.type.shape[1]
    PARTS: gl.constexpr = BLOCK_N // slots.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tile_count(sizes, BLOCK_M, BLOCK_N), gl.num_programs(0)):
        row, column = corner_of(tile, sizes, BLOCK_M, BLOCK_N)
        acc = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
        if LOW_RANK:
            steps = gl.cdiv(sizes.R, BLOCK_K)
            acc, stage, phase = add_products(acc, steps, ring, stage, phase, WHICH, NN)
            acc *= scaling
        acc, stage, phase = add_products(acc, gl.cdiv(sizes.K, BLOCK_K), ring, stage, phase, WHICH, NN)
        parts = halves(acc)
        if PARTS == 4:
            parts = halves(parts[0]) + halves(parts[1])
        for part in gl.static_range(PARTS):
            store_part(part, parts[part], outputs, slots, columns, row + WHICH * ROWS, column)
    tma_store_wait(0)


# no argument is specialised on: the copy engine reads what its descriptors say, and one binary serves every shape
@gluon.jit(do_not_specialize=["M", "N", "K", "R", "scaling", "group_m"])
def gemm_kernel(
    x,  # (M, K) in half precision; as all tensors a descriptor, which moves blocks: here of one step of a tile
    weight,  # (N, K); NN: (K, N)
    low,  # (M, R) or None
    lora,  # (N, R); NN: (R, N)
    y,  # (M, N), in blocks of what is stored at a time: all rows of a consumer, a half or a quarter of a tile's columns
    z,  # (M, N) or None
    gain,  # (N,) or None
    bias,  # (N,) or None
    M,
    N,
    K,
    R,
    scaling,
    group_m,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    NN: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """z = x @ weight.T + scaling * low @ lora.T, y = gain * z + bias; NN: weight and lora are not transposed.

    One program owns every num_programs-th tile. K must be above STAGES steps, with which gain and bias come.
    """
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    CONSUMERS: gl.constexpr = BLOCK_M // y.block_type.shape[0]  # 2 of 4 warps, or 1 of 8 (launch with num_warps=8)
    PARTS: gl.constexpr = weight.block_type.shape[1 if NN else 0] // y.block_type.shape[1]
    LOW_RANK: gl.constexpr = low is not None
    gl.static_assert(PARTS == 2 or PARTS == 4)
    # a tile begins with slot 0 whatever the tile before ended with, so the slots must divide the stores of a tile
    gl.static_assert((PARTS if z is None else 2 * PARTS) % SLOTS == 0)
    ring = Ring(
        gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout),
        gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    columns = Columns(
        None if gain is None else gl.allocate_shared_memory(gain.dtype, gain.block_type.shape, gain.layout),
        None if bias is None else gl.allocate_shared_memory(bias.dtype, bias.block_type.shape, bias.layout),
    )
    slots = gl.allocate_shared_memory(y.dtype, [SLOTS] + y.block_type.shape, y.layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.ready.index(stage), count=1)
        mbarrier.init(ring.empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    sizes = Sizes(M, N, K, R, group_m)
    operands = Operands(x, weight, low, lora, gain, bias)
    outputs = Outputs(y, z)
    if CONSUMERS == 2:
        other_slots = gl.allocate_shared_memory(y.dtype, [SLOTS] + y.block_type.shape, y.layout)
        gl.warp_specialize(
            [
                (consume, (0, slots, outputs, columns, ring, sizes, scaling, LOW_RANK, NN)),
                (consume, (1, other_slots, outputs, columns, ring, sizes, scaling, LOW_RANK, NN)),
                (produce, (operands, columns, ring, sizes, NN)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (0, slots, outputs, columns, ring, sizes, scaling, LOW_RANK, NN)),
                (produce, (operands, columns, ring, sizes, NN)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
