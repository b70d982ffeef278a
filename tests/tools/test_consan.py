"""The stage of the GPU suite that runs Triton's race checker, with a log in the place of each of its processes."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from gpu_stages import consan  # noqa: E402
from gpu_stages.running import CommandRun, Suite  # noqa: E402

from dora_kernels.kernels.hopper import launch  # noqa: E402

# as CUDA writes it on stderr, once for each thread
SEEN = "gemm.py:212: store: block: [0,0,0], thread: [{},0,0] Assertion `{}` failed."
PENDING = "Accessing buffer with pending access. Pending access type: async_copy_shared_to_global"
FAILED = "\n".join([*(SEEN.format(thread, PENDING) for thread in range(3)), "device-side assert triggered"])
RIGHT = {"forward": (0, "forward"), "dx": (0, "dx"), "broken": (1, FAILED)}


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """stage(case=(status, log), ...) is the outcome where the other processes end as they should."""
    calls = []

    def run(self, name, command, seconds, grace=0.0, variables=None):
        calls.append((name, tuple(command), variables))
        status, text = ends[name.removeprefix("consan_")]
        log = tmp_path / f"{name}.log"
        log.write_text(text)
        return CommandRun(status, log)

    def stage(**others):
        ends.update(RIGHT | others)
        outcome = consan.consan(Suite(tmp_path, work=tmp_path), 60)
        assert sorted(name for name, *_ in calls) == ["consan_broken", "consan_dx", "consan_forward"]
        assert all(variables["TRITON_INSTRUMENTATION_MODE"] == "consan" for *_, variables in calls)
        return outcome

    ends: dict[str, tuple[int | None, str]] = {}
    monkeypatch.setattr(Suite, "run", run)
    return stage


def test_a_run_without_a_word_is_right_and_the_broken_kernel_is_seen(stage):
    outcome = stage()
    assert outcome["ok"] and outcome["seen_in_broken"] == [PENDING] and "reason" not in outcome


@pytest.mark.parametrize(
    "others, reason",
    [
        ({"dx": (1, SEEN.format(0, "Buffer being accessed has outstanding writes."))}, "dx: Buffer being accessed has"),
        ({"forward": (1, "RuntimeError: no allocator")}, "forward: exit status 1"),
        ({"forward": (None, "")}, "forward: stopped in time"),
        ({"broken": (0, "broken")}, "nothing seen in a kernel that is broken on purpose"),
        ({"broken": (1, "out of memory")}, "nothing seen in a kernel that is broken on purpose (exit status 1)"),
    ],
)
def test_what_is_seen_fails_the_stage_and_so_does_seeing_nothing(stage, others, reason):
    outcome = stage(**others)
    assert not outcome["ok"] and reason in outcome["reason"]


def test_where_there_is_no_such_kernel_the_stage_is_skipped(stage):
    outcome = stage(**dict.fromkeys(consan.CASES, (consan.NOT_HERE, "no such kernel is built for sm_80")))
    assert outcome == {"ok": True, "skipped": "no such kernel is built for sm_80"}


def gemm(left, right, *, nn, multiprocessors, low=None, lora=None, scaling=1.0, gain=None, bias=None, both=False):
    """As launch.gemm."""
    z = left.float() @ (right if nn else right.T).float()
    if low is not None:
        z += scaling * low.float() @ lora.float().T
    y = z if gain is None else gain * z + bias
    return y.bfloat16(), z.bfloat16() if both else None


@pytest.mark.parametrize("case", ["forward", "dx"])
def test_results_are_held_to_float64(case, monkeypatch):
    monkeypatch.setattr(launch, "gemm", gemm)
    consan.check(case, "cpu")
    monkeypatch.setattr(
        launch, "gemm", lambda *given, **named: [one if one is None else 1.01 * one for one in gemm(*given, **named)]
    )
    with pytest.raises(AssertionError, match="expected less"):
        consan.check(case, "cpu")


def test_a_kernel_that_was_compiled_without_checks_is_noticed():
    def compiled(*texts: str) -> SimpleNamespace:
        kernels = {text: SimpleNamespace(asm={"ptx": text}) for text in texts}
        return SimpleNamespace(device_caches={0: (kernels, None)})

    assert not consan.unchecked(compiled("call __assertfail"))
    assert consan.unchecked(compiled("call __assertfail", "ret")) and consan.unchecked(compiled())


def test_the_fault_can_be_planted():
    source = (ROOT / "dora_kernels" / "kernels" / "hopper" / "gemm.py").read_text()
    assert source.count(consan.WAIT) == 1
    with pytest.raises(ValueError, match="is not in"):
        consan.changed("this is not there", "")


# Of each case what Triton's cache goes by: recorded here for warm.py, and in a process as the stage starts it.
KEYS = """
import sys, torch, triton
from unittest import mock
from dora_kernels.kernels.hopper import launch
from gpu_stages import consan
from specializations import TARGETS, VARIANTS, recording
from triton.compiler import make_backend
from triton._C.libtriton import get_cache_invalidating_env_vars

found = []
if sys.argv[1] == "ahead":
    found = consan.ahead(TARGETS["sm_90"])
else:
    for case in consan.CASES:
        kernel = consan.kernel_of(case)
        with (
            mock.patch.object(launch, "kernel", lambda: kernel),
            recording(TARGETS["sm_90"], VARIANTS["bf16"], {"gemm": consan.SMALL}) as recorded,
        ):
            for sizes in consan.SHAPES:
                empty = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
                launch.gemm(**consan.operands(case, sizes, empty), multiprocessors=consan.PROGRAMS)
        assert recorded[0].key == recorded[1].key
        found.append(recorded[0])
for one in found:
    options = make_backend(one.target.gpu).parse_options(one.options.__dict__)
    assert "consan" in options.instrumentation_mode and options.debug
    print(one.source().hash(), options.hash(), sorted(get_cache_invalidating_env_vars().items()))
"""


@pytest.mark.skipif(not find_spec("triton.experimental.gluon"), reason="this Triton has no Gluon")
def test_what_is_compiled_before_is_what_the_cases_compile():
    def keys(how: str, **variables: str) -> list[str]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
        done = subprocess.run([sys.executable, "-c", KEYS, how], env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    found = keys("ahead")
    assert len(set(found)) == len(consan.CASES) and found == keys("then", **consan.VARIABLES)
