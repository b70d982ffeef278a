"""What is compiled before the GPU suite's stages run is what they launch: the GEMM in Gluon and what runs beside it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
needs_gluon = pytest.mark.skipif(not find_spec("triton.experimental.gluon"), reason="this Triton has no Gluon")

RECORDED = """
import json, sys
from pathlib import Path
from dora_kernels.planning import configs, measured
configs.TUNED_FOLDER = Path(sys.argv[1])
from gpu_stages import warm, workload

target = workload.specializations.TARGETS["sm_90"]

def gemms(card, part, tuning=False):
    entries = workload.wanted(card, target, [part], tuning)
    return [entry for entry in entries if entry.name == "gemm_kernel"]

def told(entries):
    return [f"{entry.stage}: {entry.specialization.flags()}" for entry in entries]

found = {"ways": told(gemms("", "ways")), "layer": told(gemms("", "layer"))}
found["measured"] = told(gemms("NVIDIA Measured", "layer"))
probe = gemms("", "probe")
found |= {"probe": [len({entry.specialization.key for entry in probe}), len(workload.gemm.VARIANTS)]}
workload.SUBJECTS = ()
checked = [entry for entry in gemms("", "ways", tuning=True) if entry.stage == "consan"]
found["consan"] = sorted(entry.specialization.options.instrumentation_mode for entry in checked)
found["launchers"] = [len(warm.one_of_each_signature(probe)), len({entry.signature() for entry in probe})]
print(json.dumps(found))
"""
# at every shape of the layer's grid that an entry at 4096 x 4096 speaks for
FUSED_WINS = {
    "ways": [
        {"M": 512, "N": 4096, "K": 4096, "R": R, "forward": {"split": 100.0, "fused": 50.0}} for R in (16, 64, 128, 384)
    ]
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "nvidia-measured.json").write_text(json.dumps(FUSED_WINS))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    done = subprocess.run([sys.executable, "-c", RECORDED, folder], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_gluon
def test_the_ways_launch_the_gemm_with_z_without_it_and_for_dx(recorded):
    assert {"ways: low z gain", "ways: low gain"} <= set(recorded["ways"])
    assert len(set(recorded["ways"])) == len(recorded["ways"]), "a kernel that is compiled twice"


@needs_gluon
def test_the_layer_goes_the_ways_that_were_measured_on_the_card(recorded):
    assert not recorded["layer"] and "layer: low z gain" in recorded["measured"]


@needs_gluon
def test_the_probe_launches_all_variants_of_the_study(recorded):
    found, variants = recorded["probe"]
    assert found == variants


@needs_gluon
def test_what_the_race_checker_runs_is_compiled_with_the_candidates_alone(recorded):
    assert recorded["consan"] == ["consan"] * 3


@needs_gluon
def test_launchers_are_made_once_for_descriptors_of_any_block(recorded):
    launchers, signatures = recorded["launchers"]
    assert 1 < launchers < signatures
