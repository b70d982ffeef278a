"""Whatever is typed ends in an exit code and at most one line that says what is wrong, before torch is imported."""

import random
import re
import subprocess
import sys

import pytest
import torch

from dora_kernels.cli import adapter_options, main, streams
from dora_kernels.cli.commands import check
from dora_kernels.cli.running import EXIT_CODES
from dora_kernels.extras.convert import FORMATS
from dora_kernels.testing import suite
from tests.support.command_files import write_checkpoints

CONVERT = ("convert", "a", "b", "--from", "peft", "--to", "lycoris")
MERGE = ("merge", "a", "b", "c")
WRONG = {
    (): "dora_kernels: the following arguments are required: command",
    ("foo",): "dora_kernels: argument command: invalid choice: 'foo' (choose from ",
    ("info", "--verbose"): "info: unrecognized arguments: --verbose",
    ("check", "--dev", "cpu"): "check: unrecognized arguments: --dev cpu",  # an abbreviation
    ("check", "--way"): "check: argument --way: expected one argument",
    ("check", "--shape", "1x2x3"): "check: argument --shape: is '1x2x3'; expected tokens, out features,",
    (
        "check",
        "--shape",
        "1x1x1x999999999999",
    ): "check: shape is 1x1x1x999999999999, which takes 7.45e+03 GiB; ",
    ("check", "--shape", "99999999x99999999x99999999x1"): "check: shape is 99999999x99999999x99999999x1, which takes",
    ("check", "--shape", "1x99999999999999999999x1x1"): "check: argument --shape: is '1x99999999999999999999x1x1';",
    ("check", "--seed", str(10**23)): f"check: argument --seed: is '{10**23}'; expected an integer from 0 to ",
    ("check", "--seed", "9" * 5000): "check: argument --seed: is '9999",
    ("check", "--seed", "-1"): "check: argument --seed: is '-1'; expected an integer",
    ("check", "--dropout", "nan"): "check: argument --dropout: is 'nan'; expected a probability",
    ("check", "--device", ""): "check: argument --device: is ''; expected auto, cpu, cuda or cuda:N",
    ("check", "--device", "cpu:3"): "check: argument --device: is 'cpu:3'; expected auto,",
    ("check", "--device", "mps"): "check: argument --device: is 'mps'; expected auto,",
    ("check", "--device", "é\n"): r"check: argument --device: is 'é\n'; expected auto,",
    ("check", "--device", "cuda:99"): "check: device is 'cuda:99'; expected ",
    ("check", "--json", "no/such/file"): "check: json is 'no/such/file'; expected a file in a folder that exists",
    ("check", "--json", "."): "check: json is '.'; expected a file, not a folder",
    ("check", "--json", "a\0b"): "check: json is 'a\\x00b'; expected a path that can be",
    ("check", "--json=--"): "check: argument json: is '--'; expected a value",
    ("demo", "--steps", "nan"): "demo: argument --steps: is 'nan'; expected an integer from 1 to ",
    ("demo", "--seed", str(2**63)): f"demo: argument --seed: is '{2**63}'; expected an integer",
    ("analyze", "a"): "analyze: the following arguments are required: TUNED",
    ("analyze", "a\udcff\x1b[31m", "b"): r"analyze: a\udcff\x1b[31m is no checkpoint: it does not exist; expected",
    ("analyze", "a", "b", "--targets", "("): "analyze: argument --targets: is '(': missing ), unterminated",
    ("analyze", "a", "b", "--targets", "(" * 5000): "analyze: argument --targets: is '((((",
    ("analyze", "a", "b", "--targets", "a{99999999999}"): "analyze: argument --targets: is 'a{99999999999}': the ",
    (*CONVERT, "--to", "onnx"): "convert: argument --to: invalid choice: 'onnx' (choose from ",
    (*CONVERT, "--alpha", "1e999"): "convert: argument --alpha: is '1e999'; expected a finite number",
    (*CONVERT, "--heads", "0", "1"): "convert: argument --heads: is '0'; expected an integer from 1 to",
    (*CONVERT, "--heads", "1", "1", "--same-rows"): "convert: argument --same-rows: not allowed with argument --heads",
    (*CONVERT, "--rename", "(", ""): "convert: rename is '(', '': missing ), unterminated",
    (*CONVERT, "--rename", "a", r"\1"): r"convert: rename is 'a', '\\1': invalid group reference 1",
    CONVERT: "convert: a does not exist; expected a file or a folder",
    ("convert", "", *CONVERT[2:]): "convert: '' does not exist; expected a file or a folder",
    ("convert", ".", *CONVERT[2:], "--base", ""): "convert: '' does not exist; expected a file or a folder",
    MERGE: "merge: a does not exist; expected a file or a folder",
    MERGE[:3]: "merge: the following arguments are required: OUT",
    (*MERGE, "--from", "onnx"): "merge: argument --from: invalid choice: 'onnx' (choose from ",
    (*MERGE, "--alpha", "nan"): "merge: argument --alpha: is 'nan'; expected a finite number",
    (*MERGE, "--check", "0"): "merge: argument --check: is '0'; expected an integer from 1 to",
    (*MERGE, "--heads", "1", "x"): "merge: argument --heads: is 'x'; expected an integer from 1 to",
    (*MERGE, "--heads", "1", "1", "--same-rows"): "merge: argument --same-rows: not allowed with argument --heads",
    (*MERGE, "--rename", "(", ""): "merge: rename is '(', '': missing ), unterminated",
    ("merge", ".", "", "c"): "merge: '' does not exist; expected a file or a folder",
    ("merge", ".", ".", "."): "merge: . exists; expected a name that is free",
    ("merge", ".", ".", ""): "merge: out is ''; expected ",
    ("merge", ".", ".", "no/such/folder/"): "merge: out is 'no/such/folder'; expected a file in a folder that exists",
    ("merge", ".", ".", "a\0b"): "merge: out is 'a\\x00b'; expected a path that can be",
    ("analyze", "", "."): "analyze: '' is no checkpoint: it does not exist; expected",
}


