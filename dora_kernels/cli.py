"""The command line: python -m dora_kernels <command>.

A command is one `_add_<command>` function, listed in COMMANDS, which declares its arguments and the function that
runs it. A command imports what it needs beyond torch when it runs: `info` has to work where nothing else does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dora_kernels import __version__
from dora_kernels.planning import devices
from dora_kernels.planning.options import BACKENDS, WAYS, current_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 if the command's own checks failed, or 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="python -m dora_kernels", description="Fast DoRA linear layers.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, devices, and which backend each device gets and why")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    rows = [("dora_kernels", __version__), ("python", platform.python_version())]
    rows += [(name, _version(name)) for name in ("torch", "triton", "peft")]
    rows.append(("requested backend", current_options().backend))
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in [*cards, torch.device("cpu")]:
        facts = devices.device_facts(device)
        name = str(device) if facts.name == str(device) else f"{device} ({facts.name})"
        rows.append(("device", name))
        rows.append(("  target", facts.target or "none"))
        rows.append(("  auto picks", _auto_picks(device)))
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}")
    return 0


def _auto_picks(device: torch.device) -> str:
    """The backend that "auto" takes for bfloat16 tensors on `device`, with the reason."""
    backend = devices.backend_for("auto", device, torch.bfloat16)
    if backend == "triton":
        return "triton: the kernels are built for this device"
    reason = devices.why_not_triton(device, (torch.bfloat16,))
    return f"reference: {reason or 'Triton would interpret its kernels here, for tests only'}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="fine-tune a small Llama with PEFT DoRA twice, stock and enabled, and compare the runs"
    )
    parser.add_argument("--preset", default="tiny", help="model size: tiny, llama-1b (default: %(default)s)")
    parser.add_argument("--method", default="dora", help="dora, dvora (DoRA on VeRA) (default: %(default)s)")
    parser.add_argument("--base", default="dense", help="frozen weights: dense, nf4 (QDoRA) (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="fine-tuning steps of each run (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--out", default="demo.png", help="where the chart goes (default: %(default)s)")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from dora_kernels.extras import demo
    except ModuleNotFoundError as error:
        print(f"demo: {error}; expected the demo extra: pip install 'dora-kernels[demo]'", file=sys.stderr)
        return 2
    options = {key: value for key, value in vars(arguments).items() if key != "run"}
    try:
        settings = demo.Settings(**options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return demo.run(settings)


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check", help="prove on this machine that outputs and gradients are those of the definition in float64"
    )
    add = parser.add_argument
    add("--layer", nargs="+", default=["function"], choices=("function", "module", "peft"), help="default: function")
    add("--shape", nargs="+", metavar="MxNxKxR", help="tokens, out and in features, rank (default: a few ragged ones)")
    add("--dtype", nargs="+", help="float32, bfloat16, float16, bfloat16-float32: weight and adapter (default: all)")
    add("--backend", nargs="+", choices=BACKENDS, help="default: reference, and triton where there is one")
    add("--way", default="auto", choices=WAYS, help="default: %(default)s")
    add("--dropout", type=float, default=0.0, help="of module and peft (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda or auto; on a CPU Triton interprets its kernels (default: auto)")
    add("--seed", type=int, default=0, help="of the random inputs (default: %(default)s)")
    add("--json", help="where every error and verdict goes")
    add("--verbose", action="store_true", help="a table for every case, not only for those that failed")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = arguments.backend or ["reference", "triton"][: 1 + devices.has_triton()]
    try:
        if device == "cpu" and "triton" in backends:
            devices.interpret_on_cpu()  # before anything that imports triton, as peft does
        from dora_kernels.testing import suite

        cases = suite.cases(
            arguments.layer,
            arguments.shape or suite.SHAPES,
            arguments.dtype or suite.DTYPES,
            backends,
            way=arguments.way,
            dropout=arguments.dropout,
            device=device,
            seed=arguments.seed,
        )
        return suite.run(cases, arguments.json, arguments.verbose)
    except (ValueError, ImportError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2


def _add_analyze(commands: Any) -> None:
    parser = commands.add_parser(
        "analyze", help="how far fine-tuning moved each layer in magnitude and in direction: the DoRA paper's figure 2"
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="the pretrained model: a safetensors file, or a folder of a model's checkpoint")
    add("tuned", metavar="TUNED", nargs="+", help="PEFT adapter folders (LoRA, DoRA), or dense checkpoints")
    add("--out", default="analysis.png", help="where the scatter goes (default: %(default)s)")
    add("--json", help="where every point, the lines and what was left out go")
    add("--targets", metavar="REGEX", help="only layers in whose name this is found (default: all)")
    add("--fan-in-fan-out", action="store_true", help="dense weights are (in, out), as GPT-2's")
    parser.set_defaults(run=_analyze)


def _analyze(arguments: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401  (before the work, not after it)
        import safetensors  # noqa: F401

        from dora_kernels.extras import analysis
    except ModuleNotFoundError as error:
        print(f"analyze: {error}; expected the demo extra: pip install 'dora-kernels[demo]'", file=sys.stderr)
        return 2
    try:
        for name, path in (("out", arguments.out), ("json", arguments.json)):
            if path is not None and not pathlib.Path(path).absolute().parent.is_dir():
                raise ValueError(f"analyze: {name} is {path!r}; expected a file in a folder that exists")
        if pathlib.Path(arguments.out).suffix != ".png":
            raise ValueError(f"analyze: out is {arguments.out!r}; expected a name that ends in .png")
        options = {"targets": arguments.targets, "fan_in_fan_out": arguments.fan_in_fan_out}
        result = analysis.analyze(arguments.base, arguments.tuned, **options, track=_progress)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(result)
    if arguments.json is not None:
        content = {"base": arguments.base} | result.to_json()
        pathlib.Path(arguments.json).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    analysis.draw(result, arguments.out, f"against {arguments.base}")
    print(f"Chart: {arguments.out}")
    return 0


def _progress(layers: Sequence[Any]) -> Iterable[Any]:
    """The layers one by one, with a bar on stderr if rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return layers
    return track(layers, "measuring layers", console=Console(stderr=True), transient=True)


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert", help="write a DoRA checkpoint in another library's format, to the last bit or not at all"
    )
    names = "peft, torchtune, nvlabs, llava, fsdp_qlora, lycoris, megatron-bridge, automodel, dora_kernels"
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a .safetensors, .bin or .pt file, or a folder with adapter_config.json")
    add("out", metavar="OUT", help="what is written: safetensors, in a folder where the format has adapter_config.json")
    add("--from", dest="source_format", required=True, metavar="FORMAT", help=names)
    add("--to", dest="target_format", required=True, metavar="FORMAT", help="the same")
    add("--alpha", type=float, help="where the source does not say it; scaling is alpha / R")
    add("--base", help="the model's safetensors, a file or a folder: looked through for biases")
    add("--no-bias", action="store_true", help="no adapted layer has a bias, which some libraries' gain multiplies")
    add("--fold", action="store_true", help="round scaling * lora_B where the target cannot hold scaling exactly")
    add("--rename", nargs=2, action="append", default=[], metavar=("PATTERN", "WITH"), help="re.sub on module names")
    add("--heads", nargs=2, type=int, metavar=("Q", "KV"), help="torchtune: reorder the rows of q_proj and k_proj")
    add("--same-rows", action="store_true", help="torchtune: this model's q_proj and k_proj need no reordering")
    add("--adapter-name", default="default", help="written by llava (default: %(default)s)")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    try:
        from dora_kernels.extras.convert import convert_checkpoint, table
    except ModuleNotFoundError as error:
        print(f"convert: {error}; expected the convert extra: pip install 'dora-kernels[convert]'", file=sys.stderr)
        return 2
    options = {key: value for key, value in vars(arguments).items() if key != "run"}
    try:
        adapters = convert_checkpoint(**options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(adapters))
    print(f"{arguments.source_format} to {arguments.target_format}: {len(adapters)} layers in {arguments.out}")
    return 0


COMMANDS = (_add_info, _add_demo, _add_check, _add_analyze, _add_convert)
