"""The files that are mutated, and the tests that must notice: they compute numbers, or refuse bad ones."""

_KERNELS = (
    "tests/kernels/test_steps.py",
    "tests/kernels/test_grouped_norm.py",
    "tests/kernels/test_stored_weight.py",
    "tests/kernels/test_epilogue.py",
    "tests/kernels/test_token_sums.py",
    "tests/kernels/test_tile.py",
    "tests/kernels/test_bounds.py",
    "tests/kernels/test_accumulation.py",
    "tests/test_passes.py",
    "tests/kernels/test_addresses.py",
    "tests/tools/test_compile_kernels.py::test_every_kernel_compiles",
    "tests/tools/test_compile_kernels.py::test_norm_and_gain_are_rounded_to_nearest",
    "tests/functional/test_nonfinite.py",
    "tests/functional/test_functional.py",
    # in processes of their own, where nobody sees which lines they run
    "tests/tools/test_guard_pages.py::test_every_launcher_stays_inside",
    "tests/tools/test_guard_pages.py::test_every_quantised_weight_is_read_inside",
)
_NORMS = ("tests/kernels/test_norm.py", "tests/kernels/test_merged_forward.py")
_PARTS = ("tests/quant/test_parts.py", "tests/functional/test_memory_safety.py")
_QUANTIZED = ("tests/quant/test_quant.py", "tests/quant/test_quantized.py")
_RESCALE = ("tests/functional/test_rescale.py", "tests/extras/test_dvora.py")
_HOPPER = ("tests/kernels/test_hopper.py", "tests/kernels/test_steps.py")
_LAUNCHED = "tests/kernels/test_hopper.py::test_what_is_launched_fits_a_multiprocessor"
_SIDE = "tests/kernels/test_side.py"
_SERVING = ("tests/extras/test_serving.py",)
_SECOND = ("tests/functional/test_second_derivatives.py", "tests/functional/test_second_derivatives_of_layers.py")
_SHARED = ("tests/reuse/test_shared_calls.py", "tests/reuse/test_shared_inputs.py")
_COMPOSED = (*_RESCALE, *_SERVING, *_SHARED)
_STEPS = (
    "tests/kernels/test_steps.py",
    "tests/test_reference.py",
    "tests/test_pytorch.py",
    "tests/test_gemm.py",
    "tests/test_passes.py",
    "tests/functional/test_nonfinite.py",
    "tests/functional/test_functional.py",
    "tests/kernels/test_grouped_norm.py",
    *_PARTS,
    "tests/functional/test_scaling_range.py",
    *_SECOND,
    *_COMPOSED,
)
# Single tests, named with "::", run for every mutant of the file: they compile it, or read it
SUBJECTS: dict[str, tuple[str, ...]] = {
    "dora_kernels/kernels/bank_epilogue.py": (*_KERNELS, *_SERVING, *_PARTS),
    "dora_kernels/kernels/epilogue.py": (*_KERNELS, "tests/functional/test_rescale.py"),
    "dora_kernels/kernels/four_bits.py": (*_KERNELS, *_PARTS, "tests/quant/test_quantized.py"),
    "dora_kernels/kernels/grouped_norm.py": (*_KERNELS, "tests/reuse/test_frozen_adapters.py"),
    "dora_kernels/kernels/dx.py": _HOPPER,
    "dora_kernels/kernels/fused_forward.py": _HOPPER,
    "dora_kernels/kernels/hopper/gemm.py": (
        "tests/kernels/test_hopper_protocol.py::test_the_kernel_is_right_in_any_order_of_events",
    ),
    "dora_kernels/kernels/hopper/launch.py": (*_HOPPER, _LAUNCHED),
    "dora_kernels/kernels/launches.py": ("tests/kernels/test_launches.py::test_launches", *_KERNELS),
    "dora_kernels/kernels/merged_forward.py": (*_NORMS, *_KERNELS),
    "dora_kernels/kernels/norm.py": (*_NORMS, *_KERNELS, "tests/quant/test_quantized.py"),
    "dora_kernels/kernels/outer_product.py": (*_KERNELS, _SIDE),
    "dora_kernels/kernels/parts.py": (*_KERNELS, "tests/kernels/test_float32_parts.py"),
    "dora_kernels/kernels/project.py": (*_KERNELS, _SIDE),
    "dora_kernels/kernels/side.py": (_SIDE,),
    "dora_kernels/kernels/stored_weight.py": (
        *_KERNELS,
        *_PARTS,
        "tests/quant/test_quantized.py",
        "tests/tools/test_compile_kernels.py::test_a_merge_beside_the_squares_of_its_rows_spills_nothing",
    ),
    "dora_kernels/kernels/shares.py": (*_KERNELS, "tests/kernels/test_shares.py"),
    "dora_kernels/kernels/tile.py": (*_KERNELS, *_SERVING, _SIDE),
    "dora_kernels/kernels/token_sums.py": (*_KERNELS, "tests/functional/test_rescale.py", _SIDE),
    "dora_kernels/kernels/merge.py": (*_NORMS, *_KERNELS, "tests/quant/test_quantized.py"),
    "dora_kernels/functional/autograd.py": (
        "tests/test_passes.py",
        "tests/functional/test_functional.py",
        "tests/test_ops.py",
        "tests/test_modules.py",
        "tests/quant/test_quantized.py",
        "tests/reuse/test_unseen_writes.py",
        *_SHARED,
        *_SECOND,
    ),
    "dora_kernels/functional/derivatives.py": _SECOND,
    "dora_kernels/functional/weight.py": (
        "tests/functional/test_functional.py",
        "tests/functional/test_rescale.py",
        "tests/test_modules.py",
        "tests/quant/test_quantized.py",
        "tests/functional/test_scaling_range.py",
        *_PARTS,
        *_SECOND,
    ),
    "dora_kernels/extras/dvora/function.py": (
        "tests/extras/test_dvora.py",
        "tests/quant/test_quantized.py",
        "tests/functional/test_scaling_range.py",
    ),
    "dora_kernels/functional/linear.py": (
        "tests/test_passes.py",
        "tests/functional/test_functional.py",
        "tests/planning/test_fallback.py",
        "tests/test_ops.py",
        "tests/test_modules.py",
        "tests/reuse/test_reuse.py",
        "tests/quant/test_quantized.py",
        *_PARTS,
        "tests/functional/test_scaling_range.py",
        *_SECOND,
        *_SHARED,
    ),
    "dora_kernels/ops.py": (
        "tests/test_ops.py",
        "tests/test_passes.py",
        "tests/functional/test_functional.py",
        "tests/reuse/test_frozen_adapters.py",
        "tests/test_modules.py",
        *_COMPOSED,
    ),
    "dora_kernels/passes.py": (
        "tests/test_passes.py",
        "tests/functional/test_functional.py",
        "tests/test_ops.py",
        "tests/reuse/test_reuse.py",
        "tests/functional/test_nonfinite.py",
        "tests/functional/test_scaling_range.py",
        *_COMPOSED,
    ),
    "dora_kernels/quant/formats.py": (*_QUANTIZED, *_PARTS),
    "dora_kernels/quant/layouts.py": ("tests/reuse/test_kept.py", *_PARTS),
    "dora_kernels/quant/parts.py": (*_PARTS, *_QUANTIZED),
    "dora_kernels/quant/product.py": ("tests/extras/test_dvora.py", *_QUANTIZED),
    "dora_kernels/gemm.py": _STEPS,
    "dora_kernels/pytorch.py": _STEPS,
    "dora_kernels/reference.py": ("tests/kernels/test_steps.py", "tests/test_reference.py"),
    "dora_kernels/functional/rescale.py": (*_RESCALE, "tests/functional/test_dropout.py", *_SECOND),
    "dora_kernels/extras/serving.py": (
        *_SERVING,
        *_PARTS,
        "tests/adapters/test_merging.py::test_a_convolution_that_no_weight_can_stand_for_is_left",
    ),
    "dora_kernels/reuse/kept.py": ("tests/reuse/test_kept.py", "tests/reuse/test_reuse.py"),
    "dora_kernels/reuse/sharing.py": (*_SHARED, *_SECOND, "tests/functional/test_tracing.py"),
    "dora_kernels/functional/signature.py": (
        "tests/functional/test_signature.py",
        "tests/functional/test_malformed.py",
    ),
    "dora_kernels/functional/tracing.py": ("tests/functional/test_tracing.py", *_SECOND),
    "dora_kernels/functional/arguments.py": (
        "tests/functional/test_malformed.py",
        "tests/functional/test_scaling_range.py",
        "tests/test_modules.py",
        "tests/extras/test_dvora.py",
    ),
    "dora_kernels/functional/validate.py": (
        "tests/functional/test_functional.py",
        "tests/functional/test_rescale.py",
        "tests/extras/test_dvora.py",
        "tests/test_modules.py",
        "tests/functional/test_malformed.py",
        "tests/functional/test_scaling_range.py",
        *_SECOND,
        *_PARTS,
        *_SERVING,
    ),
}

