"""The rows of public_functions.py for what is beside the layers: serving, tensor parallelism, analysis, checkpoints,
and the checks that users run.
"""

from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from dora_kernels import testing
from dora_kernels.extras import analysis, convert, merging, parallel, serving
from tests.support import merge_problem, peft_problem
from tests.support import right_values as right
from tests.support.right_values import NAMES, Public, always, inputs
from tests.support.wrong_values import (
    ADAPTER,
    ARRAY,
    BIAS,
    CALLABLE,
    COUNT,
    DTYPE,
    FILE,
    FLAG,
    LAYER,
    LIKE,
    MAPPING,
    MODEL,
    NORM,
    NOT_LISTS,
    NOT_SIZES,
    NUMBER,
    OURS,
    PATH,
    PLACEMENT,
    REAL,
    ROW,
    SEED,
    TEXT,
    WEIGHT,
    WIDE,
    X_DROPPED,
    Argument,
    Count,
    K,
    M,
    N,
    R,
    X,
    besides,
    choice,
    list_of,
    of_any_float,
    one_of,
    optional,
    tensor,
    zeros,
)

GROUP = optional(one_of(distributed.ProcessGroup))
PARTS = [(zeros(R, K), zeros(N, R), None, 1.0)]
FORMAT = one_of(convert.Format, "peft", convert.FORMATS)
ADAPTERS = list_of(right.adapter(), [right.adapter(), None], ["peft"], {"a": right.adapter()})
TWICE = [right.adapter(), right.adapter()]
NAME = besides(TEXT, "", "a.b")
PAIRS = list_of(("a", "b"), ["ab"], [("a",)], [("a", "b", "c")], [("a", 3)], [(b"a", b"b")], [("(", "b")], [(".*", "")])
HEADS = list_of((1,), (1, 2, 3), ("a", "b"), (0, 1), (1, -1), (True, 1), (1.0, 2), torch.Size([1]))
A_TENSOR = {"called": ("a is",), "shown": ("[1.0]",)}

