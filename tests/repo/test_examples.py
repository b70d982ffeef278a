"""The examples at a size that takes a second: stock PEFT's losses, and a killed run ends as a whole one does."""

import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import dora_kernels  # noqa: E402
from dora_kernels import ops  # noqa: E402
from dora_kernels.testing import rms_error  # noqa: E402
from tests.support import peft_problem  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYERS, STEPS, ACCUMULATE, SAVED = 7, 6, 2, 3
OPTIONS = {"steps": STEPS, "accumulate": ACCUMULATE, "save-every": SAVED, "batch": 2, "sequence": 48, "rank": 4}

# The example, killed within the optimizer step after the first checkpoint: nothing of Python's is closed or flushed.
KILLED = f"""
import os, runpy, sys
from dora_kernels.extras.trainer import FrozenAdaptersCallback as Callback
begin = Callback.on_step_begin
def killed(self, arguments, state, *rest, **named):
    begin(self, arguments, state, *rest, **named)
    if state.global_step > {SAVED}:
        os._exit(9)
Callback.on_step_begin = killed
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A Llama of one block, 7 linear layers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def command_line(model_folder):
    def arguments(out, *more, rate=0.02):
        options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
        return ["--model", str(model_folder), "--out", str(out), "--rate", str(rate), *options, *more]

    return arguments


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLES / "finetune.py"))


@pytest.fixture(scope="module")
def finetune(example, command_line):
    """Run the example with further options. Returns the trainer, and its operators' calls."""

    def run(out, *more, **options):
        before = Counter(ops.calls)
        trainer = example["main"](command_line(out, *more, **options))
        calls = Counter()
        for (op, _), count in (ops.calls - before).items():
            calls[op] += count
        return trainer, calls

    return run


@pytest.fixture(scope="module")
def whole(finetune, tmp_path_factory):
    """A run that nothing interrupts: its folder, its trainer, the operators' calls."""
    out = tmp_path_factory.mktemp("whole")
    return out, *finetune(out)


@pytest.fixture(scope="module")
def stock(finetune, tmp_path_factory):
    """The same by PEFT alone."""
    out = tmp_path_factory.mktemp("stock")
    return out, *finetune(out, "--stock")


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_every_layer_is_ours_and_the_losses_are_stock_pefts(whole, stock):
    _, ours, calls = whole
    _, theirs, calls_of_stock = stock
    assert calls["forward"] == calls["backward"] == LAYERS * ACCUMULATE * STEPS
    assert calls["grouped_norm"] == STEPS  # once an optimizer step
    assert not calls_of_stock
    assert len(losses(ours)) == STEPS
    assert losses(ours)[-1] < losses(ours)[0] - 0.1
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)


def test_the_losses_tell_the_adapters_apart(finetune, whole, tmp_path, monkeypatch):
    """What the tests here would see: a gain that is 1% off."""
    forward = ops.run_forward

    def wrong_forward(call):
        result = forward(call)
        return result._replace(y=result.y * 1.01)

    monkeypatch.setattr(ops, "run_forward", wrong_forward)
    wrong, _ = finetune(tmp_path)
    assert losses(wrong) != pytest.approx(losses(whole[1]), rel=1e-4)


def test_a_killed_run_resumes_and_ends_as_the_whole_one(finetune, command_line, whole, tmp_path):
    arguments = [sys.executable, "-u", "-c", KILLED, str(EXAMPLES / "finetune.py"), *command_line(tmp_path)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=EXAMPLES.parent)
    assert result.returncode == 9, result.stderr
    assert f"taken over {LAYERS} of {LAYERS} DoRA layers" in result.stdout
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{SAVED}"]
    resumed, calls = finetune(tmp_path, "--resume")
    assert calls["forward"] == LAYERS * ACCUMULATE * (STEPS - SAVED)
    folder, trainer, _ = whole
    assert losses(resumed) == pytest.approx(losses(trainer), rel=1e-6)
    torch.testing.assert_close(adapter(tmp_path), adapter(folder), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("more", ((), ("--stock",)))
def test_either_goes_on_from_the_others_checkpoint(finetune, whole, stock, tmp_path, more):
    (begun, first, _), (_, expected, _) = (whole, stock) if more else (stock, whole)
    shutil.copytree(begun / f"checkpoint-{SAVED}", tmp_path / f"checkpoint-{SAVED}")
    resumed, calls = finetune(tmp_path, "--resume", *more)
    assert calls["forward"] == (0 if more else LAYERS * ACCUMULATE * (STEPS - SAVED))
    assert losses(resumed)[:SAVED] == losses(first)[:SAVED]  # to the bit: read, not computed again
    assert losses(resumed) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.parametrize("checkpoint", (f"checkpoint-{STEPS}", "."))
def test_what_is_saved_is_stock_pefts(example, model_folder, whole, stock, checkpoint):
    (folder, trainer, _), (folder_of_stock, _, _) = whole, stock
    ours, theirs = adapter(folder / checkpoint), adapter(folder_of_stock / checkpoint)
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in ours.items()}
    assert shapes == {key: (tensor.shape, tensor.dtype) for key, tensor in theirs.items()}
    assert len(ours) == 3 * LAYERS and all(tensor.any() for tensor in ours.values())

    base, _ = example["load"](str(model_folder), torch.float32)
    ids = torch.arange(40, 80)[None]
    with torch.no_grad():
        without = base(ids).logits
        loaded = peft.PeftModel.from_pretrained(base, folder / checkpoint)
        assert not any("dora_kernels" in type(module).__module__ for module in loaded.modules())
        expected = loaded(ids).logits
        trained = trainer.model.cpu().eval()(ids).logits
    assert rms_error(trained, expected) < 1e-5
    assert rms_error(without, expected) > 1e-2


