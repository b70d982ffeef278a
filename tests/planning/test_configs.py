"""Tile configurations, and into how many parts a sum is split."""

import pytest

from dora_kernels.planning import configs, devices
from dora_kernels.planning.devices import DeviceFacts
from dora_kernels.planning.tiles import GEMMS, Config

H200 = DeviceFacts("NVIDIA H200", "sm_90", 132)


def test_every_target_has_every_kernel():
    names = set(configs.CONFIGS["sm_90", 2])
    beside = {name for name in names if name.endswith("_beside")}  # a GEMM of ours, which takes half precision
    assert beside == {"token_sums_beside", "project_beside"}
    for (target, itemsize), table in configs.CONFIGS.items():
        has_beside = target in GEMMS and (itemsize == 2 or target == "interpreter")
        assert set(table) == (names if has_beside else names - beside), (target, itemsize)
    families = set(devices._CUDA_FAMILIES.values()) | set(devices._HIP_FAMILIES.values())
    for target in families:
        assert (target, 2) in configs.CONFIGS and (target, 4) in configs.CONFIGS


def test_block_r_shrinks_to_a_small_rank():
    config = Config(BLOCK_N=64, BLOCK_R=64)
    assert [config.tiles(R)["BLOCK_R"] for R in (0, 1, 8, 16, 17, 33, 64, 384)] == [16, 16, 16, 16, 32, 64, 64, 64]
    assert "BLOCK_M" not in config.tiles() and config.tiles()["num_warps"] == 4


def owners(blocks, steps, programs):
    """The program of every unit of work, as kernels/shares.py shares them out."""
    units = blocks * steps
    return [((unit + 1) * programs - 1) // units for unit in range(units)]


def test_sums_are_cut_as_far_as_the_device_is_filled():
    def programs(blocks, steps, waves=1):
        return configs.programs(blocks, steps, 132 * waves, True)

    assert programs(32, 128) == 4 * 32  # equal parts of each block keep 97% of the device at work
    assert programs(112, 128) == 132  # of one part of each block 85%: cut where it falls
    assert programs(128, 64) == 128 and programs(132, 64) == 132 and programs(125, 64) == 125
    assert programs(500, 100) == 500 and programs(141, 100) == 132  # the second round would be all but empty
    assert programs(1, 128) == 64 and programs(32, 3) == 48  # no part of fewer than two steps
    assert programs(32, 1) == 32 and programs(0, 100) == 50 and programs(32, 0) == 32


def test_what_is_not_summed_up_is_cut_among_all():
    assert configs.programs(112, 64, 264, False) == 264
    assert configs.programs(1, 3, 264, False) == 3 and configs.programs(0, 0, 264, False) == 1


@pytest.mark.parametrize("at_once", (1, 7, 132))
@pytest.mark.parametrize("steps", (1, 2, 5, 32, 129))
def test_every_program_has_as_much_to_do_and_parts_are_counted(steps, at_once):
    for blocks in (*range(1, 20), 111, 131, 132, 133, 148, 400):
        programs = configs.programs(blocks, steps, at_once, True)
        shares = [0] * programs
        of_units = owners(blocks, steps, programs)
        for owner in of_units:
            shares[owner] += 1
        assert of_units == sorted(of_units) and min(shares) > 0 and max(shares) - min(shares) <= 1
        parts = [len(set(of_units[first : first + steps])) for first in range(0, blocks * steps, steps)]
        exact = programs >= blocks or blocks % programs == 0
        assert configs.most_parts(blocks, steps, programs) == (max(parts) if exact else 2) >= max(parts)
        rounds = configs.ceil_div(programs, at_once)
        assert programs <= at_once or programs >= configs.FULL * rounds * at_once  # no round that is all but empty


def test_what_a_sum_is_cut_into_is_worked_out_once():
    for known in (configs.programs, configs.most_parts):
        assert known.cache_info().maxsize is not None, (
            "M varies, and the results of a long run must not fill the memory"
        )


@pytest.mark.parametrize(
    ("target", "kernel", "R", "operand_bytes", "out_bytes", "expected"),
    [
        # chunks, programs a multiprocessor, stages, whether registers are limited so that two programs fit
        ("sm_90", "norm", 8, 2, 0, (1, 2, 4, True)),
        ("sm_90", "norm", 64, 2, 0, (1, 2, 4, True)),
        ("sm_90", "merge", 64, 2, 2, (1, 2, 4, True)),
        ("sm_90", "norm_high_rank", 128, 2, 0, (1, 2, 3, True)),
        ("sm_90", "norm_high_rank", 256, 2, 0, (2, 1, 3, False)),
        ("sm_90", "norm_high_rank", 384, 2, 0, (3, 1, 2, False)),
        ("sm_90", "merge_high_rank", 384, 2, 2, (3, 1, 2, False)),
        ("sm_90", "merge_high_rank", 512, 2, 2, (0, 1, 3, False)),
        ("sm_80", "norm_high_rank", 384, 2, 0, (3, 1, 2, False)),
        ("sm_120", "norm_high_rank", 384, 2, 0, (0, 1, 2, False)),
        ("sm_120", "norm", 64, 4, 0, (0, 1, 2, False)),
        ("gfx942", "norm", 64, 2, 0, (1, 1, 2, False)),
    ],
)
def test_lora_B_stays_where_shared_memory_has_room(target, kernel, R, operand_bytes, out_bytes, expected):
    given = configs.CONFIGS[target, operand_bytes][kernel]
    config, chunks = configs.with_lora_B_resident(given, R, operand_bytes, 2, out_bytes, target)
    assert (chunks, config.waves, config.num_stages, config.maxnreg is not None) == expected
    # what the compiler allocates at least: lora_B, and all stages of lora_A
    ranks = max(chunks, 1) * config.tiles(R)["BLOCK_R"]
    allocated = operand_bytes * ranks * ((config.BLOCK_N if chunks else 0) + config.num_stages * config.BLOCK_K)
    assert config.waves * (allocated + 1024) <= configs.SHARED[target] + 1024
    assert (config.BLOCK_N, config.BLOCK_K) == (given.BLOCK_N, given.BLOCK_K)


def test_the_interpreter_keeps_some_ranks_and_walks_others():
    """In the shapes of the tests, so that they see both."""
    norm = configs.CONFIGS["interpreter", 8]["norm"]
    chunks = [configs.with_lora_B_resident(norm, R, 8, 8, 0, "interpreter")[1] for R in (16, 20, 33, 40)]
    assert chunks == [1, 2, 0, 0] and configs.with_lora_B_resident(norm, 33, 4, 4, 0, "interpreter")[1] == 3
