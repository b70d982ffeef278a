"""convert: a DoRA checkpoint in another library's format."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dora_kernels.cli import stopping
from dora_kernels.cli.arguments import integer, number, why_no_substitution
from dora_kernels.files.reading import printable

FORMATS = (
    "peft",
    "torchtune",
    "nvlabs",
    "llava",
    "fsdp_qlora",
    "lycoris",
    "megatron-bridge",
    "automodel",
    "dora_kernels",
    "comfy",
    "diffusers",
    "ai-toolkit",
)


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "convert", help="write a DoRA checkpoint in another library's format, to the last bit or not at all"
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a .safetensors, .bin or .pt file, or a folder with adapter_config.json")
    add("out", metavar="OUT", help="what is written: safetensors, in a folder where the format has adapter_config.json")
    formats = {"choices": FORMATS, "metavar": "FORMAT"}
    add("--from", dest="source_format", help=f"{', '.join(FORMATS)} (default: the one that fits)", **formats)
    add("--to", dest="target_format", help="the same", required=True, **formats)
    add("--alpha", type=number("a finite number"), help="where the source does not say it; scaling is alpha / R")
    add("--base", help="the model's safetensors, a file or a folder: for biases, and kohya's names")
    add("--no-bias", action="store_true", help="no adapted layer has a bias, which some libraries' gain multiplies")
    add("--fold", action="store_true", help="round scaling * lora_B where the target cannot hold scaling exactly")
    add("--rename", nargs=2, action="append", metavar=("PATTERN", "WITH"), help="re.sub on module names")
    rows = parser.add_mutually_exclusive_group()
    heads = integer(1, 2**31 - 1)
    rows.add_argument(
        "--heads", nargs=2, type=heads, metavar=("Q", "KV"), help="torchtune: reorder the rows of q_proj and k_proj"
    )
    rows.add_argument(
        "--same-rows", action="store_true", help="torchtune: this model's q_proj and k_proj need no reordering"
    )
    add("--allow-nonfinite", action="store_true", help="convert NaN and infinite values too")
    add("--adapter-name", default="default", help="written by llava (default: %(default)s)")
    parser.set_defaults(run=run, extra="convert")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print a table of the layers. Returns 0."""
    arguments.rename = arguments.rename or []
    for pattern, replacement in arguments.rename:
        if reason := why_no_substitution(pattern, replacement):
            raise ValueError(f"rename is {pattern!r:.80}, {replacement!r:.80}: {reason}; expected what re.sub takes")
    for path in (arguments.source, arguments.base):
        if path is not None and not os.path.exists(path):
            raise ValueError(f"{path or repr(path)} does not exist; expected a file or a folder")
    if os.path.lexists(arguments.out):
        raise ValueError(f"{arguments.out} exists; expected a name that is free")

    from dora_kernels.extras.convert import table
    from dora_kernels.extras.convert.checkpoint import converted

    options = {key: value for key, value in vars(arguments).items() if key not in ("run", "command", "extra")}
    with stopping.unwinding():
        source_format, adapters = converted(**options)
    print(table(adapters))
    formats = f"{source_format} to {arguments.target_format}"
    print(f"{formats}: {len(adapters)} layers in {printable(arguments.out)}")
    return 0