def test_bf16(finetune, tmp_path):
    ours, calls = finetune(tmp_path / "ours", "--bf16")
    theirs, _ = finetune(tmp_path / "stock", "--bf16", "--stock")
    assert calls["forward"] == LAYERS * ACCUMULATE * STEPS
    dtypes = {name.partition("lora_")[1]: tensor.dtype for name, tensor in ours.model.state_dict().items()}
    assert dtypes == {"": torch.bfloat16, "lora_": torch.float32}
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-2)


@pytest.mark.nightly
def test_compiled(finetune, whole, tmp_path):
    """aot_eager: the same graphs and operators, without the wait for a compiler."""
    torch.compiler.reset()
    compiled, calls = finetune(tmp_path, "--compile", "aot_eager")
    assert calls["forward"] == LAYERS * ACCUMULATE * STEPS
    assert losses(compiled) == pytest.approx(losses(whole[1]), rel=1e-5)


def test_trl(finetune, whole, tmp_path):
    """SFTTrainer takes the rows in the order of Trainer: the same losses, and it resumes."""
    pytest.importorskip("trl")
    trainer, calls = finetune(tmp_path, "--trl")
    # SFTTrainer checkpoints the activations: each block's forward pass runs twice
    assert calls["forward"] == 2 * LAYERS * ACCUMULATE * STEPS and calls["grouped_norm"] == STEPS
    assert losses(trainer) == pytest.approx(losses(whole[1]), rel=1e-5)
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    resumed, calls = finetune(tmp_path, "--trl", "--resume")
    assert calls["forward"] == 2 * LAYERS * ACCUMULATE * (STEPS - SAVED)
    assert losses(resumed) == pytest.approx(losses(trainer), rel=1e-6)


def test_without_a_folder(example, tmp_path):
    """The small Llama has the same random weights each time."""
    trainer = example["main"](["--out", str(tmp_path), "--steps", "1", "--batch", "1", "--accumulate", "1"])
    assert len(dora_kernels.enable(trainer.model).taken_over) == 28
    again, _ = example["load"](None, torch.float32)
    weight = "model.layers.0.mlp.up_proj"
    trained = trainer.model.base_model.model.get_submodule(weight).base_layer.weight
    assert torch.equal(trained.cpu(), again.get_submodule(weight).weight)


def test_the_accelerate_loop(command_line, tmp_path, monkeypatch):
    """One scope around the loop: the norms are made anew after each optimizer step, and only then."""
    monkeypatch.syspath_prepend(EXAMPLES)
    loop = runpy.run_path(str(EXAMPLES / "accelerate_loop.py"))["main"]
    arguments = command_line(tmp_path)
    save = arguments.index("--save-every")
    del arguments[save : save + 2]
    expected = loop([*arguments, "--stock"])
    theirs = adapter(tmp_path)
    before = peft_problem.calls("grouped_norm"), peft_problem.calls("forward")
    ours = loop(arguments)
    after = peft_problem.calls("grouped_norm"), peft_problem.calls("forward")
    assert after == (before[0] + STEPS, before[1] + LAYERS * ACCUMULATE * STEPS)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert sum(ours[-ACCUMULATE:]) < sum(ours[:ACCUMULATE])
    assert adapter(tmp_path).keys() == theirs.keys()
    torch.testing.assert_close(adapter(tmp_path), theirs, rtol=1e-4, atol=1e-6)
