"""What every public function, class and method takes, and what it refuses: a row for each, in PUBLIC.

test_malformed.py holds the package to it, and every public name to a row here or to a reason in NO_ROW.
"""

from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, DvoraLinear, VeraProjection, reuse, testing
from dora_kernels.extras import analysis, convert, demo, dvora, merging, parallel, serving, starts, trainer
from dora_kernels.functional.rescale import rescale
from dora_kernels.planning.options import BACKENDS, PRECISIONS, WAYS
from tests.support import peft_problem, vera_problem
from tests.support import right_values as right
from tests.support.public_extras import EXTRAS
from tests.support.right_values import NAMES, Public, always, inputs
from tests.support.wrong_values import (
    ADAPTER,
    BIAS,
    COUNT,
    DTYPE,
    FLAG,
    LAYER,
    LINEAR,
    MODEL,
    NORM,
    NUMBER,
    OURS,
    PLACEMENT,
    PROBABILITY,
    ROOM,
    ROW,
    SCALING,
    SEED,
    SIZE,
    TEXT,
    VERA,
    X_DROPPED,
    Argument,
    K,
    M,
    N,
    R,
    X,
    besides,
    choice,
    one_of,
    optional,
    tensor,
    zeros,
)

MODULES = (dora_kernels, reuse, testing, analysis, convert, merging, dvora, demo, parallel, serving, starts, trainer)
"""Whose names are public: __all__, or where there is none what is defined there without an underscore."""

_VALUE = "a value that the package makes, or that the row of another checks"
_OF_LAYERS = "called by layers, with what they hold"
_NOTHING = "takes no arguments"
_TORCH = "torch's own"
_DEMO = "the command's parts, whose arguments are those of the command line"
NO_ROW = {
    **dict.fromkeys(("CheckFailed", "Checked"), _VALUE),
    **dict.fromkeys(("Adapter", "Analysis", "Change", "Comparison", "Format", "LeftOut"), _VALUE),
    **dict.fromkeys(
        ("NormTerms", "Report", "MergeReport", "Row", "Scope", "Trend", "Unrepresentable"),
        _VALUE,
    ),
    **dict.fromkeys(("constant_reusing", "dora_linear_reusing", "forget", "mode_set"), _OF_LAYERS),
    **dict.fromkeys(("norm_reusing", "weight_norm_reusing", "MergeableLinear.merged_product"), _OF_LAYERS),
    **dict.fromkeys(("DemoResult", "Preset", "Run", "Settings", "run", "sample"), _DEMO),
    **dict.fromkeys(("standard_library", "trained_base"), _DEMO),
    **dict.fromkeys(("DoraColwise", "DoraRowwise", "fast_init", "nan_filled_memory"), _NOTHING),
    "MergeableLinear.train": _TORCH,
    "ParallelDoraLinear": "made by shard_dora_linear alone",
    "dvora_linear_ref": "the definition, as short as it can be: the errors are PyTorch's",
}
"""Public names without a row, and why."""


DROPOUT = {"dropout": PROBABILITY, "dropout_on": choice("adapter", "lora")}
TERMS = one_of(dvora.NormTerms, (zeros(N, R + 1), zeros(R, R + 1)), dvora.NormTerms(zeros(N, R), zeros(R, R)))
SMALL = VeraProjection(K - 1, N, R), VeraProjection(K, N - 1, R)
PROJECTION = besides(one_of(VeraProjection, nn.Linear(K, N), *SMALL), shown=("in_features is 6 and out_features 8",))

