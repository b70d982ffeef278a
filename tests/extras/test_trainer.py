"""FrozenAdaptersCallback names the magnitudes that no group of the optimizer has; tests/reuse/ has what it is for."""

import copy
import logging

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from dora_kernels.extras.trainer import FrozenAdaptersCallback  # noqa: E402
from tests.support.process_worlds import world  # noqa: E402

WARNING = "magnitudes require a gradient and are in no group of the optimizer"


class Regression(nn.Module):
    """What a Trainer takes, around layers."""

    def __init__(self, *layers):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.inner(x), labels)}


def peft_model():
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["0", "1"])
    model = peft.get_peft_model(Regression(nn.Linear(8, 6), nn.Linear(6, 4)), config)
    assert len(dora_kernels.enable(model).taken_over) == 2
    return model


def our_model():
    return Regression(DoraLinear(8, 6, 2, 3.0), DoraLinear(6, 4, 2, 3.0))


MODELS = {"peft": peft_model, "DoraLinear": our_model}


def parameters_of(model, without="nothing"):
    return [p for name, p in model.named_parameters() if p.requires_grad and without not in name]


class Seen(transformers.TrainerCallback):
    """The class of the optimizer that callbacks see."""

    def on_train_begin(self, *_, optimizer, **__):
        self.optimizer = type(optimizer).__name__


def warned(caplog, tmp_path, model, make_optimizer=None, trainer_class=transformers.Trainer, **settings):
    """The warnings of a run of two steps with the callback. make_optimizer(model), or the Trainer's own."""
    rows = [{"x": torch.randn(8), "labels": torch.randn(4)} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=2, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(), **settings,
    )  # fmt: skip
    optimizers = (None if make_optimizer is None else make_optimizer(model), None)
    callbacks = [FrozenAdaptersCallback(), seen := Seen()]
    keywords = {"train_dataset": rows, "callbacks": callbacks, "optimizers": optimizers}
    with caplog.at_level(logging.WARNING, "dora_kernels"):
        trainer_class(model, arguments, **keywords).train()
    assert seen.optimizer == "AcceleratedOptimizer"
    found = [record.getMessage() for record in caplog.records if record.name == "dora_kernels"]
    assert all(WARNING in message for message in found)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_no_warning_where_every_magnitude_is_trained(kind, caplog, tmp_path):
    assert not warned(caplog, tmp_path, MODELS[kind](), weight_decay=0.1)  # which makes two groups
    assert not warned(caplog, tmp_path, MODELS[kind](), lambda model: torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("kind", MODELS)
def test_a_magnitude_that_nobody_trains_is_named(kind, caplog, tmp_path):
    """https://github.com/pytorch/torchtune/issues/2250"""
    model = MODELS[kind]()
    before = copy.deepcopy(model.state_dict())
    (message,) = warned(caplog, tmp_path, model, lambda model: torch.optim.SGD(parameters_of(model, "magnitude"), 1.0))
    after = model.state_dict()
    still = {name for name, p in model.named_parameters() if p.requires_grad and torch.equal(after[name], before[name])}
    names = [name for name, p in model.named_parameters() if "magnitude" in name]
    assert {*names} <= still and len(names) == 2
    assert message == f"dora_kernels: 2 {WARNING}: {', '.join(names)}; expected them in one, or frozen"


def test_a_trainer_that_makes_an_optimizer_of_its_own(caplog, tmp_path):
    class LeavesOneOut(transformers.Trainer):
        def create_optimizer(self, *_):
            if self.optimizer is None:
                kept = [p for name, p in self.model.named_parameters() if "inner.1.lora_magnitude" not in name]
                self.optimizer = torch.optim.AdamW([{"params": kept[:3]}, {"params": kept[3:]}], lr=0.1)
            return self.optimizer

    (message,) = warned(caplog, tmp_path, peft_model(), trainer_class=LeavesOneOut)
    assert message.startswith(f"dora_kernels: 1 {WARNING}: base_model.model.inner.1.lora_magnitude_vector.default")
    assert message.count("lora_magnitude") == 1


def test_a_frozen_magnitude_is_the_report_s(caplog, tmp_path):
    model = peft_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "magnitude" not in name)
    assert not warned(caplog, tmp_path, model, lambda model: torch.optim.SGD(parameters_of(model), lr=0.1))


