"""The demo with --method dvora, at a size that takes a second: it passes, and it notices what it promises to."""

import pytest

from dora_kernels.cli import main
from dora_kernels.extras import demo
from dora_kernels.extras.demo import dvora
from tests.support.micro_demo import MICRO


@pytest.fixture
def run_micro(monkeypatch, tmp_path, capsys):
    """Run the demo at MICRO, on the CPU, and return its exit status and what it printed."""

    def run(base: str = "dense"):
        monkeypatch.setitem(demo.PRESETS, "micro", MICRO)
        chart = str(tmp_path / "chart.png")
        arguments = ("--preset", "micro", "--device", "cpu", "--method", "dvora", "--base", base, "--out", chart)
        return main(["demo", *arguments]), capsys.readouterr().out

    return run


@pytest.mark.parametrize("base", ("dense", "nf4"))
def test_demo_passes(run_micro, base):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    status, printed = run_micro(base)
    assert status == 0, printed
    assert "DVoRA rank 48" in printed and "7 of 7" in printed and printed.count("84 of 84") == 2


def test_demo_fails_when_the_losses_differ(run_micro, monkeypatch):
    definition = dvora.dvora_linear_ref
    monkeypatch.setattr(dvora, "dvora_linear_ref", lambda *a: 1.01 * definition(*a))
    status, printed = run_micro()
    assert status == 1
    assert "FAILED the losses differ" in printed


def test_demo_fails_when_a_layer_is_not_ours(run_micro, monkeypatch):
    convert = dvora.to_dvora

    def convert_and_leave_one(model):
        layers = [layer for layer in convert(model).modules() if type(layer) is dvora.DvoraVeraLinear]
        layers[0].__class__ = dvora.DefinitionLinear
        return model

    monkeypatch.setattr(dvora, "to_dvora", convert_and_leave_one)
    status, printed = run_micro()
    assert status == 1
    assert "the rescale op ran 72 times; expected 84" in printed


def test_demo_refuses_an_unknown_method(capsys):
    assert main(["demo", "--method", "lora"]) == 2
    assert "demo: method is 'lora'; expected one of dora, dvora" in capsys.readouterr().err
