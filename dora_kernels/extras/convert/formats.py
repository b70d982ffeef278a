"""The formats: the names of an adapter's tensors on disk in each library, and their meaning in its layer.

A format is one row of FORMATS; `decode` and `encode` serve them all, through DoraAdapter. What a row does not say a
file may not contain: a key that nothing accounts for is an error, and so is a file of plain LoRA, without a magnitude.

What differs between libraries and is no part of an adapter is not converted: dropout, whether the gradient goes
through the norm, and LyCORIS' eps: its gain is magnitude / (norm + finfo.eps), 1.2e-7 in float32, which is below
rounding for every norm over 4. A module keeps its name (`rename` changes it, and names.py kohya's lora_unet_..., whose
underscores for dots the model beneath alone can tell).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dora_kernels.extras.checkpoint_files import PREFIX
from dora_kernels.extras.convert.adapter import DoraAdapter, check_shapes
from dora_kernels.extras.convert.scaling import InConfig, InHeader, InMetadata, InPeftConfig, InTensor, One, Unstated
from dora_kernels.files.reading import shown
from dora_kernels.functional.arguments import check_dense, check_items, check_number, check_type, described

Scaling = InConfig | InHeader | InMetadata | InPeftConfig | InTensor | One
# what becomes of the bias beneath an adapter
BIAS = {
    "unscaled": "leaves a layer's bias as it is",
    "scaled": "multiplies a layer's bias by the gain",
    "either": "multiplies a layer's bias by the gain or not, layer by layer",
}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: tensors, the safetensors header, adapter_config.json ({} where there is none).

    Raises ValueError unless these are mappings, and the tensors dense ones by name.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_type("Checkpoint", name, value, Mapping, "a mapping")
        for key, tensor in self.tensors.items():
            check_type("Checkpoint", "a key of tensors", key, str, "a str")
            check_dense("Checkpoint", shown(key), tensor)


# shape of the magnitude for each norm axis, of a layer with an ndim-dimensional weight (N, K, ...)
Shapes = Callable[[int, int, int], dict[str, tuple[int, ...]]]


def _flat(ndim: int, N: int, K: int) -> dict[str, tuple[int, ...]]:
    return {"out": (N,)}


def _column(ndim: int, N: int, K: int) -> dict[str, tuple[int, ...]]:
    return {"out": (N, 1)}


def _peft(ndim: int, N: int, K: int) -> dict[str, tuple[int, ...]]:
    return {"out": (N,) if ndim == 2 else (1, N, *(1,) * (ndim - 2))}


def _lycoris(ndim: int, N: int, K: int) -> dict[str, tuple[int, ...]]:
    ones = (1,) * (ndim - 2)
    return {"out": (N, 1, *ones), "in": (1, K, *ones)}


def _comfy(ndim: int, N: int, K: int) -> dict[str, tuple[int, ...]]:
    # which takes a magnitude whose first size is N for one over rows
    shapes = _lycoris(ndim, N, K)
    return shapes if N > 1 else {"out": shapes["out"]}


@dataclass(frozen=True)
class Format:
    """One library's adapters on disk.

    lora_A, lora_B, magnitude: what follows `<module>.` in a key; {adapter} stands for an adapter's name.
    prefix: what is written before every module, and read where every key has it. folder: written as a folder of
    adapter_model.safetensors and adapter_config.json, else as one file. bias: one of BIAS. refused: patterns of keys,
    and why they are refused. also: other names of lora_A and the others, which are read and not written. stripped: a
    prefix that is read and not written. mixed: a layer without a magnitude is one of plain LoRA, where others have one.
    asked: a pattern of keys beside which alpha has to be said by the caller, and why. axes: norm axes that shapes has
    but whose function is another, and why.
    """

    name: str
    lora_A: str
    lora_B: str
    magnitude: str
    scaling: Scaling
    alpha: str | None = None
    prefix: str = ""
    folder: bool = False
    files: tuple[str, ...] = ("adapter_model.safetensors", "adapter_model.bin")
    shapes: Shapes = _flat
    conv: bool = False
    bias: str = "unscaled"
    refused: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stripped: str = ""
    mixed: bool = False
    asked: tuple[str, str] | None = None
    axes: Mapping[str, str] = field(default_factory=dict)

    def parts(self) -> dict[str, str]:
        parts = {"lora_A": self.lora_A, "lora_B": self.lora_B, "magnitude": self.magnitude}
        return parts if self.alpha is None else parts | {"alpha": self.alpha}

    def names(self) -> list[tuple[str, str]]:
        """(part, what follows `<module>.`) of every key that is read."""
        return [*self.parts().items(), *((part, name) for part, names in self.also.items() for name in names)]


_EMBEDDING = "an embedding's adapter has no counterpart elsewhere"
_LORA_BIAS = "a lora_bias has no counterpart elsewhere"
_NO_LORA = "and no LoRA, whose product with a magnitude is all that is converted"
# of LyCORIS, kohya's scripts, OneTrainer and PEFT; what ComfyUI reads is in its comfy/lora.py and comfy/weight_adapter/
_OTHERS = {
    r"lora_mid\.weight": "a Tucker decomposition has no counterpart elsewhere",
    r"hada_(w[12]_[ab]|t[12])": f"this is LoHa, a product of two, {_NO_LORA}",
    r"lokr_(w[12](_[ab])?|t2)": f"this is LoKr, a Kronecker product, {_NO_LORA}",
    r"(oft_blocks|oft_diag|oft_R(\..*)?|boft_.*)": f"this is OFT or BOFT, a rotation, {_NO_LORA}",
    r"(a[12]|b[12]|bm)\.weight": f"this is GLoRA or a weight of the model itself, {_NO_LORA}",
    r"(ia3_.*|on_input)": f"this is IA3, {_NO_LORA}",
    r"(diff|set_weight)": f"this is a whole weight, or its change, {_NO_LORA}",
    r"(diff_b|b_norm|w_norm)": "a trained bias or norm has no counterpart elsewhere",
    r"reshape_weight": "a weight of another shape than the base's has no counterpart elsewhere",
    r"bias_(indices|values|size)": "a trained bias has no counterpart elsewhere",
    r"(scalar|rescale)": "a factor beside alpha has no counterpart elsewhere",
    r"lora_embedding_[AB](\..+)?": _EMBEDDING,
    r"lora_B(\.[^.]+)?\.bias": _LORA_BIAS,
    r"lora_(up|down)\.bias": _LORA_BIAS,
    r"base_layer\..+": "this is the model's own, of a state dict of all of it, or beside an adapter of its head or "
    "embedding, as PEFT saves it but with save_embedding_layers=False; expected the adapter's part alone",
    r"(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)\.weight": "a whole weight of the model, which PEFT "
    "saves where the vocabulary was resized before training, and of modules_to_save; it has no counterpart elsewhere",
    r"(modules_to_save|original_module)\..+": "a module that is saved whole has no counterpart elsewhere",
}
# https://github.com/Comfy-Org/ComfyUI/pull/15458
_COMFY_ROWS = (
    "a norm over rows, which ComfyUI takes of the base's weight alone and not of the sum; expected one over columns, "
    "or lycoris in place of comfy, which says what LyCORIS and OneTrainer compute"
)
# what trainers for it say in the header where their rows are its: m n(W) / n(W + s B A), as of
# https://github.com/akatsuki-neo/anima-edit/blob/156a6221e4892b14cc24548eb71a869bd46ba6ec/networks/dora.py
_COMFY_HEADERS = {
    "ss_dora_format": "comfyui",
    "ss_dora_scale_format": "comfy_weight_norm",
    "anima_dora_scale_format": "comfy_output_axis_adjusted",
}
_DOWN = ("lora_A.weight", "lora_A.{adapter}.weight", "lora.down.weight", "lora_linear_layer.down.weight")
_UP = ("lora_B.weight", "lora_B.{adapter}.weight", "lora.up.weight", "lora_linear_layer.up.weight")
# by PEFT's state dicts now and before 0.11, and by OneTrainer
_VECTOR = ("lora_magnitude_vector.weight", "lora_magnitude_vector.{adapter}.weight", "lora_magnitude_vector.{adapter}")

_ROWS = (
    # Automodel writes this format too over a dense base, and torchtune beside its own, where it leaves use_dora out
    # and the magnitudes of q_proj and k_proj in torchtune's order: that one is refused, for use_dora is not set
    Format(
        "peft",
        "lora_A.weight",
        "lora_B.weight",
        "lora_magnitude_vector",
        InPeftConfig(),
        also={"lora_A": _DOWN[1:2], "lora_B": _UP[1:2], "magnitude": _VECTOR},
        prefix=PREFIX,
        folder=True,
        shapes=_peft,
        conv=True,
        refused=_OTHERS,
    ),
    Format(
        "torchtune",
        "lora_a.weight",
        "lora_b.weight",
        "magnitude",
        InConfig(),
        folder=True,
        # adapter_model.safetensors beside the .pt holds PEFT's names
        files=("adapter_model.pt", "adapter_model.safetensors"),
        bias="scaled",
    ),
    # its own loader takes adapter_model.bin, which torch.save makes of the same tensors
    Format(
        "nvlabs",
        "lora_A.weight",
        "lora_B.weight",
        "weight_m_wdecomp.weight",
        InConfig("DORA"),
        prefix=PREFIX,
        folder=True,
        shapes=_column,
    ),
    # a state dict of NVlabs' LLaVA tree; what that saves with save_pretrained is nvlabs
    Format(
        "llava",
        "lora_A.{adapter}.weight",
        "lora_B.{adapter}.weight",
        "weight_m_wdecomp.{adapter}.weight",
        InConfig("DORA"),
        prefix=PREFIX,
        folder=True,
        shapes=_column,
    ),
    Format(
        "fsdp_qlora",
        "dora_layer.lora_A.weight",
        "dora_layer.lora_B.weight",
        "magnitude_layer.magnitude",
        One(),
        bias="scaled",
    ),
    Format(
        "lycoris",
        "lora_down.weight",
        "lora_up.weight",
        "dora_scale",
        InTensor(),
        alpha="alpha",
        also={"lora_A": _DOWN, "lora_B": _UP},
        shapes=_lycoris,
        conv=True,
        mixed=True,
        refused=_OTHERS,
    ),
    # a linear layer of Megatron's returns its bias beside its output or within it, and the gain multiplies the output
    Format(
        "megatron-bridge",
        "adapter.linear_in.weight",
        "adapter.linear_out.weight",
        "adapter.weight_magnitude",
        InHeader(uniform=True),
        bias="either",
    ),
    # the names of its modules, which it writes over a quantized base; over a dense one it writes peft
    Format("automodel", "lora_A.weight", "lora_B.weight", "lora_magnitude", InConfig(), folder=True),
    Format("dora_kernels", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", InHeader()),
    # what ComfyUI computes of a file, and the names that OneTrainer writes for it; of lycoris' names it reads most too
    Format(
        "comfy",
        "lora_A.weight",
        "lora_B.weight",
        "dora_scale",
        InTensor(lenient=True),
        alpha="alpha",
        also={"lora_A": ("lora_down.weight", *_DOWN[1:]), "lora_B": ("lora_up.weight", *_UP[1:])},
        shapes=_comfy,
        conv=True,
        mixed=True,
        refused=_OTHERS,
        axes={"out": _COMFY_ROWS},
    ),
    # one file of one model or several, whose names begin the modules. Beside a magnitude a layer without one gets the
    # norm of its base weight, which is no plain LoRA
    Format(
        "diffusers",
        "lora_A.weight",
        "lora_B.weight",
        "lora_magnitude_vector",
        InMetadata(),
        also={"lora_A": _DOWN[1:], "lora_B": _UP[1:], "magnitude": _VECTOR, "alpha": ("alpha",)},
        stripped=PREFIX,
        files=("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
        shapes=_peft,
        conv=True,
        refused=_OTHERS,
    ),
    # its networks with a magnitude have linear layers alone, and alpha = R. With the names for Stable Diffusion it may
    # be another, which multiplies the product but not within the norm: toolkit/models/DoRA.py
    Format(
        "ai-toolkit",
        "lora_A.weight",
        "lora_B.weight",
        "magnitude",
        One(is_rank=True),
        also={"lora_A": ("lora_down.weight",), "lora_B": ("lora_up.weight",)},
        mixed=True,
        refused=_OTHERS,
        asked=(
            r"lora_(down|up)\.weight",
            "ai-toolkit trains with any alpha under these names, and not within the norm unless it is the rank; "
            "expected --alpha, the value it was trained with",
        ),
    ),
)
FORMATS = {row.name: row for row in _ROWS}


def decode(row: Format, checkpoint: Checkpoint, alpha: float | None = None) -> list[DoraAdapter]:
    """The adapters of a checkpoint, by module name; `alpha` where the checkpoint has none.

    Raises ValueError for a key that is not the format's, a tensor that is missing or of another shape, an adapter
    without a magnitude where the format has no plain LoRA beside others, and whatever the format's scaling refuses.
    """
    check_type("convert", "row", row, Format, "one of FORMATS' values")
    check_type("convert", "checkpoint", checkpoint, Checkpoint, "a Checkpoint")
    alpha = None if alpha is None else check_number("convert", "alpha", alpha)
    modules = _sort_keys(row, checkpoint.tensors)
    if not modules:
        raise ValueError(f"convert: the source has no tensors; expected {row.name} adapters")
    mixed = row.mixed and any("magnitude" in tensors for tensors in modules.values())
    for module, tensors in modules.items():
        for part in ("lora_A", "lora_B", "magnitude"):
            if part not in tensors and not (part == "magnitude" and mixed):
                plain = " (a plain LoRA is not converted)" if part == "magnitude" else ""
                key = getattr(row, part)
                raise ValueError(f"convert: {shown(module)} has no {part}; expected a {shown(module)}.{key}{plain}")
        check_shapes(module, tensors["lora_A"], tensors["lora_B"])
    if row.asked is not None and alpha is None:
        key = next((key for key in sorted(checkpoint.tensors) if re.search(rf"\.{row.asked[0]}$", key)), None)
        if key is not None:
            raise Unstated(f"convert: {shown(key)}: {row.asked[1]}")
    ranks = {module: tensors["lora_A"].shape[0] for module, tensors in modules.items()}
    alphas = {module: tensors.get("alpha") for module, tensors in modules.items()}
    scaling = row.scaling.read(alphas, ranks, checkpoint.config, checkpoint.header, alpha)
    adapters = []
    for module, tensors in sorted(modules.items()):
        lora_A, lora_B, magnitude = tensors["lora_A"], tensors["lora_B"], tensors.get("magnitude")
        _check_conv(row, module, lora_A.ndim)
        if magnitude is None:
            adapters.append(DoraAdapter(module, lora_A, lora_B, None, float(scaling[module])))
            continue
        shapes = row.shapes(lora_A.ndim, lora_B.shape[0], lora_A.shape[1])
        axis = next((axis for axis, shape in shapes.items() if shape == tuple(magnitude.shape)), None)
        if axis in row.axes:
            raise ValueError(f"convert: {shown(module)} has {row.axes[axis]}")
        said = next((key for key, value in _COMFY_HEADERS.items() if checkpoint.header.get(key) == value), None)
        if said is not None and axis == "out":
            raise ValueError(
                f"convert: {shown(module)} has a norm over rows, and by the header's {said} that of the base's weight "
                "alone and not of the sum, as ComfyUI takes it; expected one of the sum"
            )
        if axis is None:
            known = [str(shape) for axis, shape in shapes.items() if axis not in row.axes]
            expected = " or ".join(known) or "a layer of more than one row"
            raise ValueError(
                f"convert: {shown(module)}: {row.magnitude} has shape {tuple(magnitude.shape)}; expected {expected}"
            )
        adapters.append(DoraAdapter(module, lora_A, lora_B, magnitude.reshape(-1), float(scaling[module]), axis))
    return adapters


def encode(row: Format, adapters: Sequence[DoraAdapter], adapter_name: str = "default") -> Checkpoint:
    """The checkpoint that decodes to exactly these adapters.

    Raises ValueError where the format has no such layer, and Unrepresentable where it cannot hold the scaling.
    """
    check_type("convert", "row", row, Format, "one of FORMATS' values")
    check_items("convert", "adapters", adapters, DoraAdapter, "a DoraAdapter")
    if not adapters:
        raise ValueError("convert: adapters is empty; expected at least one")
    modules = [adapter.module for adapter in adapters]
    if len(set(modules)) != len(modules):
        raise ValueError(f"convert: adapters are of {described(modules)}; expected modules of different names")
    check_adapter_name(adapter_name)
    check_layers(row, adapters)
    alphas, config, header = row.scaling.write(adapters)
    tensors = {}
    for adapter in adapters:
        shapes = row.shapes(adapter.ndim, adapter.N, adapter.K)
        parts = {
            "lora_A": adapter.lora_A,
            "lora_B": adapter.lora_B,
            "magnitude": None if adapter.magnitude is None else adapter.magnitude.reshape(shapes[adapter.norm_axis]),
            "alpha": alphas.get(adapter.module),
        }
        for part, suffix in row.parts().items():
            if part == "magnitude" and adapter.magnitude is None:
                continue
            tensors[f"{row.prefix}{adapter.module}.{suffix.format(adapter=adapter_name)}"] = parts[part]
    return Checkpoint(tensors, config, header)


def check_layers(row: Format, adapters: Sequence[DoraAdapter]) -> None:
    """Raise ValueError for a layer that the format has no word for."""
    for adapter in adapters:
        _check_conv(row, adapter.module, adapter.ndim)
        if adapter.magnitude is None and not row.mixed:
            raise ValueError(
                f"convert: {shown(adapter.module)} has no magnitude, a plain LoRA among others, which {row.name} has "
                "no word for; expected a magnitude for every layer"
            )
        if adapter.magnitude is not None and adapter.norm_axis in row.axes:
            raise ValueError(f"convert: {shown(adapter.module)} has {row.axes[adapter.norm_axis]}")
        if adapter.magnitude is not None and adapter.norm_axis not in row.shapes(adapter.ndim, adapter.N, adapter.K):
            raise ValueError(
                f"convert: {shown(adapter.module)}: its norm is over each input column (LyCORIS with "
                f"wd_on_out=False), which {row.name} does not know{' of one row' * (adapter.N == 1)}; expected one "
                "over each output row"
            )


def check_adapter_name(adapter_name: str) -> None:
    """Raise ValueError unless this can be an adapter's name in a key."""
    if not isinstance(adapter_name, str) or not re.fullmatch(r"[^.]+", adapter_name):
        raise ValueError(f"convert: adapter_name is {described(adapter_name)}; expected a name without dots")


