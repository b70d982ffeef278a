"""What is mutated, and the tests that must notice: what computes numbers, or refuses bad ones.

Not plan.py, tuned/ and configs.py: they choose among ways that compute the same, and are held by tests of the choice.
"""

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
)
_QUANTIZED = ("tests/test_quant.py", "tests/test_quantized.py")
_RESCALE = ("tests/test_rescale.py", "tests/test_dvora.py")
_SERVING = ("tests/test_serving.py",)
_SHARED = ("tests/test_shared_calls.py", "tests/test_shared_inputs.py")
_COMPOSED = (*_RESCALE, *_SERVING, *_SHARED)
# Single tests, named with "::", run for every mutant of the file: they compile it, or read it
SUBJECTS: dict[str, tuple[str, ...]] = {
    "dora_kernels/kernels/backward.py": (*_KERNELS, "tests/test_rescale.py"),
    "dora_kernels/kernels/bank.py": (*_KERNELS, *_SERVING),
    "dora_kernels/kernels/common.py": (*_KERNELS, *_SERVING),
    "dora_kernels/kernels/forward.py": (*_KERNELS, "tests/test_rescale.py"),
    "dora_kernels/kernels/grouped.py": (*_KERNELS, "tests/test_frozen_adapters.py"),
    "dora_kernels/kernels/norm.py": (*_KERNELS, "tests/test_quantized.py"),
    "dora_kernels/kernels/quant.py": (*_KERNELS, "tests/test_quantized.py"),
    "dora_kernels/kernels/weight.py": (*_KERNELS, "tests/test_quantized.py"),
    "dora_kernels/dvora/function.py": ("tests/test_dvora.py", "tests/test_quantized.py"),
    "dora_kernels/functional.py": (
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_fallback.py",
        "tests/test_ops.py",
        "tests/test_modules.py",
        "tests/test_reuse.py",
        "tests/test_quantized.py",
        *_SHARED,
    ),
    "dora_kernels/ops.py": (
        "tests/test_ops.py",
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_frozen_adapters.py",
        *_COMPOSED,
    ),
    "dora_kernels/passes.py": (
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_ops.py",
        "tests/test_reuse.py",
        "tests/test_nonfinite.py",
        *_COMPOSED,
    ),
    "dora_kernels/quant/formats.py": _QUANTIZED,
    "dora_kernels/quant/product.py": ("tests/test_dvora.py", *_QUANTIZED),
    "dora_kernels/reference.py": (
        "tests/test_reference.py",
        "tests/test_passes.py",
        "tests/test_nonfinite.py",
        "tests/test_functional.py",
        "tests/test_kernels.py",
        *_COMPOSED,
    ),
    "dora_kernels/rescale.py": (*_RESCALE, "tests/test_dropout.py"),
    "dora_kernels/serving.py": _SERVING,
    "dora_kernels/sharing.py": _SHARED,
    "dora_kernels/validate.py": (
        "tests/test_functional.py",
        "tests/test_rescale.py",
        "tests/test_dvora.py",
        "tests/test_modules.py",
        "tests/test_malformed.py",
        *_SERVING,
    ),
}