_CHOICE = "chooses among ways that compute the same: speed and memory, and tests of the choice itself"
_LIBRARIES = "puts our calls under other libraries' layers: their tests are too slow to run by the hundred"
_KEEPS = "keeps what was computed: held by tests of when it must not, with other libraries' layers"
_SHELL = "what a person runs and reads"
# Files and folders of the package that are not mutated: every file is in one of the two tables
NOT_MUTATED: dict[str, str] = {
    "dora_kernels/__init__.py": "names",
    "dora_kernels/__main__.py": _SHELL,
    "dora_kernels/adapters/": _LIBRARIES,
    "dora_kernels/cli/": _SHELL,
    "dora_kernels/extras/__init__.py": "names",
    "dora_kernels/extras/analysis/": _SHELL,
    "dora_kernels/extras/checkpoint_files.py": _LIBRARIES,
    "dora_kernels/extras/convert/": _LIBRARIES,
    "dora_kernels/extras/demo/": _SHELL,
    "dora_kernels/extras/dvora/__init__.py": "names",
    "dora_kernels/extras/dvora/module.py": "holds parameters for extras/dvora/function.py",
    "dora_kernels/extras/dvora/peft.py": _LIBRARIES,
    "dora_kernels/extras/parallel.py": "processes: too slow to run by the hundred",
    "dora_kernels/extras/trainer.py": _LIBRARIES,
    "dora_kernels/functional/__init__.py": "names",
    "dora_kernels/kernels/__init__.py": "names",
    "dora_kernels/kernels/hopper/__init__.py": "names",
    "dora_kernels/kernels/hopper/language.py": "names",
    "dora_kernels/kernels/interpreter.py": "of the tests: without it the kernels' own fail",
    "dora_kernels/modules.py": "holds parameters for functional/",
    "dora_kernels/planning/": _CHOICE,
    "dora_kernels/quant/__init__.py": "names",
    "dora_kernels/quant/bitsandbytes_cpu.py": _LIBRARIES,
    "dora_kernels/quant/readers.py": _LIBRARIES,
    "dora_kernels/reuse/__init__.py": "names",
    "dora_kernels/reuse/constants.py": _KEEPS,
    "dora_kernels/reuse/layers.py": _KEEPS,
    "dora_kernels/reuse/regions.py": _KEEPS,
    "dora_kernels/reuse/scope.py": _KEEPS,
    "dora_kernels/reuse/store.py": _KEEPS,
    "dora_kernels/testing/": "of the tests",
    "dora_kernels/types.py": "names",
}
