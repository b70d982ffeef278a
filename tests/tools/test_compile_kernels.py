"""The kernels compile for GPUs that are not here, and compile once: no shape of x and no scaling asks for another.

All of it runs in subprocesses: in this one Triton may be interpreting, which leaves nothing to compile.
"""

import ast
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from dora_kernels.kernels.shares import is_last  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
TOKENS = (1, 16, 100, 1000, 4096, 4099, 65536)
SCALINGS = (0.5, 1.0, 2.0)
HAS_GLUON = importlib.util.find_spec("triton.experimental.gluon") is not None
needs_gluon = pytest.mark.skipif(not HAS_GLUON, reason="this Triton has no Gluon")


def _run(*command: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    return subprocess.run([sys.executable, *command], env=env, text=True, capture_output=True)


def _compile(*arguments: str) -> subprocess.CompletedProcess:
    return _run(str(ROOT / "tools" / "compile_kernels.py"), *arguments)


def _kernels() -> set[str]:
    """The names of the kernels of the package, helpers that kernels call apart."""
    return {
        node.name
        for path in (ROOT / "dora_kernels" / "kernels").rglob("*.py")
        if path.parent.name != "hopper" or HAS_GLUON
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }


@pytest.fixture(scope="module")
def fast() -> subprocess.CompletedProcess:
    return _compile("--fast", "--loops", f"--jobs={min(4, os.cpu_count() or 1)}")


# what is complained of in hot_loops.py and not in compile_kernels.py
LOADS = re.compile(r"is loaded|not in the PTX|EXEMPTIONS")


def test_every_kernel_compiles(fast):
    complaints = [line for line in fast.stderr.splitlines() if not LOADS.search(line)]
    assert not complaints
    compiled = {line.split()[0] for line in fast.stdout.splitlines()}
    assert _kernels()
    assert not _kernels() - compiled, "kernels that no call of the tool launches"


def test_what_loops_stream_is_loaded_ahead_in_16_bytes_a_thread(fast):
    assert not [line for line in fast.stderr.splitlines() if LOADS.search(line)]
    assert fast.returncode == 0 and "0 complaints" in fast.stdout


FOUR_BITS = """
import compile_kernels as tool, dataclasses, json
jobs = tool.jobs_for(["sm_90"], ["bf16"], (64,), ("codebook4", "codebook4 nested", "nf4_torchao", "hqq4 axis 1"))
norms = tool.compile_all([job for job in jobs if job.specialization.name == "_norm_kernel"], loops_on=("sm_90",))
print(json.dumps({job.call: dataclasses.asdict(compiled) for job, compiled in norms}))
"""


def test_norms_over_4_bits_look_nothing_up_in_device_memory():
    """Nor wait for each other's lookups: an absmax was a chain of three loads, and a step had 27 barriers."""
    done = _run("-c", FOUR_BITS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 4
    for call, compiled in found.items():
        (loop,) = (counts for counts in compiled["loops"].values() if any("MMA" in kind for kind in counts))
        assert not [kind for kind in loop if kind.partition(".")[0] == "LDG"], (call, loop)
        assert loop["BAR"] <= 5 and compiled["programs"] >= 2 and compiled["spills"] == 0, (call, compiled)


# the JIT compiles a number that is 1 in, as a constant
ONES = "--target=sm_90", "--variant=bf16, fp32 adapters", "--rank=1", "--shape", "1", "1", "1"
EVERY = [f"--call={call}" for call in ("train", "split", "merged", "norm_grad", "bank", "grouped", "rescale")]


@pytest.mark.parametrize(
    "arguments", (["--kernel=_parts", "--call=train"], pytest.param(EVERY, marks=pytest.mark.nightly)), ids=len
)
def test_kernels_compile_where_every_size_is_1(arguments):
    done = _compile(*ONES, *arguments)
    assert "_parts_kernel" in done.stdout and "does not compile" not in done.stdout, done.stdout


# the width of a vision tower that is no multiple of 16: no argument is known to be aligned
ODD = "--target=sm_90", "--variant=bf16", "--shape", "8192", "3420", "3420"
EVERY_OF_ODD = [f"--call={call}" for call in ("train", "split", "grouped")] + ["--rank=8", "--rank=64", "--rank=384"]


@pytest.mark.parametrize(
    "arguments",
    (["--kernel=_norm", "--rank=8", "--call=train"], pytest.param(EVERY_OF_ODD, marks=pytest.mark.nightly)),
    ids=len,
)
def test_rows_that_are_not_loaded_in_vectors_spill_nothing(arguments):
    done = _compile(*ODD, *arguments)
    assert "_norm_kernel" in done.stdout and done.returncode == 0, done.stdout


# 96 to 576 bytes spilled in tiles of the size that others have; the sweep has no odd K but in bfloat16
ODD_FLOAT = "--target=sm_90", "--variant=bf16, fp32 adapters", "--rank=64", "--call=codebook4, K = 4095"
NESTED = "--target=sm_100", "--variant=fp32", "--rank=64", "--call=codebook4 nested"


@pytest.mark.parametrize(
    "arguments", (NESTED, pytest.param(ODD_FLOAT, marks=pytest.mark.nightly)), ids=("nested", "odd K")
)
def test_a_training_step_over_4_bits_merges_without_spills(arguments):
    done = _compile("--kernel=_merge", *arguments)
    assert "_merge_kernel" in done.stdout and done.returncode == 0, done.stdout


# 72 bytes spilled by tiles of the size that a merge without squares has
SQUARES = "--target=sm_100", "--variant=bf16", "--rank=64", "--call=merged"
IN_PARTS = "--target=sm_80", "--variant=bf16, fp32 adapters", "--rank=8", "--call=merged"


@pytest.mark.parametrize(
    "arguments", (SQUARES, pytest.param(IN_PARTS, marks=pytest.mark.nightly)), ids=("dense", "in parts")
)
def test_a_merge_beside_the_squares_of_its_rows_spills_nothing(arguments):
    done = _compile("--kernel=_merge", *arguments)
    assert "_merge_kernel" in done.stdout and done.returncode == 0, done.stdout


@pytest.mark.nightly  # about 4000 compilations
def test_every_config_compiles_for_every_target():
    done = _compile(f"--jobs={os.cpu_count()}", "--loops")
    assert done.returncode == 0, done.stdout + done.stderr


# the arguments of compile_kernels.py and the end of a complaint, with what is wrong with the configuration
PROJECT = "--target=sm_120", "--variant=bf16", "--rank=64", "--call=train", "--kernel=project", "--set"
PROJECT_SM90 = "--target=sm_90", *PROJECT[1:]
SUMS = "--target=sm_90", "--variant=bf16", "--rank=64", "--call=train", "--kernel=token_sums", "--loops", "--set"
REJECTED = {
    "project:num_stages=8": (PROJECT, "over the limit"),  # eight stages of 24 KiB; sm_120 has 99 KiB
    "project:num_warps=1": (PROJECT, "spills"),  # a [128, 64] float32 tile is 256 registers of each of 32 threads
    "project:BLOCK_K=48": (PROJECT, "does not compile"),  # not a power of 2
    # a [128, 64] tile of 8 warps and four stages of it: two programs, or one with Triton 3.6.0
    "project:waves=3": (PROJECT_SM90, "waves=3, and a multiprocessor holds"),
    # with one stage a tile is loaded where it is used
    "token_sums:num_stages=1": (SUMS, "on sm_90: dy is loaded synchronously"),
}
GEMM = "--target=sm_90", "--variant=bf16", "--rank=64", "--call=fused", "--kernel=gemm", "--set"
WIDE_SLOTS = *GEMM, "gemm:stages=3", "--set", "gemm:parts=2", "--set"
REJECTED_GEMMS = {
    "gemm:stages=5": (GEMM, "over the limit"),  # 240 KiB
    "gemm:consumer_registers=160": (WIDE_SLOTS, "a stack of"),
    "gemm:consumer_registers=152": (GEMM, "the compiler has ignored setmaxnreg"),  # a product itself takes 154
    "gemm:slots=3": (GEMM, "does not compile: gl.static_assert"),
}
# with fewer stages two programs fit a multiprocessor, and the GEMM's lack one; there is no side without the GEMM
BESIDE = *GEMM[:4], "--kernel=token_sums", "--set"
REJECTED_GEMMS["token_sums_beside:num_stages=2"] = BESIDE, "bytes of shared memory leave room for a second program"
REJECTED |= REJECTED_GEMMS if HAS_GLUON else {}
REJECT = """
import compile_kernels, contextlib, io, json, sys
found = {}
for override, command in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        status = compile_kernels.main([*command, override])
    found[override] = status, said.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def rejected() -> dict[str, tuple[int, str]]:
    """What compile_kernels.py returns and says of each configuration, one after the other in one process."""
    done = _run("-c", REJECT, json.dumps({override: command for override, (command, _) in REJECTED.items()}))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("override", REJECTED)
def test_a_config_that_does_not_fit_is_rejected(override, rejected):
    status, said = rejected[override]
    assert status == 1 and REJECTED[override][1] in said, said


def specialization_keys() -> dict[str, dict[str, dict[str, list[str]]]]:
    """way -> call -> kernel -> keys of the specialisations; run where Triton compiles."""
    import specializations as tool

    import dora_kernels

    def keys(variant: str, M: int, scaling: float) -> dict[str, list[str]]:
        found: dict[str, set[str]] = {}
        inputs = tool.Inputs.of(tool.VARIANTS[variant], M, N=4096, K=4096, R=64)
        target = tool.TARGETS["sm_90"]
        with tool.recording(target, tool.VARIANTS[variant]) as recorded:
            tool.step(inputs, scaling=scaling)
        for specialization in recorded:
            found.setdefault(specialization.name, set()).add(str(specialization.key))
        return {name: sorted(found[name]) for name in found}

    results = {}
    for way in ("split", "merged"):
        with dora_kernels.options(way=way):
            results[way] = {f"M={M} s={scaling}": keys("bf16", M, scaling) for M in TOKENS for scaling in SCALINGS}
            results[way]["fp16"] = keys("fp16", TOKENS[-1], SCALINGS[-1])
    return results


def merged_operands() -> list[list[str]]:
    """The dtypes of weight and lora_A that the merge's kernel is compiled for; run where Triton compiles."""
    import compile_kernels as tool

    found = [job.specialization for job in tool.fast_jobs() if job.specialization.name == "_merge_kernel"]
    names = "weight.pointers[0]", "update.lora_A"
    return sorted({tuple(map(one.type_of, names)) for one in found if one.target.name == "sm_90"})


def told_to_hooks() -> list[str]:
    """The kernels of which Triton's JIT can tell its hooks (triton.knobs.runtime); run where Triton compiles."""
    import compile_kernels as tool
    from triton.runtime.jit import serialize_specialization_data

    found = {job.specialization.name: job.specialization for job in tool.fast_jobs()}
    takes_target = "target" in inspect.signature(serialize_specialization_data).parameters  # from Triton 3.7 on
    for name, one in found.items():
        rest = {"options": SimpleNamespace(), "key": str(one.key)} | (
            {"target": SimpleNamespace()} if takes_target else {}
        )
        serialize_specialization_data(name, one.signature, one.constexprs, one.attrs, **rest)
    return sorted(found)


@triton.jit
def counting_kernel(partial_ptr, counter_ptr, MEETING: tl.constexpr):
    """Stores and counts; MEETING: as the package does, else without the barrier in between."""
    offs = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(partial_ptr + offs, offs)
    if MEETING:
        last = is_last(counter_ptr, tl.num_programs(0))
    else:
        last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(partial_ptr, 0)


def counted() -> list[list[str]]:
    """The faults of counting_kernel, with and without the barrier; run where Triton compiles."""
    import compile_kernels as tool

    tensor = torch.empty(512, dtype=torch.int32, device="meta")
    with tool.recording(tool.TARGETS["sm_90"], tool.VARIANTS["bf16"]) as recorded:
        for meeting in (True, False):
            counting_kernel[4,](tensor, tensor, MEETING=meeting)
    return [list(tool.compile_ahead(one).faults) for one in recorded]


def of_candidates() -> list[list]:
    """(kernel, has a residual) of what two candidates for the epilogue are compiled for, and of what one alone is."""
    import precompile

    found = precompile.candidates_of(["epilogue"], 2, precompile.TARGETS["sm_90"])[:2]
    one, other = ({(spec.name, spec.has("residual"), spec.key) for spec in precompile.launched_by(c)} for c in found)
    return [sorted({(name, residual) for name, residual, _ in kernels}) for kernels in (one, other, one - other)]


def quantized_merges() -> dict[str, list[str]]:
    """What stands beside update and gain in the merges of a stored weight -> the kinds of weight; run as above."""
    import compile_kernels as tool

    jobs = tool.jobs_for(["sm_90"], ["bf16"], (64,), tool.QUANTIZED_KINDS)
    merges = [(job.call, job.specialization) for job in jobs if job.specialization.name == "_merge_kernel"]
    found = {}
    for name in ("scaled_B", "counters_ptr", "unfinished"):
        found[name] = [call for call, one in merges if all(map(one.has, ("update", "gain_ptr", name)))]
    return found | {"all": list(tool.QUANTIZED_KINDS)}


def beside_the_gemm() -> dict[str, list[list[int]]]:
    """The grids of what runs beside the GEMM of dx, and its own, by kernel; run where Triton compiles."""
    import compile_kernels as tool

    jobs = tool.jobs_for(["sm_90"], ["bf16"], (64,), ("fused",))
    found: dict[str, list[list[int]]] = {}
    for one in (job.specialization for job in jobs):
        if one.beside or "nn" in one.flags().split():
            found.setdefault(one.name, []).append(list(one.grid))
    return found


def launched() -> list[list[str]]:
    """What training steps at 8192, 4096 x 4096, R = 64, and at R = 384 launch; run where Triton compiles."""
    import launches as tool

    return [tool.launches(tool.TARGETS["sm_90"], tool.VARIANTS["bf16"], "train", R=R) for R in (64, 384)]


@pytest.fixture(scope="module")
def recorded() -> dict:
    functions = {
        "keys": "specialization_keys()",
        "merged": "merged_operands()",
        "told": "told_to_hooks()",
        "counted": "counted()",
        "candidates": "of_candidates()",
        "launched": "launched()",
        "quantized": "quantized_merges()",
        "beside": "beside_the_gemm()",
    }
    calls = ", ".join(functions.values())
    done = _run("-c", f"from tests.tools.test_compile_kernels import *; print(json.dumps([{calls}]))")
    assert done.returncode == 0, done.stderr
    return dict(zip(functions, json.loads(done.stdout), strict=True))


def test_a_training_step_is_nine_launches(recorded):
    """No launch only finishes what another began, or fills what a third one counts with."""
    (low, *others), high_rank = recorded["launched"]
    assert low in ("mm", "_project_kernel")  # as the planner expects either to be faster
    assert others == [
        *("_norm_kernel", "mm", "_epilogue_kernel"),
        *("_merge_kernel", "mm", "_token_sums_kernel", "_project_kernel", "_token_sums_kernel"),
    ]
    # the library makes dB, of whose float32 sums it makes no copy on a GPU
    assert len(high_rank) == 10 and "_to_copy" not in high_rank


def test_a_candidate_is_compiled_for_what_judges_it_and_for_training_steps(recorded):
    """Dropout is none of the calls that judge the epilogue."""
    with_and_without = [["_epilogue_kernel", False], ["_epilogue_kernel", True]]
    *both, first_alone = recorded["candidates"]
    assert both == [with_and_without, with_and_without] and with_and_without[0] in first_alone


def test_a_count_without_a_barrier_before_it_is_a_fault(recorded):
    """Of a kernel without shared memory: for what is in it Triton may put a barrier there, which is no promise."""
    with_it, without = recorded["counted"]
    assert with_it == [] and len(without) == 1 and "tl.debug_barrier() lacks" in without[0]


def test_hooks_of_the_jit_are_told_of_every_kernel(recorded):
    """In json, which knows no tl.dtype inside of a tuple: the first launch under a hook would raise."""
    assert {"_norm_kernel", "_epilogue_kernel", "_token_sums_kernel", "_merge_kernel"} <= set(recorded["told"])


def test_a_layer_taken_apart_again_is_compiled_for(recorded):
    """unmerge divides by the gain in float32: the kernel sees such a weight beside adapters in half precision."""
    assert recorded["merged"] == [["*bf16", "*bf16"], ["*fp32", "*bf16"]]


def test_every_merge_of_a_quantized_weight_is_compiled_for(recorded):
    """A training step merges with all that its backward pass begins with, inference with a norm to finish."""
    found = recorded["quantized"]
    assert found["scaled_B"] == found["counters_ptr"] == found["unfinished"] == found["all"]


# Kernels that are launched in more than one way as M changes, and why.
LAUNCHED_IN_WAYS = {
    "_project_kernel": 2,  # few tokens: float32 partial sums of several parts; many: the result in its own dtype
}


@pytest.mark.parametrize("way", ["split", "merged"])
def test_tokens_and_scaling_recompile_nothing(recorded, way):
    """A kernel may be launched for some M only (prepare), but never with another key."""
    other_dtype = recorded["keys"][way].pop("fp16")
    keys: dict[str, set[tuple[str, ...]]] = {}
    for call in recorded["keys"][way].values():
        for kernel, found in call.items():
            keys.setdefault(kernel, set()).add(tuple(found))
    ways = {kernel: len(found) for kernel, found in keys.items() if len(found) > 1}
    assert ways == LAUNCHED_IN_WAYS, "kernels with more than one set of specialisations"
    # another dtype is another specialisation of whatever touches the inputs: the keys do tell calls apart
    for kernel in ("_norm_kernel" if way == "split" else "_merge_kernel", "_epilogue_kernel", "_token_sums_kernel"):
        assert not set(other_dtype[kernel]) & {key for found in keys[kernel] for key in found}


@needs_gluon
def test_of_the_gemm_each_role_has_its_registers(fast):
    """The limits are those of the configuration; a part of what the consumers have, the producer has given up."""
    lines = [line for line in fast.stdout.splitlines() if line.startswith("gemm_kernel ")]
    assert len(lines) == 1  # the worst of forward and dx
    found = re.findall(r", ([a-z]+ ?\d?) (\d+)/(\d+)", lines[0])
    assert {name: limit for name, _, limit in found} == {"consumer 0": "240", "producer": "24", "consumer 1": "240"}
    used = {name: int(registers) for name, registers, _ in found}
    assert used["consumer 0"] > 128 and 1 < used["producer"] <= 24  # 128 are the sums
    loops = [line.split(" | ") for line in fast.stdout.splitlines() if "| producer: " in line or "| consumer " in line]
    assert any("2 UTMALDG" in " ".join(line) for line in loops)
    assert any("4 HGMMA.64x256x16" in " ".join(line) for line in loops)


# Triton itself imports Gluon where a kernel is launched: what may be missing are names
@needs_gluon
def test_what_runs_beside_a_gemm_is_four_programs(recorded):
    """Their shared memory has been judged: `test_a_config_that_does_not_fit_is_rejected` knows a complaint."""
    assert recorded["beside"] == {"_token_sums_kernel": [[4], [4]], "_project_kernel": [[4]], "gemm_kernel": [[128]]}


WITHOUT_GLUON = """
import sys
from triton.experimental.gluon.language.nvidia.hopper import tma
for name in ("async_copy_global_to_shared", "async_load"):
    vars(tma).pop(name, None)
import compile_kernels
sys.exit(compile_kernels.main(sys.argv[1:]))
"""


@needs_gluon
def test_a_triton_without_such_a_gluon_leaves_the_gemm_out_and_says_so():
    done = _run("-c", WITHOUT_GLUON, *GEMM[:-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out, and nothing beside it: gemm_kernel, for Triton" in done.stdout


SERIALIZED = """
import changed_kernel, compile_kernels as tool, torch
from unittest import mock
from dora_kernels.kernels.hopper import launch

WAIT = "warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))"
kernel = changed_kernel.changed(WAIT, WAIT[:-1] + " * 1.5)")  # reads what a product under way is adding to
left, right = torch.empty(2, 1024, 1024, dtype=torch.bfloat16, device="meta")
with mock.patch.object(launch, "kernel", lambda: kernel):
    with tool.recording(tool.TARGETS["sm_90"], tool.VARIANTS["bf16"]) as recorded:
        launch.gemm(left, right, nn=True)
(one,) = recorded
print(tool.verdict(tool.compile_ahead(one), one))
"""


@needs_gluon
def test_products_that_wait_for_each_other_are_seen():
    done = _run("-c", SERIALIZED)
    assert "wgmma is serialized" in done.stdout, done.stdout + done.stderr


# The JIT binds real arguments and compiles, and would launch next: the driver knows its device and no more.
LAUNCHED = """
import compile_kernels as tool, precompile, torch, triton
from dora_kernels.kernels.hopper import launch
from dora_kernels.planning import devices

def gemms(device):
    def half(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    adapter = {"low": half(64, 8), "lora": half(72, 8), "gain": torch.zeros(72, device=device), "bias": half(72)}
    launch.gemm(half(64, 328), half(72, 328), nn=False, both=True, scaling=0.5, **adapter)
    launch.gemm(half(64, 328), half(328, 72), nn=True)

with tool.recording(tool.TARGETS["sm_90"], tool.VARIANTS["bf16"]) as recorded:
    gemms("meta")
ahead = [precompile.build(one) for one in recorded]

from specializations import _Driver
triton.runtime.driver.set_active(_Driver(tool.TARGETS["sm_90"]))
devices.device_facts = lambda device: devices.DeviceFacts("pretended", "sm_90", 132)
compiled, run = [], launch.kernel().run
launch.kernel().run = lambda *arguments, warmup, **options: compiled.append(run(*arguments, warmup=True, **options))
gemms("cpu")
for one, other in zip(ahead, compiled, strict=True):
    assert one.src.signature == other.src.signature and one.hash == other.hash
    assert one.asm["cubin"] == other.asm["cubin"]
"""


@needs_gluon
def test_a_gemm_compiled_ahead_is_what_a_launch_compiles():
    done = _run("-c", LAUNCHED)
    assert done.returncode == 0, done.stderr


EVERY_GEMM = """
import compile_kernels as tool, itertools, torch
from dora_kernels.kernels.hopper import launch

M = N = K = 1024
jobs = []
for dtype, nn, low, gain, bias, both in itertools.product((torch.bfloat16, torch.float16), *[(False, True)] * 5):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    given = {"low": empty(M, 64), "lora": empty(*((64, N) if nn else (N, 64)))} if low else {}
    given |= {"gain": empty(N, dtype=torch.float32)} if gain else {}
    given |= {"bias": empty(N)} if bias else {}
    with tool.recording(tool.TARGETS["sm_90"], tool.VARIANTS["bf16"]) as recorded:
        launch.gemm(empty(M, K), empty(N, K), nn=nn, both=both, **given)
    jobs += [tool.Job(str(dtype), 64, one.flags(), one) for one in recorded]
assert len({job.specialization.key for job in jobs}) == 64
complaints = tool.print_table(tool.compile_all(jobs, 2), every=True)
assert not complaints, complaints
"""


@needs_gluon
@pytest.mark.nightly  # 64 compilations
def test_every_gemm_compiles_in_both_dtypes():
    done = _run("-c", EVERY_GEMM)
    assert done.returncode == 0, done.stdout + done.stderr


ROUNDING = """
import re, specializations as tool, triton
from triton.compiler import ASTSource
inputs = tool.Inputs.of(tool.VARIANTS["bf16"], 64, N=4096, K=4096, R=64)
with tool.recording(tool.TARGETS["sm_90"], tool.VARIANTS["bf16"]) as recorded:
    tool.step(inputs, scaling=0.5)
found = next(one for one in recorded if one.name == "_epilogue_kernel")
source = ASTSource(found.kernel, found.signature, found.constexprs, found.attrs)
kernel = triton.compile(source, target=found.target.gpu, options=found.options.__dict__)
print(sorted(set(re.findall(r"\\b(?:sqrt|rsqrt|div|rcp)\\.[a-z.]*f32", kernel.asm["ptx"]))))
"""


def test_norm_and_gain_are_rounded_to_nearest():
    """tl.sqrt and "/" would be approximate, which no interpreter shows."""
    done = _run("-c", ROUNDING)
    assert done.stdout.strip() == "['div.rn.f32', 'sqrt.rn.f32']", done.stdout + done.stderr