def _check_conv(row: Format, module: str, ndim: int) -> None:
    if ndim > 2 and not row.conv:
        raise ValueError(
            f"convert: {shown(module)}: lora_A has {ndim} dimensions, a convolution's, which {row.name} does not know; "
            "expected (R, K)"
        )


def known_keys(row: Format, tensors: Mapping[str, Tensor]) -> int:
    """The number of keys that the format knows, if only as what is refused, of the first thousand."""
    first = itertools.islice(tensors, 1000)
    return sum(_match(row, key)[0] is not None or _why_refused(row, key) is not None for key in first)


def begins(row: Format, tensors: Mapping[str, Tensor]) -> str:
    """The prefix of the format's that every key begins with, "" where there is none."""
    prefix = row.prefix or row.stripped
    return prefix if prefix and all(key.startswith(prefix) for key in tensors) else ""


def _sort_keys(row: Format, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{module: {part: tensor}}; every key is accounted for, or ValueError."""
    prefix = begins(row, tensors)
    modules: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    for key in sorted(tensors):
        name = key.removeprefix(prefix)
        module, part, adapter = _match(row, name)
        if module is None:
            reason = _why_refused(row, name)
            if reason is not None:
                raise ValueError(f"convert: {shown(key)}: {reason}")
            expected = ", ".join(f"<module>.{suffix}" for suffix in row.parts().values())
            raise ValueError(f"convert: {shown(key)} is no key of {row.name}; expected only {expected}")
        if part in modules.setdefault(module, {}):
            raise ValueError(f"convert: {shown(key)}: {shown(module)} has a {part} of another name too; expected one")
        if adapter:  # a magnitude or an alpha may be by no adapter's name
            names.setdefault(adapter, key)
        if len(names) > 1:
            raise ValueError(f"convert: the source holds adapters {shown(sorted(names))}; expected one")
        modules[module][part] = tensors[key]
    return modules


def _why_refused(row: Format, name: str) -> str | None:
    return next((why for pattern, why in row.refused.items() if re.fullmatch(rf"(.+\.)?{pattern}", name)), None)


@functools.cache
def _pattern(suffix: str) -> re.Pattern[str]:
    suffix = re.escape(suffix).replace(r"\{adapter\}", r"(?P<adapter>[^.]+)")
    return re.compile(rf"(?P<module>.+)\.{suffix}")


def _match(row: Format, name: str) -> tuple[str | None, str, str]:
    """(module, part, adapter's name) of a key; module is None where it is no key of the format."""
    for part, suffix in row.names():
        if match := _pattern(suffix).fullmatch(name):
            return match["module"], part, match.groupdict().get("adapter", "")
    return None, "", ""