class Copies(torch.optim.SGD):
    """An optimizer with float32 copies for parameters, as DeepSpeed's, or a flat one, as FSDP1's."""

    def __init__(self, model, flat):
        self.of = parameters_of(model)
        copies = [p.detach().clone() for p in self.of]
        copies = [torch.cat([one.flatten() for one in copies])] if flat else copies
        super().__init__([one.requires_grad_() for one in copies], lr=0.1)


@pytest.mark.parametrize("flat", (False, True))
def test_of_an_optimizer_with_parameters_of_its_own_nothing_is_known(flat, caplog, tmp_path):
    assert not warned(caplog, tmp_path, peft_model(), lambda model: Copies(model, flat))


def test_other_ways_to_be_told_nothing(caplog):
    callback = FrozenAdaptersCallback()
    with caplog.at_level(logging.WARNING, "dora_kernels"):
        callback.on_train_begin(model=peft_model())
        callback.on_train_begin(model=peft_model(), optimizer=object())
        callback.on_train_begin(model=nn.Linear(3, 3), optimizer=torch.optim.SGD(nn.Linear(3, 3).parameters(), 0.1))
    assert not caplog.records


def test_magnitudes_of_other_libraries(caplog):
    """By what the library's own file says, not by their names."""
    from tests.support.layer_kinds import pair

    for name in ("torchtune", "lycoris", "llm", "fsdp_qlora", "megatron", "peft, embedding"):
        model = pair(name, torch.float32)[1]
        trained = [p for p in model.parameters() if p.requires_grad]
        left_out = next(
            p for n, p in model.named_parameters() if "magnitude" in n or "dora_scale" in n or "wdecomp" in n
        )
        optimizer = torch.optim.SGD([p for p in trained if p is not left_out], lr=0.1)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dora_kernels"):
            FrozenAdaptersCallback().on_train_begin(model=model, optimizer=torch.optim.SGD(trained, lr=0.1))
            assert not caplog.records
            FrozenAdaptersCallback().on_train_begin(model=model, optimizer=optimizer)
        assert f"1 {WARNING}" in caplog.text, name


def under_fsdp(rank, size):
    """How many magnitudes the callback names, by engine and by whether the optimizer has them."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def by_fsdp1(use_orig_params):
        return lambda model: FullyShardedDataParallel(
            model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    engines = {"flat": by_fsdp1(False), "FSDP1": by_fsdp1(True), "FSDP2": fully_shard}
    named = {}
    for engine, wrap in engines.items():
        for left_out in (False, True):
            model = peft_model()
            if engine == "flat":
                model.requires_grad_(True)  # as one flat parameter has to be
            early = torch.optim.SGD(parameters_of(model), lr=0.1)
            model = wrap(model)
            late = torch.optim.SGD(parameters_of(model, "magnitude" if left_out else "nothing"), lr=0.1)
            for optimizer in (late, early):
                messages = []
                handler = logging.Handler()
                handler.emit = lambda record, messages=messages: messages.append(record.getMessage())
                logging.getLogger("dora_kernels").addHandler(handler)
                FrozenAdaptersCallback().on_train_begin(model=model, optimizer=optimizer)
                logging.getLogger("dora_kernels").removeHandler(handler)
                assert all(f"2 {WARNING}" in message for message in messages)
                named[engine, left_out, "late" if optimizer is late else "early"] = len(messages)
    return named


@pytest.mark.nightly
def test_under_fsdp_a_magnitude_is_named_where_it_can_be_told():
    """Not of a flat parameter of all, nor of an optimizer that was made before, whose parameters are replaced."""
    (named,) = world(1).run(under_fsdp)
    assert {case for case, messages in named.items() if messages} == {
        ("FSDP1", True, "late"),
        ("FSDP2", True, "late"),
    }
