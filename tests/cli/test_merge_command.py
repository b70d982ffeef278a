"""python -m dora_kernels merge: what is printed, where the bar is drawn, and how it ends."""

import errno
import os
import pty
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_kernels.cli import main
from dora_kernels.extras.merging import blocks
from dora_kernels.extras.merging.output import Writer
from tests.support import children
from tests.support.command_files import write_checkpoints
from tests.support.merge_problem import adapter_of, exact_merge, random, tensors_of, write_adapter, write_base

pytestmark = pytest.mark.usefixtures("heard_signals")
MERGE = ["merge", "base", "adapter", "out"]
COMMAND = [sys.executable, "-m", "dora_kernels"]
NAMES = ("layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A base of two shards, with the adapter of three of its four layers, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shapes = dict(zip((*NAMES, "norm"), ((24, 16), (40, 16), (24, 16), (16, 16)), strict=True))
    base = {name: random(*shape, seed=seed, dtype=torch.bfloat16) for seed, (name, shape) in enumerate(shapes.items())}
    weights = {f"{name}.weight": weight for name, weight in base.items()}
    write_base(tmp_path / "base", {"norm.weight": weights.pop("norm.weight")}, weights)
    adapters = [adapter_of(name, base[name], seed=5 + seed) for seed, name in enumerate(NAMES)]
    write_adapter(tmp_path / "adapter", adapters, "peft")
    return base, adapters


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_merges_and_tells_what(files, capsys, tmp_path):
    base, adapters = files
    assert main(MERGE) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0][:5] == ["layers", "N", "K", "R", "scaling"]
    assert lines[1:3] == [
        ["2", "24", "16", "4", "1.75", "float32", "float32"],
        ["1", "40", "16", "4", "1.75", "float32", "float32"],
    ]
    assert said.out.splitlines()[3] == "peft: 3 tensors merged (3 of bfloat16), 1 copied"
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert lines[4][:3] == [f"{size:,}", "bytes", "in"] and lines[4][-1] == "out" and lines[4][-2] == "MB/s:"
    assert left(tmp_path) == ["adapter", "base", "out"]
    written = tensors_of(tmp_path / "out")
    for adapter in adapters:
        exact = exact_merge(base[adapter.module], adapter)
        off = (written[f"{adapter.module}.weight"].double() - exact).norm() / exact.norm()
        assert 0 < off < 3e-3 and (base[adapter.module].double() - exact).norm() > 0.1 * exact.norm()
    assert torch.equal(written["norm.weight"], base["norm"])


def test_what_is_left_out_is_named(files, capsys, tmp_path):
    for name in ("pytorch_model.bin", "model.\x1b[31m.gguf"):
        (tmp_path / "base" / name).write_bytes(b"older weights")
    assert main(MERGE) == 0
    said = capsys.readouterr().out
    line = r"left out, being weights from before the merge: model.\x1b[31m.gguf, pytorch_model.bin"
    assert line in said.splitlines() and "\x1b" not in said
    assert not {"pytorch_model.bin", "model.\x1b[31m.gguf"} & set(left(tmp_path / "out"))


@pytest.mark.parametrize("arguments, count", [([], 0), (["--check", "2"], 2), (["--check"], 3), (["--check", "9"], 3)])
def test_a_check_is_a_line_for_each_tensor(files, capsys, arguments, count):
    assert main([*MERGE, *arguments]) == 0
    said = capsys.readouterr().out
    checked = [line for line in said.splitlines() if "of at most" in line]
    assert len(checked) == count and all(line.endswith(" ok, by PEFT in float64") for line in checked)
    for line in checked:
        name, error, *_, most = line.partition("  ok")[0].split()
        assert name.startswith("layers.") and name.endswith(".weight")
        assert 1e-4 < float(error) < float(most) < 5e-3