@pytest.fixture
def ends(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder, and return its exit code and the line that it said, if any."""
    monkeypatch.chdir(tmp_path)

    def run(arguments):
        code = main(arguments)
        said = capsys.readouterr().err
        assert said.count("\n") == (code == 2) and said.endswith("\n" * (code == 2)), said
        return code, said

    return run


@pytest.mark.parametrize("arguments", WRONG, ids=lambda arguments: " ".join(arguments).encode("ascii", "replace")[:60])
def test_what_is_wrong_is_one_line(arguments, ends, tmp_path):
    code, said = ends(arguments)
    assert code == 2 and said.startswith(WRONG[arguments]) and len(said) <= streams.LONGEST_LINE + 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there(ends):
    assert ends(["check", "--device", "cuda"]) == (
        2,
        "check: device is 'cuda'; expected cpu, as torch sees no CUDA device\n",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("check", "--help"),
        ("check", "--way", "foo"),
        ("demo", "--steps", "2"),
        CONVERT,
        ("merge", ".", ".", "no/such/folder"),
        ("analyze", "a", "b"),
    ],
)
def test_torch_is_not_imported_for_it(arguments, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "dora_kernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == (0 if "--help" in arguments else 2)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "dora_kernels.cli.running" in imported and not imported & {"torch", "numpy", "rich", "transformers"}


@pytest.mark.parametrize("command", ("check", "demo", "analyze", "convert", "merge"))
def test_a_wrong_backend_in_the_environment(command, monkeypatch, ends):
    monkeypatch.setenv("DORA_KERNELS_BACKEND", "fast\n")
    arguments = {"analyze": ["a", "b"], "convert": CONVERT[1:], "merge": MERGE[1:]}.get(command, [])
    expected = rf"{command}: DORA_KERNELS_BACKEND is 'fast\n'; expected one of auto, triton, reference" + "\n"
    assert ends([command, *arguments]) == (2, expected)


def test_info_works_with_a_wrong_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("DORA_KERNELS_BACKEND", "fast")
    done = subprocess.run([sys.executable, "-m", "dora_kernels", "info"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "requested backend  DORA_KERNELS_BACKEND is 'fast'; expected one of auto," in done.stdout


def test_the_names_that_are_known_without_torch():
    assert set(check.LAYERS) == set(suite.LAYERS) and set(check.DTYPES) == set(suite.DTYPES)
    assert adapter_options.FORMATS == tuple(FORMATS)


def test_the_exit_codes_are_documented(capsys):
    assert main(["--help"]) == 0
    assert EXIT_CODES in " ".join(capsys.readouterr().out.split())


def test_analyze_overwrites_no_input(tmp_path, ends):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for name in ("model.safetensors", "./model.safetensors"):
        code, said = ends(["analyze", "model.safetensors", "model.safetensors", "--json", name])
        assert code == 2 and "which is another argument too" in said
    assert ends(["analyze", "model.safetensors", "model.safetensors", "--json", "analysis.png"])[0] == 2
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_analyze_overwrites_no_file_of_an_inputs_folder(tmp_path, ends):
    """Nor what a link in it points at, as in Hugging Face's cache."""
    pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    write_checkpoints(tmp_path)
    for name in ("base", "blobs"):
        (tmp_path / name).mkdir()
    (tmp_path / "base.safetensors").rename(tmp_path / "blobs" / "0")
    (tmp_path / "base" / "model.safetensors").symlink_to("../blobs/0")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    files = ["base/model.safetensors", "base/tokenizer.json", "blobs/0", "adapter/adapter_config.json"]
    before = [(tmp_path / name).read_bytes() for name in files]
    for name in files:
        code, said = ends(["analyze", "base", "adapter", "--json", name])
        assert code == 2 and "a file of its folder" in said
    assert [(tmp_path / name).read_bytes() for name in files] == before
    chart = ["--out", "adapter/chart.png", "--json", "base/new.json"]
    assert ends(["analyze", "base", "adapter", *chart])[0] == 0
    assert ends(["analyze", "base", "adapter", *chart[:2]])[0] == 0  # a chart is drawn again


def test_a_line_is_short_and_moves_no_cursor(capsys):
    streams.say("convert: " + "a" * 10**4 + " is \x1b[31m\r\n\u2028\udcff; expected b" + " c" * 10**4 + " d")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) <= streams.LONGEST_LINE + 1
    assert re.match(r"convert: a{133}\.\.\.a{63} is \\x1b\[31m\\r\\n\\u2028\\udcff; expected b c", said)
    assert said.endswith("c d\n")


