"""Image-model files that are strange, and real or nearly so."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_kernels.extras.convert import convert_checkpoint, read_adapters
from tests.support.image_files import (
    DOTTED,
    KOHYA,
    LINEAR,
    MODULES,
    NATIVE,
    SCALING,
    Trained,
    definition,
    merged,
    name_in,
    renames,
    saved,
)
from tests.support.image_readers import CLOSE, READERS, error

pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytest.importorskip("lycoris", exc_type=ImportError)


FIRST = LINEAR[0]
STEM = {"lycoris": name_in(KOHYA, FIRST), "comfy": name_in(NATIVE, FIRST), "diffusers": name_in(DOTTED, FIRST)}
STEM |= {"ai-toolkit": STEM["diffusers"]}
# who saves the files that are changed, and what is in them
TOOL = {
    "lycoris": ("LyCORIS", {"axis": "in"}),
    "comfy": ("OneTrainer, ComfyUI's names", {"axis": "in"}),
    "diffusers": ("OneTrainer, diffusers' names", {}),
    "ai-toolkit": ("ai-toolkit", {}),
}


def changed(tmp_path, name, change):
    """The path of a file of the format, whose tensors `change` was given with the name of the first module."""
    path, _ = saved(tmp_path, TOOL[name][0], **TOOL[name][1])
    tensors = load_file(path)
    change(tensors, STEM[name])
    save_file(tensors, path)
    return path


def put(suffix, value):
    """A change: another value in place of `<module>.suffix`, of the one that is there; None takes it away."""

    def change(tensors, stem):
        found = value(tensors.get(f"{stem}.{suffix}")) if callable(value) else value
        if found is None:
            del tensors[f"{stem}.{suffix}"]
        else:
            tensors[f"{stem}.{suffix}"] = found.clone()

    return change


def moved(suffix, other):
    def change(tensors, stem):
        tensors[f"{stem}.{other}"] = tensors.pop(f"{stem}.{suffix}")

    return change


@pytest.mark.parametrize("name", ["lycoris", "comfy"])
@pytest.mark.parametrize(
    "value",
    [
        lambda t: t.long(),
        lambda t: t.bfloat16(),
        lambda t: t.view(1),
        lambda t: t.view(1, 1).double(),
        torch.Tensor.short,
    ],
    ids=["int64", "bfloat16", "shape (1,)", "float64, shape (1, 1)", "int16"],
)
def test_an_alpha_of_any_number_is_read(tmp_path, name, value):
    """diffusers' converter for kohya's scripts writes int64, and bfloat16 is what a cast of the whole file makes."""
    path = changed(tmp_path, name, put("alpha", value))
    _, adapters = read_adapters(path, name)
    (first,) = (a for a in adapters if a.module == STEM[name])
    assert first.scaling == SCALING and first.norm_axis == "in"


def test_comfyui_takes_the_rank_for_a_missing_alpha(tmp_path):
    path = changed(tmp_path, "comfy", put("alpha", None))
    out = tmp_path / "out.safetensors"
    convert_checkpoint(path, out, "comfy", "comfy")
    assert error(READERS["ComfyUI"](out), READERS["ComfyUI"](path)) == 0
    convert_checkpoint(path, tmp_path / "named.safetensors", "comfy", "lycoris", rename=renames(KOHYA))
    assert error(READERS["LyCORIS"](tmp_path / "named.safetensors"), READERS["ComfyUI"](path)) < CLOSE


def test_alpha_0_is_the_rank_to_lycoris(tmp_path):
    path = changed(tmp_path, "lycoris", put("alpha", torch.zeros(())))
    out = tmp_path / "out.safetensors"
    convert_checkpoint(path, out, "lycoris", "lycoris")
    assert float(load_file(out)[f"{STEM['lycoris']}.alpha"]) == 3.0
    assert error(READERS["LyCORIS"](out), READERS["LyCORIS"](path)) < CLOSE


NAN = float("nan")
REFUSED = {  # format, change, a part of the message
    "lycoris: no alpha": ("lycoris", put("alpha", None), "expected --alpha"),
    "lycoris: two alphas": ("lycoris", put("alpha", torch.ones(2)), r"alpha is torch.float32 of shape \(2,\)"),
    "lycoris: alpha of bool": ("lycoris", put("alpha", torch.tensor(True)), "alpha is torch.bool"),
    "lycoris: alpha NaN": ("lycoris", put("alpha", torch.tensor(NAN)), "nan"),
    "comfy: alpha 0": ("comfy", put("alpha", torch.zeros(())), r"alpha is 0, which is a scaling of 0 to ComfyUI"),
    "lycoris: 1-D": ("lycoris", put("dora_scale", torch.ones(6)), r"dora_scale has shape \(6,\)"),
    "lycoris: 1-D, columns": ("lycoris", put("dora_scale", torch.ones(5)), r"dora_scale has shape \(5,\)"),
    "comfy: 1-D": ("comfy", put("dora_scale", torch.ones(6)), r"dora_scale has shape \(6,\)"),
    "lycoris: (K, 1)": ("lycoris", put("dora_scale", lambda t: t.view(-1, 1)), r"dora_scale has shape \(5, 1\)"),
    "lycoris: 4-D": (
        "lycoris",
        put("dora_scale", lambda t: t.view(1, 5, 1, 1)),
        r"dora_scale has shape \(1, 5, 1, 1\)",
    ),
    "lycoris: NaN": ("lycoris", put("dora_scale", lambda t: t * NAN), "5 of 5 values that are NaN or infinite"),
    "lycoris: infinity": (
        "lycoris",
        put("lora_up.weight", lambda t: t / 0),
        "18 of 18 values that are NaN or infinite",
    ),
    "lycoris: both names": ("lycoris", put("lora_A.weight", torch.ones(3, 5)), "lora_A of another name too"),
    "lycoris: Tucker": ("lycoris", put("lora_mid.weight", torch.ones(3, 3)), "Tucker"),
    "lycoris: LoHa": ("lycoris", put("hada_w1_a", torch.ones(6, 2)), "LoHa"),
    "lycoris: whole": ("lycoris", put("diff", torch.ones(6, 5)), "a whole weight"),
    "lycoris: no up": ("lycoris", put("lora_up.weight", None), "has no lora_B"),
    "lycoris: a magnitude alone": (
        "lycoris",
        lambda tensors, stem: tensors.update({"lora_unet_x.dora_scale": torch.ones(1, 5)}),
        "lora_unet_x has no lora_A",
    ),
    "lycoris: empty": ("lycoris", put("lora_down.weight", torch.ones(0, 5)), r"lora_A has shape \(0, 5\)"),
    "lycoris: PEFT's magnitude": (
        "lycoris",
        moved("dora_scale", "lora_magnitude_vector.weight"),
        r"lora_magnitude_vector\.weight is no key of lycoris",
    ),
    "diffusers: both names": (
        "diffusers",
        put("lora_A.default.weight", torch.ones(3, 5)),
        "lora_A of another name too|holds adapters",
    ),
    "diffusers: two magnitudes": (
        "diffusers",
        put("lora_magnitude_vector", torch.ones(6)),
        "magnitude of another name too",
    ),
    "diffusers: a dot in the adapter's name": (
        "diffusers",
        moved("lora_A.weight", "lora_A.my.adapter.weight"),
        r"lora_A\.my\.adapter\.weight is no key of diffusers",
    ),
    "diffusers: the model's own": ("diffusers", put("base_layer.weight", torch.ones(6, 5)), "the model's own"),
    "diffusers: dora_scale": ("diffusers", put("dora_scale", torch.ones(1, 5)), "dora_scale is no key of diffusers"),
    "diffusers: (N, 1)": (
        "diffusers",
        put("lora_magnitude_vector.weight", torch.ones(6, 1)),
        r"has shape \(6, 1\); expected \(6,\)",
    ),
    "diffusers: an embedding": ("diffusers", put("lora_embedding_A", torch.ones(2, 9)), "an embedding"),
    "ai-toolkit: over columns": (
        "ai-toolkit",
        put("magnitude", torch.ones(5)),
        r"magnitude has shape \(5,\); expected \(6,\)",
    ),
    "ai-toolkit: two-dimensional": (
        "ai-toolkit",
        put("magnitude", torch.ones(6, 1)),
        r"magnitude has shape \(6, 1\); expected \(6,\)",
    ),
    "ai-toolkit: alpha": ("ai-toolkit", put("alpha", torch.ones(())), "alpha is no key of ai-toolkit"),
    "ai-toolkit: whole": ("ai-toolkit", put("diff", torch.ones(6, 5)), "a whole weight"),
    "ai-toolkit: names for Stable Diffusion": (
        "ai-toolkit",
        moved("lora_A.weight", "lora_down.weight"),
        "expected --alpha",
    ),
}


ELSEWHERE = {"comfy: alpha 0"}  # which is another format's file, and means something there


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(tmp_path, case):
    name, change, words = REFUSED[case]
    path, out = changed(tmp_path, name, change), tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=words) as refused:
        convert_checkpoint(path, out, name, name)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value) and not out.exists()
    if case not in ELSEWHERE:
        with pytest.raises(ValueError):
            convert_checkpoint(path, out, None, name)


def test_nan_goes_through_where_it_is_asked_for(tmp_path):
    path = changed(tmp_path, "lycoris", put("dora_scale", lambda t: t * NAN))
    out = tmp_path / "out.safetensors"
    convert_checkpoint(path, out, "lycoris", "comfy", allow_nonfinite=True, rename=renames(NATIVE))
    tensors = load_file(out)
    assert tensors[f"{STEM['comfy']}.dora_scale"].isnan().all() and sum(t.isnan().any() for t in tensors.values()) == 1


def test_a_module_by_two_names_is_no_module_twice(tmp_path):
    """As they are they are two; where `rename` makes one of them, it is refused."""

    def change(tensors, stem):
        tensors.update({key.replace("diffusion_model.", "transformer."): t + 1 for key, t in tensors.items()})

    path = changed(tmp_path, "comfy", change)
    assert len(convert_checkpoint(path, tmp_path / "both.safetensors", "comfy", "comfy")) == 2 * len(MODULES)
    with pytest.raises(ValueError, match="a name that another module has too"):
        convert_checkpoint(path, tmp_path / "out.safetensors", "comfy", "lycoris", rename=renames(KOHYA))


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("N, K", [(1, 4), (4, 1), (1, 1), (4, 4)])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_axis_is_told_by_the_shape(tmp_path, N, K, axis, kernel):
    """Where the shape does not tell, N = K = 1, both are the same function."""
    random = torch.Generator().manual_seed(0)
    A, B = torch.randn(1, K, *kernel, generator=random), torch.randn(N, 1, *(1 for _ in kernel), generator=random)
    a = Trained(A, B, torch.rand(N if axis == "out" else K, generator=random) + 1, 2.0, axis)
    path = tmp_path / "file.safetensors"
    save_file({"m.lora_A.weight": A, "m.lora_B.weight": B, "m.alpha": torch.tensor(2.0)}, path)
    save_file(load_file(path) | {"m.dora_scale": a.magnitude.view(a.shape)}, path)
    _, (found,) = read_adapters(path, "lycoris")
    weight = torch.randn(N, K, *kernel, generator=random, dtype=torch.float64)
    as_found = Trained(found.lora_A, found.lora_B, found.magnitude, found.scaling, found.norm_axis)
    assert (merged(weight, as_found) - merged(weight, a)).abs().max() < 1e-14
    assert found.norm_axis == axis or N == K == 1
    if N == 1 or axis == "out":  # whose first size is N: to ComfyUI these are rows
        with pytest.raises(ValueError, match="ComfyUI|comfy"):
            convert_checkpoint(path, tmp_path / "out.safetensors", "lycoris", "comfy")
    else:
        convert_checkpoint(path, tmp_path / "out.safetensors", "lycoris", "comfy")


@pytest.mark.parametrize("scaling", [2 / 3, 0.1])
def test_a_scaling_that_is_no_power_of_two(tmp_path, scaling):
    """Exact where alpha can say it, refused for ai-toolkit, which has none, and rounded there where it is asked for."""
    path, adapters = saved(tmp_path, "diffusers pipeline", modules=LINEAR, scaling=scaling)
    exact = definition(adapters)
    for target, style, reader in (("peft", None, "PEFT"), ("diffusers", DOTTED, "diffusers")):
        out = tmp_path / f"{target}.safetensors"
        convert_checkpoint(path, out, "diffusers", target, rename=renames(style))
        assert error(READERS[reader](out), exact) < CLOSE
    out = tmp_path / "folded.safetensors"
    with pytest.raises(ValueError, match="expected a power of two, or --fold"):
        convert_checkpoint(path, out, "diffusers", "ai-toolkit")
    convert_checkpoint(path, out, "diffusers", "ai-toolkit", fold=True)
    assert 0 < error(READERS["ai-toolkit"](out), exact) < 1e-6  # lora_B is float32


def for_stable_diffusion(tensors):
    """The file with the names that ai-toolkit has for SDXL."""
    result = {}
    for key, tensor in tensors.items():
        module, suffix = re.fullmatch(r"transformer\.(.+?)\.(lora_[AB]\.weight|magnitude)", key).groups()
        suffix = suffix.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        result[f"{name_in(KOHYA, module)}.{suffix}"] = tensor
    return result


def test_ai_toolkits_names_for_stable_diffusion_need_an_alpha(tmp_path):
    """The layer of any other alpha than the rank is no DoRA: its product is scaled, but not within the norm."""
    path, adapters = saved(tmp_path, "ai-toolkit", rank=2)
    save_file(for_stable_diffusion(load_file(path)), path)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="expected --alpha"):
        convert_checkpoint(path, out, "ai-toolkit", "lycoris")
    with pytest.raises(ValueError, match="alpha is 4"):
        convert_checkpoint(path, out, "ai-toolkit", "lycoris", alpha=4)
    convert_checkpoint(path, out, "ai-toolkit", "lycoris", alpha=2)
    assert error(READERS["LyCORIS"](out), definition(adapters)) < CLOSE
