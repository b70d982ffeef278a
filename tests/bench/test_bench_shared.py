"""bench.studies.shared: what it measures is right, and what it says is what it measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import figures
from bench.lib import siblings
from bench.lib.measure import Timing
from bench.studies import shared
from tests.support.problem import DEVICE

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
CASE = siblings.SharedCase("q, k", "fp32", 5, 3)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(siblings, "BLOCKS", {"q, k": (24, {"q_proj": 16, "k_proj": 8})})
    monkeypatch.setattr(shared, "interleave", lambda steps, *_: {way: Timing.of([2.0]) for way in steps})


@pytest.mark.parametrize("precision", siblings.PRECISIONS)
def test_a_case(small, precision):
    rows = shared.measure(siblings.SharedCase("q, k", precision, 5, 3), torch.device(DEVICE), 0)
    assert [row["way"] for row in rows] == ["apart", "shared"]
    held = [row["saved_bytes"] for row in rows]
    # autocast makes a copy of x (5, 24) for each layer, or one
    assert held[0] - held[1] == (5 * 24 * 2 if precision == "bf16-autocast" else 0)


@pytest.mark.parametrize("fused", (False, True))
def test_a_way_that_does_not_do_what_its_name_says_is_not_timed(small, fused, monkeypatch):
    enabled = siblings.SharedProblem.enabled
    monkeypatch.setattr(siblings.SharedProblem, "enabled", lambda self, _: enabled(self, fused))
    with pytest.raises(RuntimeError, match=f"was shared {int(fused)} times"):
        shared.measure(CASE, torch.device(DEVICE), 0)


@pytest.mark.parametrize("name", ("y1", "dx", "k_proj.lora_A"))
def test_wrong_numbers_are_not_timed(small, name, monkeypatch):
    step = siblings.SharedProblem.step

    def wrong(self, model):
        results = step(self, model)
        off = 1 if model is self.model else 1.001
        return {key: value * off if name in key else value for key, value in results.items()}

    monkeypatch.setattr(siblings.SharedProblem, "step", wrong)
    with pytest.raises(RuntimeError, match=f"apart: .*{name}.*: error"):
        shared.measure(CASE, torch.device(DEVICE), 0)


WITHOUT_RICH = """
import sys
sys.modules["rich"] = None
from bench.studies import decisive, probe
from bench.lib import siblings
from bench import kernels, layer, model
print(siblings.LLAMA)
"""


@pytest.mark.nightly
def test_what_runs_on_a_gpu_needs_no_rich():
    done = subprocess.run([sys.executable, "-c", WITHOUT_RICH], text=True, capture_output=True, cwd=ROOT)
    assert done.stdout.strip() == str(siblings.LLAMA), done.stderr


def test_the_tables(tmp_path):
    rows = [
        {"block": "q, k", "precision": "fp32", "M": 5, "R": 3, "way": way, "ms": {"median": ms},
         "saved_bytes": held << 20, "peak_bytes": 2 * held << 20}
        for way, ms, held in (("apart", 4.0, 3), ("shared", 3.0, 2))
    ]  # fmt: skip
    text = shared.section({"here": rows})
    assert "| q, k | fp32 | 5 | 3 | 4 ms | 3 ms | 0.75 | 3.0 and 2.0 MiB | 6.0 and 4.0 MiB |" in text
    assert text.startswith("here:") and "none of it measured" in text
    assert "here" not in shared.section({})


def test_less_is_predicted_where_weights_are_narrow():
    device = shared.costs.DEVICES["NVIDIA H200"]
    narrow, wide = (
        shared.predicted(8192, 4096, widths, 64, device) for widths in ((4096, 1024, 1024), (4096, 4096, 4096))
    )
    assert narrow[1] / narrow[0] < wide[1] / wide[0] < 1


def test_markers_have_names():
    text = f"<!-- a b: begin --> old <!-- a b: end --> {figures.BEGIN} kept {figures.END}"
    replaced = figures.replaced(text, "new", "a b")
    assert replaced == f"<!-- a b: begin -->\nnew\n<!-- a b: end --> {figures.BEGIN} kept {figures.END}"
