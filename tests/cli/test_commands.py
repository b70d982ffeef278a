"""The commands, and the demo at a size that takes a second: it passes, and it notices what it promises to."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from dora_kernels import adapters, pytorch
from dora_kernels.cli import main
from dora_kernels.extras import demo
from tests.support.micro_demo import MICRO


@pytest.fixture
def run_micro(monkeypatch, tmp_path, capsys):
    """Run the demo at a preset (MICRO), on the CPU, and return its exit status, what it printed and its chart."""

    def run(preset: demo.Preset = MICRO, device: str = "cpu", base: str = "dense", chart: str = "chart.png"):
        monkeypatch.setitem(demo.PRESETS, "micro", preset)
        chart = tmp_path / chart
        status = main(["demo", "--preset", "micro", "--device", device, "--base", base, "--out", str(chart)])
        return status, capsys.readouterr().out, chart

    return run


def test_info_names_versions_devices_and_backend(capsys):
    assert main(["info"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    rows = {key: value for key, value in lines}
    assert rows["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert rows["device"] == "cpu"  # the last device listed
    assert rows["auto"].startswith("picks") and "reference: " in rows["auto"]


def test_info_needs_torch_alone():
    code = """
import importlib.metadata, sys
for name in ("triton", "peft", "transformers", "rich", "matplotlib"):
    sys.modules[name] = None  # import raises ImportError
installed = importlib.metadata.version
def version(name):
    if name in ("triton", "peft"):
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)
importlib.metadata.version = version
from dora_kernels.cli import main
sys.exit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["triton", "not", "installed"] in rows
    assert ["peft", "not", "installed"] in rows
    assert done.stdout.rstrip().endswith("reference: triton is not installed")


def test_demo_passes(run_micro):
    status, printed, chart = run_micro()
    assert status == 0, printed
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "7 of 7" in printed
    assert printed.count("84 of 84") == 2
    assert "FAILED" not in printed


def test_demo_takes_any_name_for_its_chart(run_micro):
    """rich reads [red] as a colour, and a terminal would obey the other."""
    status, printed, chart = run_micro(chart="[red] \x1b[2J.png")
    assert status == 0 and chart.read_bytes().startswith(b"\x89PNG")
    assert r"[red] \x1b[2J.png" in printed and "\x1b" not in printed


