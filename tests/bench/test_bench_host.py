"""bench.host: every row has a time and its launches, counted over a driver that launches nothing; costs.py's are those.

In processes of their own: there Triton compiles, where the other tests interpret.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import host
from bench.lib import host_cases, host_driver, host_instructions, host_layers, host_measure, host_tables
from dora_kernels.planning import configs, costs, devices
from dora_kernels.planning.tiles import CONFIGS

ROOT = Path(__file__).parents[2]
H100 = costs.device_model(host_driver.H100)
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc builds the driver")

COUNT = """
import json, sys
import torch
import dora_kernels
from bench import host
from bench.lib import host_driver

assert host.main(["--seconds", "1", "--out", sys.argv[1]]) == 0

from bench.lib import host_layers, host_measure  # the driver is loaded before PEFT is imported

driver, counts = host_driver.loaded(), {}
for way in ("split", "merged"):
    problem = host_layers.problem_of("bf16")
    layer = host_layers.function(problem)
    with host_driver.pretended_gpu(host_layers.PLANNED["training"]), dora_kernels.options(way=way):
        for name in ("inference", "forward", "forward+backward"):
            step = host_layers.step_of(layer, problem, name)
            step()
            counts[f"{way} {name}"] = driver.launches(step), len(host_measure.library_launches(step))

from bench.lib.problem import LayerProblem
from bench.lib.shapes import LayerCase

for R in (16, 384):
    problem = LayerProblem.random(LayerCase(host_layers.M, host_layers.N, host_layers.K, R, "bf16"))
    step = host_layers.step_of(host_layers.function(problem), problem, "forward+backward")
    with host_driver.pretended_gpu(host_layers.PLANNED["training"]):
        step()
        launchers = host_measure._launchers(step)
        with torch.no_grad():  # as in our operators
            counts[f"launchers, R = {R}"] = [
                (name, driver.launches(launcher), host_measure.library_launches(launcher))
                for name, launcher in launchers
            ]
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What one run writes, and the launches of dora_linear each way: of Triton's, of the library's."""
    out = tmp_path_factory.mktemp("host") / "host.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT, str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()) | {"printed": done.stdout, "ways": json.loads(done.stdout.splitlines()[-1])}


@needs_gcc
def test_every_row_has_a_time(measured):
    rows = {(row["case"], row["provider"], row["step"]): row for row in measured["rows"]}
    assert len(rows) == len(measured["rows"])
    expected = {
        (name, provider, step)
        for name, case in host_cases.CASES.items()
        for provider in case.providers
        for step in itertools.chain(*(host_layers.STEPS[kind] for kind in case.kinds))
        if step != "inference in frozen_adapters" or provider in ("DoraLinear", "enabled PEFT layer")
    }
    assert set(rows) == expected
    for key, row in rows.items():
        assert 0 < row["least_us"] <= row["us"] < 1e6 and row["readings"] >= 5, key
        assert (row["triton"] > 0) == (row["provider"] in host_layers.OURS), key
    # a table of the same rows
    assert sum(line.lstrip().startswith(tuple(host_cases.CASES)) for line in measured["printed"].splitlines()) >= len(
        rows
    )


@needs_gcc
@pytest.mark.parametrize("provider", host_layers.OURS)
def test_launches_of_a_training_step(measured, provider):
    """bf16: norm, low, base, epilogue; W', dx, token_sums, P, dA. autocast: lora_A, lora_B cast twice. NF4: decoded."""
    expected = {"bf16": (7, ["mm"] * 2), "bf16-autocast": (7, ["_to_copy"] * 4 + ["mm"] * 2)}
    if "nf4" in host_cases.CASES and provider != "dora_linear":
        expected["nf4"] = 8, ["mm"] * 2
    counts = {
        row["case"]: (row["triton"], sorted(row["library"]))
        for row in measured["rows"]
        if row["provider"] == provider and row["step"] == "forward+backward" and row["case"] in expected
    }
    assert counts == expected


@needs_gcc
def test_the_launchers_of_a_training_step(measured):
    launchers = [row for row in measured["meta"]["launchers"] if row["case"] == "bf16"]
    counts = {row["launcher"]: row["launches"] for row in launchers}
    assert counts == dict.fromkeys(("start_norm", "epilogue", "token_sums", "project", "outer_product", "merge"), 1)
    for row in launchers:
        assert 0 < row["kernel_us"] < row["jit_us"] and 0 < row["us"], row


@needs_gcc
@pytest.mark.parametrize(("way", "dx"), (("split", "dz"), ("merged", "merged")))
def test_the_planner_counts_the_launches(measured, way, dx):
    def launches(steps: dict[str, costs.Cost]) -> int:
        return sum(step.launches for step in steps.values())

    shape, ways = host_layers.PLANNED["training"], ("split", "merged")
    counted = {name: sum(both) for name, both in measured["ways"].items() if name.startswith(ways)}
    assert counted[f"{way} inference"] == launches(costs.forward_costs(shape, way, H100))
    backward = counted[f"{way} forward+backward"] - counted[f"{way} forward"]
    assert backward == launches(costs.backward_costs(shape, dx, H100))
    reused = [
        row
        for row in measured["rows"]
        if row["step"] == "inference in frozen_adapters" and row["case"] in ("bf16", "bf16-autocast")
    ]
    assert reused and all(
        row["triton"] + row["library"].count("mm")
        == launches(costs.forward_costs(shape, "split", H100, norm_given=True))
        for row in reused
    )