PUBLIC = (
    # the layer, as a function and as a module
    Public(dora_kernels.dora_linear, "dora_linear", inputs(*NAMES), LAYER | {"bias": BIAS, "norm_grad": FLAG}),
    Public(dora_kernels.weight_norm, "weight_norm", inputs(*NAMES[1:4], "scaling"), ADAPTER | {"norm_grad": FLAG}),
    Public(dora_kernels.merge_weight, "merge_weight", inputs(*NAMES[1:6]), ADAPTER | {"magnitude": ROW}),
    Public(
        rescale,
        "rescale",
        always(base=zeros(M, N), low=zeros(M, R), lora_B=zeros(N, R), gain=zeros(N), scaling=1.0),
        {"base": besides(tensor(M, N), called=("low",)), "low": tensor(M, R), "lora_B": tensor(N, R), "gain": ROW}
        | {"scaling": SCALING, "bias": BIAS, "residual": optional(tensor(M, N))},
    ),
    Public(
        DoraLinear,
        "DoraLinear",
        always(in_features=K, out_features=N, rank=R, alpha=1.0),
        {"in_features": COUNT, "out_features": COUNT, "rank": SIZE, "alpha": NUMBER, "bias": FLAG}
        | DROPOUT
        | PLACEMENT
        | {"adapter_dtype": DTYPE},
    ),
    Public(
        DoraLinear.from_linear,
        "DoraLinear",
        always(linear=right.linear, rank=R, alpha=1.0),
        {"linear": LINEAR, "rank": SIZE, "alpha": NUMBER} | DROPOUT,
    ),
    Public(DoraLinear.forward, "DoraLinear", always(self=right.layer, x=zeros(M, K)), {"x": X}),
    Public(DoraLinear.merge, "DoraLinear.merge", always(self=right.layer), {"safe_merge": FLAG}),
    Public(
        dora_kernels.dvora_linear,
        "dvora_linear",
        right.vera("x", *VERA, "magnitude"),
        {"x": X, **VERA, "magnitude": ROW, "bias": BIAS, "terms": optional(TERMS), "norm_grad": FLAG}
        | {"x_dropped": X_DROPPED, "norm": NORM},
    ),
    Public(dvora.dvora_norm, "dvora_norm", right.vera(*VERA), VERA | {"terms": optional(TERMS), "norm_grad": FLAG}),
    Public(
        dvora.norm_terms,
        "norm_terms",
        right.vera("weight", "vera_A"),
        {"weight": besides(tensor(N, K, free=(0,)), zeros(N, K).requires_grad_())}
        | {"vera_A": besides(tensor(R, K, free=(0,)), zeros(R, K).requires_grad_())},
    ),
    Public(
        VeraProjection,
        "VeraProjection",
        always(max_in_features=K, max_out_features=N, rank=R),
        {"max_in_features": SIZE, "max_out_features": SIZE, "rank": SIZE, "seed": SEED, "save": FLAG} | PLACEMENT,
    ),
    Public(
        VeraProjection.of,
        "VeraProjection.of",
        always(self=right.projection, in_features=K, out_features=N),
        {"in_features": ROOM, "out_features": ROOM},
    ),
    Public(
        DvoraLinear,
        "DvoraLinear",
        always(in_features=K, out_features=N, projection=right.projection),
        {"in_features": besides(COUNT, K + 1), "out_features": besides(COUNT, N + 1), "projection": PROJECTION}
        | {"d_initial": NUMBER, "bias": FLAG, "dropout": PROBABILITY, **PLACEMENT, "adapter_dtype": DTYPE},
    ),
    Public(
        DvoraLinear.from_linear,
        "DvoraLinear.from_linear",
        always(linear=right.linear, projection=right.projection),
        {"linear": LINEAR, "projection": PROJECTION, "d_initial": NUMBER, "dropout": PROBABILITY},
    ),
    Public(DvoraLinear.forward, "DvoraLinear", always(self=right.dvora_layer, x=zeros(M, K)), {"x": X}),
    # models, and what is set for them
    Public(
        dora_kernels.options,
        "options",
        always(),
        {"backend": optional(choice(*BACKENDS)), "way": optional(choice(*WAYS))}
        | {"precision": optional(choice(*PRECISIONS))},
        enter=True,
    ),
    Public(
        dora_kernels.enable,
        "enable",
        always(model=peft_problem.build),
        {"model": MODEL, "dropout": optional(choice("adapter", "lora")), "fuse_shared_inputs": FLAG},
    ),
    Public(dora_kernels.disable, "disable", always(model=right.enabled), {"model": MODEL}),
    Public(dora_kernels.invalidate, "invalidate", always(model=right.enabled), {"model": MODEL}),
    Public(
        dora_kernels.frozen_adapters,
        "frozen_adapters",
        always(model=right.enabled),
        {"model": OURS, "keep_merged": FLAG},
        enter=True,
    ),
    Public(reuse.hold_adapters, "hold_adapters", always(model=right.enabled), {"model": OURS, "keep_merged": FLAG}),
    Public(trainer.FrozenAdaptersCallback, "FrozenAdaptersCallback", always(), {"keep_merged": FLAG}),
    Public(
        trainer.FrozenAdaptersCallback.on_train_begin,
        "on_train_begin",
        always(self=trainer.FrozenAdaptersCallback, model=right.enabled),
        {"model": MODEL},
    ),
    Public(
        trainer.FrozenAdaptersCallback.on_step_begin,
        "hold_adapters",
        always(self=trainer.FrozenAdaptersCallback, model=right.enabled),
        {"model": OURS},
    ),
    Public(
        dora_kernels.to_dvora,
        "to_dvora",
        always(model=vera_problem.vera_model),
        {"model": besides(MODEL, nn.Linear(K, N), called=("VeRA layer",), shown=("no VeRA layer",))}
        | {"adapter": Argument(["default"], [*TEXT.refuses, "", "other", "x" * 5000])},
    ),
    *EXTRAS,
)