WORDS = (
    "", "-", "--", "-1", "0", "1", "2.5", "1e400", "nan", "-inf", "9" * 30, "9" * 5000, "1x2x3x1", "0x1x1x1", "9x9",
    "1x1x1x99999999999999", "é", "\udcff", "\0", "\n", "\x1b[2J", "%s", "%(prog)s", "{}", "(", "(?P<a", "[[a]",
    "a{9999999999}", "out", "x" * 5000, "/", "/dev/null", "/dev/full", "/proc/self/mem", "folder", "no/where",
    "garbage.safetensors", "garbage.pt", "adapter", "base.safetensors", "out.png", "folder/out.png", "cpu", "cuda",
    "cuda:0", "cuda:-1", "meta", "auto", "reference", "float32", "int8", "function", "module", "split", "peft",
    "lycoris", "tiny", "nf4", "@file", "--help", "-h", "--unknown", "=",
)  # fmt: skip
OPTIONS = {
    "info": (),
    "check": (
        "--layer", "--shape", "--dtype", "--backend", "--way", "--dropout", "--device", "--seed", "--json", "--verbose",
    ),
    "demo": ("--preset", "--method", "--base", "--device", "--backend", "--steps", "--seed", "--out"),
    "analyze": ("--out", "--json", "--targets", "--fan-in-fan-out"),
    "convert": (
        "--from", "--to", "--alpha", "--base", "--no-bias", "--fold", "--rename", "--heads", "--same-rows",
        "--allow-nonfinite", "--adapter-name",
    ),
    "merge": ("--from", "--alpha", "--rename", "--heads", "--same-rows", "--allow-nonfinite", "--check"),
}  # fmt: skip
# what makes the work small, or ends a vector before it; what comes later has the last word
FIRST = {
    "check": ("--shape", "1x2x3x1", "--dtype", "float32", "--backend", "reference", "--seed", "1"),
    "convert": ("adapter", "out", "--from", "peft", "--to", "lycoris", "--no-bias"),
    "analyze": ("base.safetensors", "adapter"),
    "merge": ("base.safetensors", "adapter", "out"),
}
LAST = {"demo": ("--steps", "3")}


def vector(draw: random.Random) -> list[str]:
    """Random arguments of a random command."""
    command = draw.choice([*OPTIONS, *OPTIONS, draw.choice(WORDS)])
    first = FIRST.get(command, ())
    if command != "check":
        first = first[draw.choice((0, 2, len(first))) :]
    words = [draw.choice(WORDS) for _ in range(draw.choice((0, 0, 1, 2, 2, 3)))]
    options = OPTIONS.get(command, ("--help",))
    for option in draw.sample(options, min(len(options), draw.choice((0, 1, 1, 2, 3)))):
        joined = draw.random() < 0.2
        values = [draw.choice(WORDS) for _ in range(draw.choice((0, 1, 1, 1, 2)))]
        words += [f"{option}={draw.choice(WORDS)}"] if joined else [option, *values]
    return [command, *first, *words, *LAST.get(command, ())]


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.nightly if seed else ()) for seed in range(20)])
def test_random_arguments(seed, ends, tmp_path):
    """In a folder with two checkpoints, a folder, and two files that are no checkpoints."""
    pytest.importorskip("safetensors")
    write_checkpoints(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("garbage.safetensors", "garbage.pt"):
        (tmp_path / name).write_bytes(b"garbage" * 9)
    draw = random.Random(seed)
    codes = []
    for _ in range(400):
        arguments = vector(draw)
        try:
            codes.append(ends(arguments)[0])
        except BaseException as error:
            raise AssertionError(f"{arguments} ended in {type(error).__name__}: {error}") from error
    assert set(codes) <= {0, 1, 2} and codes.count(0) > 5
