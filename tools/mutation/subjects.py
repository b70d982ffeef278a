"""What is mutated, and the tests that must notice: what computes numbers, or refuses bad ones."""

_KERNELS = (
    "tests/test_kernels.py",
    "tests/test_bounds.py",
    "tests/test_accumulation.py",
    "tests/test_passes.py",
    "tests/test_addresses.py",
    "tests/test_compile_kernels.py::test_every_kernel_compiles",
    "tests/test_compile_kernels.py::test_norm_and_gain_are_rounded_to_nearest",
    "tests/test_nonfinite.py",
    "tests/test_functional.py",
    # in processes of their own, where nobody sees which lines they run
    "tests/test_guard_pages.py::test_every_launcher_stays_inside",
    "tests/test_guard_pages.py::test_every_quantised_weight_is_read_inside",
)
_PARTS = ("tests/test_parts.py", "tests/test_memory_safety.py")
_QUANTIZED = ("tests/test_quant.py", "tests/test_quantized.py")
_RESCALE = ("tests/test_rescale.py", "tests/test_dvora.py")
_SERVING = ("tests/test_serving.py",)
_SECOND = ("tests/test_second_derivatives.py", "tests/test_second_derivatives_of_layers.py")
_SHARED = ("tests/test_shared_calls.py", "tests/test_shared_inputs.py")
_COMPOSED = (*_RESCALE, *_SERVING, *_SHARED)
# Single tests, named with "::", run for every mutant of the file: they compile it, or read it
SUBJECTS: dict[str, tuple[str, ...]] = {
    "dora_kernels/kernels/backward.py": (*_KERNELS, "tests/test_rescale.py"),
    "dora_kernels/kernels/bank.py": (*_KERNELS, *_SERVING, *_PARTS),
    "dora_kernels/kernels/common.py": (*_KERNELS, *_SERVING),
    "dora_kernels/kernels/forward.py": (*_KERNELS, "tests/test_rescale.py"),
    "dora_kernels/kernels/grouped.py": (*_KERNELS, "tests/test_frozen_adapters.py"),
    "dora_kernels/kernels/norm.py": (*_KERNELS, "tests/test_quantized.py"),
    "dora_kernels/kernels/quant.py": (*_KERNELS, *_PARTS, "tests/test_quantized.py"),
    "dora_kernels/kernels/weight.py": (*_KERNELS, "tests/test_quantized.py"),
    "dora_kernels/autograd.py": (
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_ops.py",
        "tests/test_modules.py",
        "tests/test_quantized.py",
        "tests/test_unseen_writes.py",
        *_SHARED,
        *_SECOND,
    ),
    "dora_kernels/derivatives.py": _SECOND,
    "dora_kernels/dvora/function.py": ("tests/test_dvora.py", "tests/test_quantized.py", "tests/test_scaling_range.py"),
    "dora_kernels/functional.py": (
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_fallback.py",
        "tests/test_ops.py",
        "tests/test_modules.py",
        "tests/test_reuse.py",
        "tests/test_quantized.py",
        *_PARTS,
        "tests/test_scaling_range.py",
        *_SECOND,
        *_SHARED,
    ),
    "dora_kernels/ops.py": (
        "tests/test_ops.py",
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_frozen_adapters.py",
        "tests/test_modules.py",
        *_COMPOSED,
    ),
    "dora_kernels/passes.py": (
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_ops.py",
        "tests/test_reuse.py",
        "tests/test_nonfinite.py",
        "tests/test_scaling_range.py",
        *_COMPOSED,
    ),
    "dora_kernels/quant/formats.py": (*_QUANTIZED, *_PARTS),
    "dora_kernels/quant/parts.py": (*_PARTS, *_QUANTIZED),
    "dora_kernels/quant/product.py": ("tests/test_dvora.py", *_QUANTIZED),
    "dora_kernels/reference.py": (
        "tests/test_reference.py",
        "tests/test_passes.py",
        "tests/test_nonfinite.py",
        "tests/test_functional.py",
        "tests/test_kernels.py",
        *_PARTS,
        "tests/test_scaling_range.py",
        *_SECOND,
        *_COMPOSED,
    ),
    "dora_kernels/rescale.py": (*_RESCALE, "tests/test_dropout.py", *_SECOND),
    "dora_kernels/serving.py": (
        *_SERVING,
        *_PARTS,
        "tests/test_merging.py::test_a_convolution_that_no_weight_can_stand_for_is_left",
    ),
    "dora_kernels/sharing.py": (*_SHARED, *_SECOND, "tests/test_tracing.py"),
    "dora_kernels/tracing.py": ("tests/test_tracing.py", *_SECOND),
    "dora_kernels/validate.py": (
        "tests/test_functional.py",
        "tests/test_rescale.py",
        "tests/test_dvora.py",
        "tests/test_modules.py",
        "tests/test_malformed.py",
        "tests/test_scaling_range.py",
        *_SECOND,
        *_PARTS,
        *_SERVING,
    ),
}

_CHOICE = "chooses among ways that compute the same: speed and memory, and tests of the choice itself"
_LIBRARIES = "puts our calls under other libraries' layers: their tests are too slow to run by the hundred"
_SHELL = "what a person runs and reads"
# Files and folders of the package that are not mutated: every file is in one of the two tables
NOT_MUTATED: dict[str, str] = {
    "dora_kernels/__init__.py": "names",
    "dora_kernels/__main__.py": _SHELL,
    "dora_kernels/adapters/": _LIBRARIES,
    "dora_kernels/analysis/": _SHELL,
    "dora_kernels/checkpoints.py": _LIBRARIES,
    "dora_kernels/cli.py": _SHELL,
    "dora_kernels/configs.py": _CHOICE,
    "dora_kernels/convert/": _LIBRARIES,
    "dora_kernels/demo/": _SHELL,
    "dora_kernels/dvora/__init__.py": "names",
    "dora_kernels/dvora/module.py": "holds parameters for dvora/function.py",
    "dora_kernels/interpreter.py": "of the tests: without it the kernels' own fail",
    "dora_kernels/kernels/__init__.py": "names",
    "dora_kernels/launch.py": _CHOICE,
    "dora_kernels/mergeable.py": "holds parameters for functional.py",
    "dora_kernels/modules.py": "holds parameters for functional.py",
    "dora_kernels/parallel.py": "processes: too slow to run by the hundred",
    "dora_kernels/plan.py": _CHOICE,
    "dora_kernels/quant/__init__.py": "names",
    "dora_kernels/quant/bitsandbytes_cpu.py": _LIBRARIES,
    "dora_kernels/quant/readers.py": _LIBRARIES,
    "dora_kernels/reuse/": "keeps what was computed: held by tests of when it must not, with other libraries' layers",
    "dora_kernels/testing/": "of the tests",
    "dora_kernels/trainer.py": _LIBRARIES,
}
