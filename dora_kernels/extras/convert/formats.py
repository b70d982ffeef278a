"""The formats: the names of an adapter's tensors on disk in each library, and their meaning in its layer.

A format is one row of FORMATS; `decode` and `encode` of coding.py serve them all, through DoraAdapter. What a row does
not say a file may not contain: a key that nothing accounts for is an error, and so is a file of plain LoRA, without a
magnitude.

What differs between libraries and is no part of an adapter is not converted: dropout, whether the gradient goes
through the norm, and LyCORIS' eps: its gain is magnitude / (norm + finfo.eps), 1.2e-7 in float32, which is below
rounding for every norm over 4. A module keeps its name (`rename` changes it, and names.py kohya's lora_unet_..., whose
underscores for dots the model beneath alone can tell).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dora_kernels.extras.checkpoint_files import PREFIX
from dora_kernels.extras.convert.scaling import InConfig, InHeader, InMetadata, InPeftConfig, InTensor, One
from dora_kernels.files.reading import shown
from dora_kernels.functional.arguments import check_dense, check_type

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