@pytest.mark.parametrize("base, bits", [("dense", "32.00 bits"), ("nf4", "5.79 bits")])
def test_demo_says_what_the_base_weighs(run_micro, base, bits):
    """4 bits a weight and 8 for a block of 64; and 1 KiB of tables a layer, which counts in layers of this size."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    status, printed, _ = run_micro(replace(MICRO, hidden=64, intermediate=128), base=base)
    assert status == 0, printed
    (line,) = [line for line in printed.splitlines() if "frozen linear weights" in line]
    assert f"MiB, {bits}" in line
    assert printed.count("84 of 84") == 2 and ("NF4" in printed) == (base == "nf4")


def test_demo_fails_when_no_layer_is_taken_over(run_micro, monkeypatch):
    monkeypatch.setattr(adapters, "enable", lambda model: adapters.ModelReport())
    status, printed, _ = run_micro()
    assert status == 1
    assert "expected 7 DoRA layers to be taken over; no DoRA layer found" in printed
    assert "the forward op ran 0 times; expected 84" in printed
    assert "the backward op ran 0 times; expected 84" in printed


def test_demo_fails_when_a_layer_goes_back_to_peft(run_micro, monkeypatch):
    enable = adapters.enable

    def enable_and_hook(model):
        report = enable(model)
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A.default")
        layer.register_forward_hook(lambda *_: None)  # must be called from now on, so PEFT computes the layer
        return report

    monkeypatch.setattr(adapters, "enable", enable_and_hook)
    status, printed, _ = run_micro()
    assert status == 1
    assert "the forward op ran 72 times; expected 84" in printed
    assert "to be taken over" not in printed


def test_demo_fails_when_the_losses_differ(run_micro, monkeypatch):
    enable = adapters.enable

    def enable_and_scale(model):
        report = enable(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_magnitude_vector" in name:
                    parameter.mul_(1.01)
        return report

    monkeypatch.setattr(adapters, "enable", enable_and_scale)
    status, printed, _ = run_micro()
    assert status == 1
    assert "the losses differ by" in printed
    assert "op ran" not in printed


def test_demo_fails_when_nothing_is_learned(run_micro):
    status, printed, _ = run_micro(replace(MICRO, rate=0.0))
    assert status == 1
    assert printed.count("lora_B of some layer is still zero") == 2  # once for either run


def test_demo_fails_when_the_loss_rises(run_micro, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, maximize=True))
    status, printed, _ = run_micro()
    assert status == 1
    assert printed.count("the loss went from") == 2


@pytest.mark.parametrize(
    "arguments, message",
    (
        (("--preset", "huge"), "demo: preset is 'huge'; expected one of tiny, llama-1b"),
        (("--base", "int3"), "demo: base is 'int3'; expected one of dense, nf4"),
        (("--device", "tpu"), "demo: device is 'tpu'; expected auto, cpu or cuda"),
        (("--steps", "3"), "demo: steps is 3; expected more than 3, the warm-up"),
        (("--out", "no/such/folder.png"), "demo: out is 'no/such/folder.png'; expected a file in a folder"),
        (("--out", "chart.xyz"), "demo: out is 'chart.xyz'; expected a name that ends in .png"),
    ),
)
def test_demo_refuses_settings(capsys, arguments, message):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_demo_over_nf4_needs_bitsandbytes(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--base", "nf4"]) == 2
    assert "expected pip install bitsandbytes" in capsys.readouterr().err


def test_demo_names_the_extra_it_needs(monkeypatch, capsys):
    from dora_kernels import extras

    monkeypatch.delattr(extras, "demo")
    for name in [name for name in sys.modules if name.startswith("dora_kernels.extras.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 2
    assert "pip install 'dora-kernels[demo]'" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_demo_passes_on_a_gpu(run_micro):
    status, printed, _ = run_micro(device="cuda")
    assert status == 0, printed
    assert "peak GPU memory" in printed


@pytest.mark.nightly
def test_demo_passes_at_its_default_size(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dora_kernels", "demo", "--device", "cpu", "--out", str(tmp_path / "chart.png")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1680 of 1680" in done.stdout


class TestCheck:
    """python -m dora_kernels check."""

    SMALL = ("--shape", "5x12x10x3", "--dtype", "float32", "bfloat16-float32")

    @pytest.mark.parametrize("layer", ("function", "module", "peft"))
    def test_passes_and_writes_json(self, layer, tmp_path, capsys):
        path = tmp_path / "check.json"
        backends = ("--backend", "reference", "triton")
        assert main(["check", "--layer", layer, *self.SMALL, *backends, "--json", str(path)]) == 0
        assert capsys.readouterr().out.rstrip().endswith("4 of 4 cases ok")
        content = json.loads(path.read_text())
        assert content["meta"]["torch"] and [case["ok"] for case in content["cases"]] == [True] * 4
        row = content["cases"][0]["rows"][0]
        assert row["tensor"] == "y" and 0 < row["error"] <= row["limit"] < 1e-6

    def test_a_wrong_result_is_status_1_and_shows_a_table(self, monkeypatch, capsys):
        gain_of = pytorch.gain_of
        monkeypatch.setattr(pytorch, "gain_of", lambda *arguments: gain_of(*arguments) * 1.001)
        assert main(["check", "--layer", "function", *self.SMALL[:3], "float32", "--backend", "reference"]) == 1
        printed = capsys.readouterr().out
        assert "rms error above" in printed and printed.rstrip().endswith("0 of 1 cases ok")

    def test_an_error_in_a_case_is_a_failure_of_one_line(self, monkeypatch, capsys):
        """As of a kernel that the installed Triton cannot run; the other cases are checked all the same."""

        def gain_of(magnitude, norm):
            raise RuntimeError("mask has unsupported dtype")

        monkeypatch.setattr(pytorch, "gain_of", gain_of)
        backends = ("--backend", "reference", "triton")
        assert main(["check", "--layer", "function", *self.SMALL[:3], "float32", *backends]) == 1
        printed = capsys.readouterr().out
        assert "FAILED: RuntimeError: mask has unsupported dtype" in printed and "Traceback" not in printed
        assert printed.rstrip().endswith("1 of 2 cases ok")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        (
            (
                ("--shape", "5x12x10"),
                "check: argument --shape: is '5x12x10'; expected tokens, out features",
            ),
            (("--dtype", "int8"), "check: argument --dtype: invalid choice: 'int8' (choose from "),
        ),
    )
    def test_bad_arguments_are_status_2(self, arguments, message, capsys):
        assert main(["check", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_the_interpreter_is_turned_on_in_time(self):
        """From a shell without TRITON_INTERPRET, for PEFT too, which imports triton."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        small = ["--shape", "5x12x10x3", "--dtype", "bfloat16", "--backend", "triton", "--device", "cpu"]
        command = [sys.executable, "-m", "dora_kernels", "check", "--layer", "peft", *small]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "1 of 1 cases ok" in done.stdout, done.stderr
