"""Device code: the base GEMM with the adapter and the gain in it, one kernel for sm_90.

    z = x @ weight.T + low @ lora.T        y = gain * z + bias

NN=False is the forward pass: weight (N, K), and lora (N, R) is lora_B. NN=True is what dx needs, where the reduction
runs over the rows: weight (K, N), lora (R, N), neither transposed. `low` holds scaling already, so that a step over R
is like one over K.

Of 12 warps one produces: it has the copy engine (TMA) fill STAGES buffers, each with one step of a tile. Two groups of
four consume: each owns half the rows of the tile, which it multiplies (wgmma) and stores through SLOTS buffers of its
own. A buffer goes round by two barriers: `ready` when its bytes have come, `empty` when every consumer has read it.
tests/support/gluon_simulator.py executes this source on a CPU, with the order of events drawn at random.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

# renamed in Triton 3.9
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def tile_of(index, tiles_m, tiles_n, group_m):
    """The tile (m, n) of an index, in groups of group_m rows of tiles that share columns of the weight in L2."""
    per_group = group_m * tiles_n
    first = (index // per_group) * group_m
    rows = gl.minimum(tiles_m - first, group_m)
    inside = index % per_group
    return first + inside % rows, inside // rows


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next buffer of the ring. The phase of its barriers flips once a round."""
    stage += 1
    phase = gl.where(stage == STAGES, phase ^ 1, phase)
    stage = gl.where(stage == STAGES, 0, stage)
    return stage, phase


@gluon.jit
def load_step(left, right, m, n, k, bar, left_buffer, right_buffer, NN: gl.constexpr):
    """Start the copies of one step: block (m, k) of the left operand, (n, k) or (k, n) of the right one."""
    tma_load(left, [m, k], bar, left_buffer)
    if NN:
        tma_load(right, [k, n], bar, right_buffer)
    else:
        tma_load(right, [n, k], bar, right_buffer)


@gluon.jit
def produce(operands, vectors, vector_tiles, rings, barriers, sizes, group_m, NN: gl.constexpr):
    """Fill the ring, tile by tile: the steps over K, then those over R, whose columns past R come as zeros.

    gain and bias of a tile come with its step number STAGES. That step waits until step 0 of the same tile is empty,
    when both consumers have done with the gain and bias of the tile before: they need no barrier of their own.
    """
    x, weight, low, lora = operands
    gain, bias = vectors
    gain_tile, bias_tile = vector_tiles
    x_ring, weight_ring = rings
    ready, empty = barriers
    M, N, K, R = sizes
    STAGES: gl.constexpr = x_ring.type.shape[0]
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    BLOCK_N: gl.constexpr = gain.block_type.shape[0]
    STEP_BYTES: gl.constexpr = x.block_type.nbytes + weight.block_type.nbytes
    VECTOR_BYTES: gl.constexpr = gain.block_type.nbytes + bias.block_type.nbytes
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    stage = 0
    phase = 1  # a fresh barrier counts as past the phase before its first: the ring starts empty
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = tile_of(tile, tiles_m, tiles_n, group_m)
        m *= BLOCK_M
        n *= BLOCK_N
        for k in range(0, K, BLOCK_K):
            bar = ready.index(stage)
            with_vectors = k == STAGES * BLOCK_K
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, STEP_BYTES, pred=k != STAGES * BLOCK_K)
            mbarrier.expect(bar, STEP_BYTES + VECTOR_BYTES, pred=with_vectors)
            load_step(x, weight, m, n, k, bar, x_ring.index(stage), weight_ring.index(stage), NN)
            tma_load(gain, [n], bar, gain_tile, pred=with_vectors)
            tma_load(bias, [n], bar, bias_tile, pred=with_vectors)
            stage, phase = next_stage(stage, phase, STAGES)
        for r in range(0, R, BLOCK_K):
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, STEP_BYTES)
            load_step(low, lora, m, n, r, bar, x_ring.index(stage), weight_ring.index(stage), NN)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def halves(value):
    """The left and the right half of the columns. A column's top bit is one of the register: no data moves."""
    rows: gl.constexpr = value.shape[0]
    half: gl.constexpr = value.shape[1] // 2
    return value.reshape((rows, 2, half)).permute((0, 2, 1)).split()


@gluon.jit
def store(output, slots, slot: gl.constexpr, value, row, column):
    """Round value into a slot and start its copy to the output."""
    SLOTS: gl.constexpr = slots.type.shape[0]
    tma.store_wait(SLOTS - 1)  # copies end in order: with SLOTS - 1 under way, the one from this slot has read it
    buffer = slots.index(slot)
    buffer.store(value.to(output.dtype))
    fence_async_shared()
    tma_store(output, [row, column], buffer)


@gluon.jit
def store_part(z_part, outputs, slots, vector_tiles, row, column, PART: gl.constexpr, BOTH: gl.constexpr):
    """Columns of part number PART to y, and BOTH: to z as well."""
    y, z = outputs
    gain_tile, bias_tile = vector_tiles
    SLOTS: gl.constexpr = slots.type.shape[0]
    WIDTH: gl.constexpr = y.block_type.shape[1]
    STORES: gl.constexpr = 2 if BOTH else 1
    layout: gl.constexpr = gl.SliceLayout(0, z_part.type.layout)
    gain = gl.expand_dims(gain_tile.slice(PART * WIDTH, WIDTH).load(layout), 0)
    bias = gl.expand_dims(bias_tile.slice(PART * WIDTH, WIDTH).load(layout).to(gl.float32), 0)
    store(y, slots, (PART * STORES) % SLOTS, z_part * gain + bias, row, column + PART * WIDTH)
    if BOTH:
        store(z, slots, (PART * STORES + 1) % SLOTS, z_part, row, column + PART * WIDTH)


