"""The options with which `convert` and `merge` are told how an adapter's file is to be read, and their checks."""

from __future__ import annotations

import argparse
import os

from dora_kernels.cli.arguments import integer, number, why_no_substitution

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


def add(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument(
        "--from",
        dest="source_format",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)} (default: the one that fits)",
    )
    parser.add_argument(
        "--alpha", type=number("a finite number"), help="where the adapter does not say it; scaling is alpha / R"
    )
    parser.add_argument(
        "--rename", nargs=2, action="append", metavar=("PATTERN", "WITH"), help="re.sub on the adapter's module names"
    )
    rows = parser.add_mutually_exclusive_group()
    heads = integer(1, 2**31 - 1)
    rows.add_argument(
        "--heads", nargs=2, type=heads, metavar=("Q", "KV"), help="torchtune: reorder the rows of q_proj and k_proj"
    )
    rows.add_argument(
        "--same-rows", action="store_true", help="torchtune: this model's q_proj and k_proj need no reordering"
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinite values too")


def check(arguments: argparse.Namespace, *paths: str | None) -> None:
    """Raise ValueError for a substitution that cannot be, one of `paths` that is not there, or an `out` that is."""
    arguments.rename = arguments.rename or []
    for pattern, replacement in arguments.rename:
        if reason := why_no_substitution(pattern, replacement):
            raise ValueError(f"rename is {pattern!r:.80}, {replacement!r:.80}: {reason}; expected what re.sub takes")
    for path in paths:
        if path is not None and not os.path.exists(path):
            raise ValueError(f"{path or repr(path)} does not exist; expected a file or a folder")
    if os.path.lexists(arguments.out):
        raise ValueError(f"{arguments.out} exists; expected a name that is free")