def test_a_wrong_tensor_is_named_and_nothing_is_written(files, capsys, monkeypatch, tmp_path):
    merge = blocks.LayerMerge.merge

    def wrong(self, block, first):
        merge(self, block, first)
        block.mul_(1.01 if "up_proj" in self.key else 1)

    monkeypatch.setattr(blocks.LayerMerge, "merge", wrong)
    assert main([*MERGE, "--check"]) == 1
    said = capsys.readouterr()
    assert said.err == "" and said.out.endswith("FAILED: out was not written\n")
    (line,) = [line for line in said.out.splitlines() if "DIFFERS" in line]
    assert line.startswith("layers.0.up_proj.weight") and 9e-3 < float(line.split()[1]) < 1.5e-2
    assert said.out.count(" ok, by PEFT in float64") == 2
    assert left(tmp_path) == ["adapter", "base"]


def test_what_is_wrong_with_the_files_is_one_line(files, capsys, tmp_path):
    base, adapters = files
    write_adapter(tmp_path / "other", [adapter_of("layers.7.q_proj", base["layers.0.q_proj"])], "peft")
    for arguments, named in (
        (["base", "other", "out"], "layers.7.q_proj"),
        (["adapter", "adapter", "out"], "adapter is an adapter"),
        (["base", "base", "out"], "base"),
        (["base", "adapter", "base"], "base exists"),
        (["base", "adapter", "base/out"], "base/out is within base"),
        (["base", "adapter", "no/out"], "out is 'no/out'"),
        (["base", "adapter", "out", "--from", "lycoris"], "lycoris"),
        (["base", "adapter", "out", "--rename", "layers", "blocks"], "blocks.0.q_proj"),
        (["base", "adapter", "out", "--alpha", "3"], "alpha"),
        (["base", "adapter", "out", "--heads", "2", "1"], "heads is (2, 1)"),
    ):
        assert main(["merge", *arguments]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("merge: ") and named in said.err and "; expected " in said.err, said.err
        assert said.err.count("\n") == 1 and said.out == ""
    assert left(tmp_path) == ["adapter", "base", "other"]


def test_its_options_reach_the_merge(files, tmp_path):
    """Names of another model, an alpha that no file says, and the rows of q_proj in torchtune's order."""
    base, adapters = files
    expected = exact_merge(base["layers.0.q_proj"], adapters[0])
    tensors = {"blocks.0.q_proj.lora_a.weight": adapters[0].lora_A, "blocks.0.q_proj.lora_b.weight": adapters[0].lora_B}
    tensors["blocks.0.q_proj.magnitude"] = adapters[0].magnitude
    # two heads of 12 rows: of each the even rows come from its first half
    order = torch.arange(24).view(2, 2, 6).transpose(1, 2).flatten()
    for name, tensor in tensors.items():
        tensors[name] = tensor if "lora_a" in name else tensor[order].contiguous()
    save_file(tensors, "tuned.safetensors")
    options = ["--from", "torchtune", "--alpha", "7", "--rename", "blocks", "layers"]
    assert main(["merge", "base", "tuned.safetensors", "out", *options]) == 2  # which rows
    assert main(["merge", "base", "tuned.safetensors", "out", *options, "--heads", "2", "1", "--check", "1"]) == 0
    assert main(["merge", "base", "tuned.safetensors", "same/", *options, "--same-rows"]) == 0
    found, same = (tensors_of(tmp_path / name)["layers.0.q_proj.weight"].double() for name in ("out", "same"))
    assert (found - expected).norm() < 3e-3 * expected.norm() < (same - expected).norm()


def test_infinite_numbers_are_merged_only_if_asked_for(files, capsys, tmp_path):
    base, adapters = files
    adapters[0].lora_B[3, 1] = float("inf")
    write_adapter(tmp_path / "wrong", adapters, "peft")
    assert main(["merge", "base", "wrong", "out"]) == 2
    assert "finite" in capsys.readouterr().err and left(tmp_path) == ["adapter", "base", "wrong"]
    assert main(["merge", "base", "wrong", "out", "--allow-nonfinite"]) == 0
    rows = tensors_of(tmp_path / "out")["layers.0.q_proj.weight"].isfinite().all(1)
    assert (~rows).nonzero().flatten().tolist() == [3]


def test_one_file_for_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_checkpoints(tmp_path)
    assert main(["merge", "base.safetensors", "adapter", "out.safetensors", "--check", "1"]) == 0
    out, base = load_file("out.safetensors"), load_file("base.safetensors")
    assert set(out) == set(base) and not torch.equal(out["a.q_proj.weight"], base["a.q_proj.weight"])
    assert "1 tensors merged (1 of float32), 0 copied" in capsys.readouterr().out


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), ids=lambda number: number.name)
def test_a_signal_leaves_nothing(number, files, monkeypatch, capsys, tmp_path):
    """In the middle of the second shard."""
    report, seen = Writer._report, []

    def stopped(self, count, name):
        report(self, count, name)
        seen.append(name)
        if name == "layers.0.up_proj.weight":
            signal.raise_signal(number)

    monkeypatch.setattr(Writer, "_report", stopped)
    assert main(MERGE) == 128 + number
    assert capsys.readouterr() == ("", f"merge: ended by {number.name}\n")
    assert "layers.0.q_proj.weight" in seen and "layers.1.q_proj.weight" not in seen
    assert left(tmp_path) == ["adapter", "base"]