@gluon.jit
def consume(
    WHICH: gl.constexpr,
    outputs,
    slots,
    vector_tiles,
    rings,
    barriers,
    sizes,
    group_m,
    BLOCK_M: gl.constexpr,
    PARTS: gl.constexpr,
    BOTH: gl.constexpr,
    NN: gl.constexpr,
):
    """Multiply and store rows WHICH * ROWS and on of every tile, ROWS being the height of an output's block.

    One product stays in flight: a buffer is given back when the product after the one that reads it has been started.
    """
    x_ring, weight_ring = rings
    ready, empty = barriers
    M, N, K, R = sizes
    STAGES: gl.constexpr = x_ring.type.shape[0]
    BLOCK_K: gl.constexpr = x_ring.type.shape[2]
    BLOCK_N: gl.constexpr = weight_ring.type.shape[2 if NN else 1]
    ROWS: gl.constexpr = slots.type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(K, BLOCK_K) + gl.cdiv(R, BLOCK_K)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = tile_of(tile, tiles_m, tiles_n, group_m)
        acc = warpgroup_mma_init(gl.zeros((ROWS, BLOCK_N), gl.float32, layout))
        mbarrier.wait(ready.index(stage), phase)
        left = x_ring.index(stage).slice(WHICH * ROWS, ROWS, dim=0)
        right = weight_ring.index(stage) if NN else weight_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(left, right, acc, use_acc=False, is_async=True)
        before = stage
        stage, phase = next_stage(stage, phase, STAGES)
        for _ in range(1, steps):
            mbarrier.wait(ready.index(stage), phase)
            left = x_ring.index(stage).slice(WHICH * ROWS, ROWS, dim=0)
            right = weight_ring.index(stage) if NN else weight_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(left, right, acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage, phase = next_stage(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1)
        row = m * BLOCK_M + WHICH * ROWS
        column = n * BLOCK_N
        if PARTS == 2:
            left_half, right_half = halves(acc)
            store_part(left_half, outputs, slots, vector_tiles, row, column, 0, BOTH)
            store_part(right_half, outputs, slots, vector_tiles, row, column, 1, BOTH)
        else:
            left_half, right_half = halves(acc)
            first, second = halves(left_half)
            third, fourth = halves(right_half)
            store_part(first, outputs, slots, vector_tiles, row, column, 0, BOTH)
            store_part(second, outputs, slots, vector_tiles, row, column, 1, BOTH)
            store_part(third, outputs, slots, vector_tiles, row, column, 2, BOTH)
            store_part(fourth, outputs, slots, vector_tiles, row, column, 3, BOTH)
    tma.store_wait(0)


# no argument is specialised on: the copy engine reads what its descriptors say, and one binary serves every shape
@gluon.jit(do_not_specialize=["M", "N", "K", "R", "group_m"])
def gemm_kernel(
    x,  # (M, K) bf16, like all but gain a tensor descriptor with blocks of one step of a tile
    weight,  # (N, K); NN: (K, N)
    low,  # (M, R), times scaling
    lora,  # (N, R); NN: (R, N)
    y,  # (M, N), in blocks of ROWS x BLOCK_N / PARTS
    z,  # (M, N), the same; not written unless BOTH
    gain,  # (N,) float32
    bias,  # (N,)
    M,
    N,
    K,
    R,
    group_m,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    PARTS: gl.constexpr,
    BOTH: gl.constexpr,
    CONSUMERS: gl.constexpr,
    NN: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """y, and BOTH: z, as above. One program owns every num_programs-th tile. K must be above STAGES steps.

    CONSUMERS: 2, each 4 warps on half the rows, or 1 of 8 warps on all (launch with num_warps=8).
    """
    # a tile begins with slot 0 whatever the tile before ended with, so the slots must divide the stores of a tile
    gl.static_assert((2 * PARTS if BOTH else PARTS) % SLOTS == 0)
    gl.static_assert(PARTS == 2 or PARTS == 4)
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    slots = gl.allocate_shared_memory(y.dtype, [SLOTS] + y.block_type.shape, y.layout)
    gain_tile = gl.allocate_shared_memory(gain.dtype, gain.block_type.shape, gain.layout)
    bias_tile = gl.allocate_shared_memory(bias.dtype, bias.block_type.shape, bias.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    outputs = (y, z)
    tiles = (gain_tile, bias_tile)
    rings = (x_ring, weight_ring)
    bars = (ready, empty)
    sizes = (M, N, K, R)
    producing = ((x, weight, low, lora), (gain, bias), tiles, rings, bars, sizes, group_m, NN)
    if CONSUMERS == 2:
        other = gl.allocate_shared_memory(y.dtype, [SLOTS] + y.block_type.shape, y.layout)
        gl.warp_specialize(
            [
                (consume, (0, outputs, slots, tiles, rings, bars, sizes, group_m, BLOCK_M, PARTS, BOTH, NN)),
                (consume, (1, outputs, other, tiles, rings, bars, sizes, group_m, BLOCK_M, PARTS, BOTH, NN)),
                (produce, producing),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (0, outputs, slots, tiles, rings, bars, sizes, group_m, BLOCK_M, PARTS, BOTH, NN)),
                (produce, producing),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