@needs_gcc
@pytest.mark.parametrize("R", (16, 384))
def test_the_planner_counts_the_launches_of_each_step(measured, R):
    """By the kernels, and at R = 384 by the GEMM library."""
    counted: dict[str, list[int]] = {}
    for name, by_kernel, library in measured["ways"][f"launchers, R = {R}"]:
        # on a GPU the library rounds what it sums for token_sums to float32 by itself
        library = [one for one in library if name != "token_sums" or one != "_to_copy"]
        counted.setdefault(name, []).append(by_kernel + len(library))
    steps = costs.backward_costs(costs.Shape(8192, 4096, 4096, R, 2), "merged", H100)
    planned = {name: step.launches for name, step in steps.items()}
    assert ("dB" in planned) == (R == 384)
    assert counted["project"][1:] == [planned["P"]]  # the first is low, of the forward pass
    assert counted["outer_product"] == [planned["dA"]]
    assert counted["token_sums"] == [planned["token_sums"] + planned.get("dB", 0)]


def test_sums_are_in_parts_as_at_real_sizes():
    """Else their partial sums would cost the host nothing."""
    tiles = CONFIGS["sm_90", 2]["project"]
    for M, N in ((host_layers.M, host_layers.N), (8192, 4096)):
        blocks, steps = configs.ceil_div(M, tiles.BLOCK_M), configs.ceil_div(N, tiles.BLOCK_K)
        programs = configs.programs(blocks, steps, host_driver.H100.multiprocessors * tiles.waves, True)
        assert configs.most_parts(blocks, steps, programs) > 1, (M, N)


def test_what_counts_as_a_launch():
    x, factor = torch.ones(4, 4), torch.ones(4)

    def step():
        torch.promote_types(x.dtype, torch.bfloat16)
        y = torch.empty_like(x).copy_(x).T[1:].detach()
        return torch.addmm(factor, y, x).sum(0), x.to(x.dtype), x.to(torch.bfloat16)

    assert host_measure.library_launches(step) == ["copy_", "addmm", "sum", "_to_copy"]


def test_reading_counts(tmp_path):
    for at, (description, total) in enumerate(
        (
            ('Client Request: ["nf4", "PEFT DoRA", "inference in frozen_adapters", 10]', 45670),
            ('Client Request: ["bf16", "nn.Linear", "forward", 2]', 30),
            ("Program termination", 9),
        )
    ):
        text = f"creator: callgrind\ndesc: Trigger: {description}\n\nevents: Ir\nsummary: 1\n\ntotals: {total}\n"
        tmp_path.joinpath(f"counts.{at}").write_text(text)
    assert host_instructions.read(tmp_path) == {
        ("nf4", "PEFT DoRA", "inference in frozen_adapters"): 4567,
        ("bf16", "nn.Linear", "forward"): 15,
    }


@needs_gcc
@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind counts")
def test_counting_instructions():
    """Some 40 seconds a run: all of torch and PEFT is loaded under valgrind."""
    providers = ("nn.Linear", "PEFT LoRA", "PEFT DoRA")
    once, again = (host_instructions.count(("checkpointed", "bias"), providers, 8192) for _ in range(2))
    assert len(once) == len(providers) * (2 + 3) and once.keys() == again.keys()
    for key, count in once.items():
        assert count == pytest.approx(again[key], rel=0.01), key
    for case, step in {(case, step) for case, _, step in once}:
        counts = [once[case, provider, step] for provider in providers]
        assert counts == sorted(counts), (case, step, counts)
    # with the arithmetic of its product 900,000
    assert 10_000 < once["bias", "nn.Linear", "forward"] < 200_000


def test_tables():
    """Over PEFT's DoRA in the same step; that of inference in a scope, where it reuses nothing."""
    of = {"case": "bf16", "triton": 1, "library": ["mm"], "readings": 5}
    rows = [
        of | {"provider": provider, "step": step, "us": us, "least_us": us - 1, "instructions": instructions}
        for provider, step, us, instructions in (
            ("PEFT DoRA", "inference", 200.0, 8e5),
            ("DoraLinear", "inference", 100.0, 6e5),
            ("DoraLinear", "inference in frozen_adapters", 50.0, None),
        )
    ]
    printed = [line.split() for line in host_tables.table(rows).splitlines()]
    assert printed[2] == "bf16 inference DoraLinear 100 99 0.50 600k 0.75 1 1".split()
    assert printed[3] == "bf16 inference in frozen_adapters DoraLinear 50 49 0.25 - - 1 1".split()
    lines = host_tables.markdown(rows).splitlines()
    assert lines[2] == "| bf16 | inference | 200 (1.00; 1.00) | 100 (0.50; 0.75) | 2 |"
    assert lines[3] == "| bf16 | inference in frozen_adapters |  | 50 (0.25) |  |"


@pytest.mark.parametrize("lacking", ("gcc", "compiler"))
def test_what_is_lacking_is_said_in_one_line(lacking, monkeypatch, capsys):
    monkeypatch.setattr(host_driver.shutil, "which", lambda name: None if lacking == "gcc" else f"/usr/bin/{name}")
    monkeypatch.setattr(devices, "interpreting", lambda: lacking == "compiler")
    assert host.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("gcc" if lacking == "gcc" else "TRITON_INTERPRET") in said
