"""convert: a DoRA checkpoint in another library's format."""

from __future__ import annotations

import argparse
from typing import Any

from dora_kernels.cli import adapter_options, stopping
from dora_kernels.files.reading import printable


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "convert", help="write a DoRA checkpoint in another library's format, to the last bit or not at all"
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a .safetensors, .bin or .pt file, or a folder with adapter_config.json")
    add("out", metavar="OUT", help="what is written: safetensors, in a folder where the format has adapter_config.json")
    adapter_options.add(parser)
    formats = {"choices": adapter_options.FORMATS, "metavar": "FORMAT"}
    add("--to", dest="target_format", help="one of the same", required=True, **formats)
    add("--base", help="the model's safetensors, a file or a folder: for biases, and kohya's names")
    add("--no-bias", action="store_true", help="no adapted layer has a bias, which some libraries' gain multiplies")
    add("--fold", action="store_true", help="round scaling * lora_B where the target cannot hold scaling exactly")
    add("--adapter-name", default="default", help="written by llava (default: %(default)s)")
    parser.set_defaults(run=run, extra="convert")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print a table of the layers. Returns 0."""
    adapter_options.check(arguments, arguments.source, arguments.base)

    from dora_kernels.extras.convert import table
    from dora_kernels.extras.convert.checkpoint import converted

    options = {key: value for key, value in vars(arguments).items() if key not in ("run", "command", "extra")}
    with stopping.unwinding():
        source_format, adapters = converted(**options)
    print(table(adapters))
    formats = f"{source_format} to {arguments.target_format}"
    print(f"{formats}: {len(adapters)} layers in {printable(arguments.out)}")
    return 0