EXTRAS = (
    # serving, and tensor parallelism in a group of one process
    Public(serving.norms_and_gains, "norms_and_gains", always(model=right.enabled), {"model": OURS, "progress": FLAG}),
    Public(
        serving.merge_model,
        "merge_model",
        always(model=right.enabled),
        {"model": besides(OURS, right.layer()), "progress": FLAG},
    ),
    Public(
        serving.AdapterBank,
        "AdapterBank",
        lambda _: vars(right.bank()).copy(),
        {"lora_A": besides(tensor(R, K, free=(1,), dtypes=WIDE), called=("lora_B",))}
        | {"lora_B": besides(tensor(1, N, R, dtypes=WIDE), called=("lora_A", "gain"))}
        | {"gain": tensor(1, N, dtypes=WIDE), "scaling": tensor(1, dtypes=WIDE)},
    ),
    Public(
        serving.AdapterBank.of,
        "AdapterBank.of",
        always(weight=zeros(N, K), adapters=PARTS),
        {
            "weight": WEIGHT,
            "adapters": besides(
                list_of([], [PARTS[0][:3]], [(*PARTS[0], 1)], [(*PARTS[0][:3], "1")], [(None, *PARTS[0][1:])]),
                *([(zeros(R, K), zeros(N, R + 1), None, 1.0)], [(zeros(R, K), zeros(N, R), zeros(N + 1), 1.0)]),
                called=("adapter",),
                shown=("is empty", "(8, 3)", "(9,)", "'t'"),
            ),
        },
    ),
    Public(
        serving.bank_linear,
        "bank_linear",
        right.bank_call,
        {
            "x": besides(X, zeros(M, K).requires_grad_(), called=("gradient", "index"), shown=("a gradient",)),
            "weight": besides(WEIGHT, zeros(N, K, dtype=torch.float64), called=("lora_A",)),
            "bank": one_of(serving.AdapterBank),
            "index": Argument([], [one for one in tensor(M).refuses if getattr(one, "dtype", 0) is not torch.int64]),
            "bias": besides(BIAS, zeros(N).requires_grad_(), called=("gradient",), shown=("a gradient",)),
        },
    ),
    Public(
        parallel.columnwise_dora_linear,
        "columnwise_dora_linear",
        right.in_a_group(*NAMES),
        LAYER | {"bias": BIAS, "group": GROUP, "x_dropped": X_DROPPED, "norm_grad": FLAG},
    ),
    Public(
        parallel.rowwise_dora_linear,
        "rowwise_dora_linear",
        right.in_a_group(*NAMES),
        LAYER | {"bias": BIAS, "group": GROUP, "x_dropped": X_DROPPED, "norm": NORM, "norm_grad": FLAG},
    ),
    Public(
        parallel.rowwise_norm,
        "rowwise_norm",
        right.in_a_group(*NAMES[1:4], "scaling"),
        ADAPTER | {"group": GROUP, "norm_grad": FLAG},
    ),
    Public(
        parallel.shard_dora_linear,
        "shard_dora_linear",
        always(layer=right.layer, mesh=right.mesh, split="row"),
        {
            "layer": besides(
                *(MODEL, nn.Linear(K, N), right.layer(dropout=0.5, dropout_on="lora")),
                called=("dropout_on",),
                shown=("'lora'",),
            ),
            "mesh": one_of(DeviceMesh),
            "split": choice("column", "row"),
        },
    ),
    # the analysis
    Public(
        analysis.analyze,
        "analyze",
        right.two_checkpoints,
        {
            "base": PATH,
            "tuned": Argument([], [*NOT_LISTS, [], Path("tuned"), [None], [3], [b"tuned"]], shown=("is empty",)),
            "targets": optional(Argument(["a", ""], [*TEXT.refuses, "(", "nowhere"], ("in whose name",))),
            "fan_in_fan_out": FLAG,
            "track": CALLABLE,
        },
    ),
    Public(
        analysis.analyze_model,
        "analyze_model",
        always(model=peft_problem.build),
        {"model": besides(MODEL, nn.Linear(K, N), shown=("nothing to compare",))}
        | {"pretrained": optional(besides(MODEL, nn.Linear(1, 1), shown=("nothing to compare",)))}
        | {"checkpoint": TEXT, "track": CALLABLE},
    ),
    Public(
        analysis.adapter_change,
        "adapter_change",
        inputs("weight", "lora_A", "lora_B", "scaling", "magnitude"),
        {"weight": of_any_float(tensor(N, K)), "lora_A": of_any_float(tensor(R, K)), "lora_B": ARRAY}
        | {"scaling": NUMBER, "magnitude": optional(of_any_float(ROW))},
    ),
    Public(
        analysis.weight_change,
        "weight_change",
        always(weight=right.matrix, tuned=right.matrix),
        dict.fromkeys(("weight", "tuned"), of_any_float(tensor(N, K))),
    ),
    Public(analysis.trend, "trend", always(points=right.points), {"points": list_of(right.points()[0], [3])}),
    Public(
        analysis.Point,
        "Point",
        always(layer="a", checkpoint="b", method="LoRA", delta_magnitude=0.1, delta_direction=0.2),
        dict.fromkeys(("layer", "checkpoint", "method"), TEXT)
        | dict.fromkeys(("delta_magnitude", "delta_direction"), REAL),
    ),
    Public(
        analysis.draw,
        "draw",
        right.figure,
        {"analysis": one_of(analysis.Analysis, right.points()), "path": FILE, "title": optional(TEXT)},
    ),
    # checkpoints
    Public(
        convert.convert_checkpoint,
        "convert",
        right.conversion,
        {"source": PATH, "out": PATH, "source_format": optional(choice("peft")), "base": optional(PATH), "fold": FLAG}
        | {"target_format": besides(choice("dora_kernels"), convert.FORMATS["peft"]), "adapter_name": NAME}
        | {"alpha": optional(Argument([], NUMBER.refuses)), "no_bias": Argument([True], FLAG.refuses)}
        | {"rename": besides(PAIRS, takes=([("mlp", "ff")], (["mlp", "ff"],), ()), shown=("no name",))}
        | {"heads": optional(besides(HEADS, takes=((2, 1), [2, 1], torch.Size([2, 1])))), "same_rows": FLAG}
        | {"allow_nonfinite": FLAG},
    ),
    Public(
        convert.read_adapters,
        "convert",
        right.adapters_on_disk,
        {"source": PATH, "source_format": optional(choice("peft")), "allow_nonfinite": FLAG}
        | {"alpha": optional(Argument([], NUMBER.refuses))},
    ),
    Public(
        merging.merge_checkpoint,
        "merge",
        merge_problem.merge_arguments,
        {"base": PATH, "adapter": PATH, "out": PATH, "source_format": optional(choice("dora_kernels"))}
        | {"alpha": optional(Argument([], NUMBER.refuses)), "rename": besides(PAIRS, takes=((),), shown=("no name",))}
        | {"heads": optional(Argument([], HEADS.refuses)), "same_rows": FLAG, "allow_nonfinite": FLAG}
        | {"check": Argument([0, 1, 2], [*NOT_SIZES]), "progress": optional(CALLABLE)},
    ),
    Public(
        convert.decode,
        "convert",
        always(row=convert.FORMATS["peft"], checkpoint=right.checkpoint),
        {"row": FORMAT, "checkpoint": one_of(convert.Checkpoint), "alpha": optional(Argument([], NUMBER.refuses))},
    ),
    Public(
        convert.encode,
        "convert",
        always(row=convert.FORMATS["llava"], adapters=[right.adapter()]),
        {
            "row": FORMAT,
            "adapters": besides(ADAPTERS, [right.adapter()] * 2, [], shown=("w1', 'layers", "is empty")),
            "adapter_name": NAME,
        },
    ),
    Public(
        convert.Checkpoint,
        "Checkpoint",
        always(tensors={"a": zeros(2)}),
        {"tensors": besides(MAPPING, {3: zeros(2)}, {"a": [1.0]}, {"a": zeros(2).to_sparse()}, **A_TENSOR)}
        | {"config": MAPPING, "header": MAPPING},
    ),
    Public(convert.table, "table", always(adapters=[right.adapter()]), {"adapters": ADAPTERS}),
    Public(
        convert.DoraAdapter,
        "",
        lambda _: vars(right.adapter()).copy(),
        {"module": TEXT, "lora_A": tensor(4, 10, free=(1,)), "scaling": besides(NUMBER, 0.0)}
        | {
            "lora_B": besides(tensor(6, 4), called=("magnitude",)),
            "magnitude": optional(tensor(6)),
            "norm_axis": choice("out"),
        },
    ),
    Public(
        convert.DoraAdapter.folded,
        "DoraAdapter.folded",
        always(self=right.adapter, rounding=True),
        {"rounding": FLAG},
    ),
    Public(
        convert.DoraAdapter.same,
        "DoraAdapter.same",
        always(self=right.adapter, other=right.adapter),
        {"other": one_of(convert.DoraAdapter)},
    ),
    # checks for users
    Public(
        testing.check_gradients,
        "check_gradients",
        right.check_function,
        {
            "function": besides(CALLABLE, len, testing.rms_error, called=("inputs",)),
            "inputs": Argument([], [None, 3, "x", [], {}, {"x": zeros(3, 5)}, {3: zeros(3)}, {"y": 1}, zeros(3, 5)]),
            "reference": optional(CALLABLE),
            "dy": optional(tensor(3, 4)),
            "finite_differences": Argument([], FLAG.refuses),
            "seed": SEED,
        },
    ),
    Public(
        testing.check_layer,
        "check_layer",
        always(layer=right.peft_layer),
        {"layer": MODEL, "x": optional(Argument([], [3, "x", [1.0], torch.float32, object(), nn.Linear])), "seed": SEED}
        | {"randomise": Argument([True], FLAG.refuses)},
    ),
    Public(testing.dora_layers, "dora_layers", always(model=peft_problem.build), {"model": MODEL}),
    Public(
        testing.compare,
        "compare",
        right.errors("name", "actual", "yardstick", "exact"),
        {"name": TEXT, "actual": LIKE, "yardstick": LIKE, "exact": LIKE, "through": of_any_float(DTYPE)},
    ),
    Public(testing.rms_error, "rms_error", right.errors("actual", "exact"), {"actual": LIKE, "exact": LIKE}),
    Public(
        testing.geometric_mean,
        "geometric_mean",
        always(ratios=[1.0, 2.0]),
        {
            "ratios": besides(
                list_of([], [0.0], [1, -1.0], ["1"], [float("nan")], [float("inf")], [True]),
                takes=((1, 2.0), [Count.TWO]),
            )
        },
    ),
    Public(
        testing.random_inputs,
        "random_inputs",
        always(M=M, N=N, K=K, R=R),
        dict.fromkeys(("M", "N", "K", "R"), COUNT)
        | {"adapter_dtype": DTYPE, "scaling": NUMBER, "update": optional(NUMBER), "bias": FLAG}
        | {
            "device": PLACEMENT["device"],
            "dtype": Argument([], [None, *DTYPE.refuses]),
        }
        | {"generator": optional(one_of(torch.Generator))},
    ),
)