def small_disk(folder):
    children.mount(folder, "size=4k")


def small_files(folder):
    children.limit_files(1000)


@pytest.mark.parametrize("prepare, said", [(small_disk, "GB free; expected"), (small_files, os.strerror(errno.EFBIG))])
def test_a_disk_that_refuses(files, capfd, tmp_path, prepare, said):
    (tmp_path / "small").mkdir()

    def work():
        torch.set_num_threads(1)  # a forked process has no others
        prepare(tmp_path / "small")
        return main([*MERGE[:3], "small/out"]), os.listdir("small")

    assert children.in_child(work) == (2, [])
    error = capfd.readouterr().err
    assert error.startswith("merge: ") and error.count("\n") == 1 and said in error and "small" in error
    assert ".partial" not in error


def test_nobody_reads_stdout_and_it_is_written_all_the_same(files, tmp_path):
    with subprocess.Popen([*COMMAND, *MERGE], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")
    assert left(tmp_path) == ["adapter", "base", "out"] and len(tensors_of(tmp_path / "out")) == 4


def test_the_bar_is_on_a_terminal_alone(files, tmp_path):
    """A name in it moves no cursor, and is not taken for rich's markup."""
    pytest.importorskip("rich")
    name = "layers.[red]\x1b[2J.0"
    weight = random(8, 6, seed=1)
    write_base(tmp_path / "odd", {f"{name}.weight": weight})
    write_adapter(tmp_path / "tuned", [adapter_of(name, weight)], "peft")
    ours, theirs = pty.openpty()

    def run(stream, out):
        os.environ.update(TERM="xterm", COLUMNS="150")
        sys.stdout = open(f"{out}.stdout", "w")
        sys.stderr = open(stream, "w")
        code = main(["merge", "odd", "tuned", f"{out}\x1b[2J"])
        sys.stdout.close()
        sys.stderr.close()
        return code

    assert children.in_child(lambda: run(theirs, "a")) == children.in_child(lambda: run("said", "b")) == 0
    for out in ("a", "b"):
        printed = (tmp_path / f"{out}.stdout").read_text()
        assert "1 tensors merged" in printed and "\x1b" not in printed
    assert not (tmp_path / "said").read_bytes()
    os.close(theirs)
    drawn = b""
    while True:
        try:
            drawn += os.read(ours, 1 << 16)
        except OSError:  # all is read
            break
    os.close(ours)
    assert rb"layers.[red]\x1b[2J.0.weight" in drawn and b"\x1b[2J" not in drawn
