"""No kernel reads or writes outside of what it was given: every tensor ends at a page that nobody may touch.

A selection over all kernels, and faults planted in them, each of which has to be noticed. `make test-guarded` runs the
tests of the kernels themselves so. What runs here is in processes of its own, which may die.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.packed_weights import KINDS, quantized
from tests.support.problem import DEVICE, Problem

pytest.importorskip("triton")

from tests.support.launcher_operands import OPERANDS, launch, tensors_of  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import guard_pages  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="kernels are compiled for a GPU here; pages are the host's")

# ragged in every axis; whole vectors, and R in chunks; a rank of 8; one of everything
SHAPES = ((33, 70, 90, 20), (5, 20, 80, 33), (7, 24, 10, 8), (1, 1, 1, 1))
# K = 24 and 90 leave a block of 64 over the end of a row; at K = 9 a byte holds the last code alone, or, of 4 rows, the
# byte behind the last one holds the next
FORMATS = {
    "nf4": (20, 24),
    "nf4 nested": (40, 90),
    "odd": (5, 9),
    "odd, of whole bytes": (4, 9),
    "nf4_torchao": (20, 24),
    "int8": (33, 34),
    "float8": (33, 34),
    "hqq": (16, 24),
    "hqq axis 0": (8, 9),
}


def by_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous().T if tensor.dim() == 2 else tensor.repeat_interleave(2)[::2]


def stored(name: str):
    """A weight (N, K) of random parts, with just as many numbers as it needs."""
    from dora_kernels.quant import QuantizedWeight

    N, K = FORMATS[name]
    if name in KINDS:
        return quantized(name, N, K)
    packed = torch.randint(256, (-(-N * K // 2),), dtype=torch.uint8)
    blocks = -(-N * K // 64)
    if name.startswith("hqq"):
        groups = N * K // 8
        parts = (packed, torch.rand(groups), torch.rand(groups))
        return QuantizedWeight("hqq4", (N, K), torch.float32, parts, (8, 0 if name.endswith("0") else 1))
    if name == "nf4 nested":
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8)
        nested = (torch.rand(-(-blocks // 256)), torch.rand(256), torch.rand(()))
        parts, numbers = (packed, absmax, torch.rand(16), *nested), (64, 256)
    else:
        parts, numbers = (packed, torch.rand(blocks), torch.rand(16)), (64, 0)
    return QuantizedWeight("codebook4", (N, K), torch.float32, parts, numbers)


def of_stored(name: str) -> list[torch.Tensor]:
    from dora_kernels import kernels

    weight = stored(name)
    N, K = weight.shape
    lora_A, lora_B, magnitude = torch.randn(3, K), torch.randn(N, 3), torch.rand(N)
    merged = kernels.merge(weight, lora_A, lora_B, magnitude, 0.75)
    return [*kernels.norm(weight, lora_A, lora_B, 0.75, magnitude), merged, kernels.dense(weight, torch.float32)]


def differences(run, side: str) -> list[str]:
    """The results that are others between guard pages."""
    torch.manual_seed(0)
    expected = run()
    torch.manual_seed(0)
    with guard_pages.guard_pages(side):
        actual = run()
    pairs = enumerate(zip(actual, expected, strict=True))
    return [f"result {number}" for number, (one, other) in pairs if not torch.equal(one, other) or one.isnan().any()]


def launched(launcher: str, side: str, shapes=SHAPES) -> list[str]:
    """The differences of a launcher over shapes, contiguous and by columns."""
    from dora_kernels.planning import plan

    plan.project_by_kernel = lambda *arguments, **keywords: True
    found = []
    for shape in shapes:
        contiguous = tensors_of(Problem.random(*shape, torch.float32))
        strided = contiguous | {
            name: by_columns(contiguous[name]) for name in OPERANDS[launcher] if launcher != "grouped_norm"
        }
        for tensors in (contiguous, strided) if shape == shapes[0] else (contiguous,):
            found += differences(lambda tensors=tensors: launch(launcher, tensors), side)
    return found


@pytest.mark.parametrize("side", guard_pages.SIDES)
@pytest.mark.parametrize("launcher", OPERANDS)
def test_every_launcher_stays_inside(launcher, side):
    assert guard_pages.in_child(lambda: launched(launcher, side)) == ([], "")


@pytest.mark.parametrize("side", guard_pages.SIDES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_quantised_weight_is_read_inside(name, side):
    assert guard_pages.in_child(lambda: differences(lambda: of_stored(name), side)) == ([], "")


# file, what is there, what is planted, who launches it
FAULTS = {
    "a mask left out": ("shares.py", "part * size + offs, mask=mask, other=0.0)", "part * size + offs)", "token_sums"),
    "a tile read in any case": (
        "tile.py",
        "mask_0[:, None] & mask_1[None, :], other",
        "mask_0[:, None], other",
        "norm",
    ),
    "too early": ("norm.py", "load_vector(magnitude, offs_n,", "load_vector(magnitude, (offs_n - 1),", "norm"),
    "a row too many": ("token_sums.py", "BLOCK_M) < M -", "BLOCK_M) <= M -", "token_sums"),
    "a sum too late": ("token_sums.py", "(dmagnitude_ptr +", "(dmagnitude_ptr + 1 +", "token_sums"),
    "a column too many": ("project.py", "mask_k = offs_k < K", "mask_k = offs_k <= K", "project"),
    "a bias unmasked": ("tile.py", "vector.stride, mask=mask, other=0.0)", "vector.stride)", "epilogue"),
    "zeros of too many rows": ("norm.py", "(squares), mask=mask_n)", "(squares))", "merged_forward"),
    "a write too far": ("merge.py", "offs_k < K - k, merged", "offs_k <= K - k, merged", "merge"),
    "an index unmasked": ("bank_epilogue.py", "offs_m, mask=mask_m, other=-1)", "offs_m)", "bank_epilogue"),
    "a row of another layer": ("grouped_norm.py", "mask_n = offs_n < N", "mask_n = offs_n <= N", "grouped_norm"),
    "a byte too many": ("four_bits.py", "offs_byte < row_bytes", "offs_byte <= row_bytes", "nf4"),
    "a scale too far": ("four_bits.py", "pointers[1], block, mask", "pointers[1], block + 1, mask", "nf4"),
}
UNWRITTEN = ("norm.py", "_tile, norm), mask=mask_n)", "_tile, norm), mask=mask_n & (offs_n > 0))", "norm")


def plant(folder: Path, file: str, here: str, fault: str) -> None:
    """Replace the kernels of this process by others of which one has the fault."""
    import dora_kernels

    shutil.copytree(ROOT / "dora_kernels" / "kernels", folder, dirs_exist_ok=True)
    source = (folder / file).read_text()
    assert here in source, "what is planted is no fault of this code"
    (folder / file).write_text(source.replace(here, fault))
    for name in [name for name in sys.modules if name.startswith("dora_kernels.kernels")]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        "dora_kernels.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    dora_kernels.kernels = sys.modules["dora_kernels.kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dora_kernels.kernels)


def with_planted(folder: Path, file: str, here: str, fault: str, launcher: str) -> tuple[object, str]:
    """Which results of the launcher have a NaN, or why it died."""
    side = "begin" if "- 1)" in fault else "end"

    def run():
        plant(folder, file, here, fault)
        with guard_pages.guard_pages(side):
            if launcher in FORMATS:
                results = of_stored(launcher)
            else:
                results = launch(launcher, tensors_of(Problem.random(33, 70, 90, 20, torch.float32)))
        return [number for number, result in enumerate(results) if result.isnan().any()]

    return guard_pages.in_child(run)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name, tmp_path):
    answer, why = with_planted(tmp_path, *FAULTS[name])
    assert answer is None and why.startswith("died of SIGSEGV\n") and "interpreter.py" in why, (answer, why)


def test_what_is_left_unwritten_is_noticed(tmp_path):
    assert with_planted(tmp_path, *UNWRITTEN) == ([1], "")  # gain, in memory that was NaN


def test_a_write_on_the_page_but_beside_the_tensor_is_an_error():
    kernel_arguments = [torch.zeros(4, 6)[:, :5], torch.zeros(3)]
    with pytest.raises(AssertionError, match=r"kernel wrote beside \(4, 5\) torch.float32"):
        with guard_pages.guarded(kernel_arguments, "end", "kernel") as (matrix, _):
            matrix.as_strided((3,), (6,), 5)[1] = 0  # the gap between two rows
    assert kernel_arguments[0].count_nonzero() == 0


def test_what_was_written_comes_back_and_views_of_one_storage_stay_so():
    memory = torch.arange(12.0).view(3, 4)
    version = memory._version
    with guard_pages.guarded(
        [memory[:2], (memory[1:], memory[:, :0]), 7, memory[:1, 0].expand(5)], "begin", ""
    ) as given:
        top, (bottom, empty), number, expanded = given
        assert (number, empty.numel(), expanded.tolist()) == (7, 0, [0.0] * 5)
        assert top.data_ptr() != memory.data_ptr() and top.data_ptr() % 4096 == 0
        top[1, 2] = 50
        assert bottom[0, 2] == 50
    assert memory[1, 2] == 50 and memory.sum() == 66 + 50 - 6 and memory._version == version


@pytest.mark.nightly
def test_a_test_that_dies_fails_and_the_next_one_runs(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import ctypes\ndef test_dies():\n    ctypes.string_at(0)\ndef test_lives():\n    pass\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.guard_pages", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and "1 failed, 1 passed" in result.stdout, result.stdout + result.stderr
    assert "died of SIGSEGV" in result.stdout and "in test_dies" in result.stdout
