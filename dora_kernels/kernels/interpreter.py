"""Repairs of Triton's CPU interpreter, so that it computes what a GPU computes.

Under `TRITON_INTERPRET=1` Triton runs kernels on CPU tensors with NumPy. NumPy has no bfloat16, so the
interpreter keeps a bf16 tensor as its uint16 bit patterns, and in every release seen (3.6.0 to 3.9.0)
`tl.dot`, arithmetic, comparisons and sums of bf16 work on those integers without an error, and
float32 -> bfloat16 truncates. A kernel could cast to float32 before each dot, but that would cost it the
tensor cores on a GPU. `repair()` mends the interpreter instead; kernels stay as the GPU wants them.

What a repaired interpreter does:
    bf16 arithmetic, comparison, fma   in float32, then rounded to nearest even (each operation by itself)
    mask & a scalar comparison         a mask; upstream makes integers of it, which loads refuse from 3.9 on
    bf16 casts                         through float32, as in torch: rounds to nearest even, overflows to inf,
                                       keeps inf, NaN, -0 and subnormals; "rtz" truncates
    tl.sum of bf16                     in float32, rounded once at the end
    tl.dot on bf16                     float32 operands and accumulator; bf16 products are exact there
    a float kernel argument            a float32 scalar, as on a GPU (bf16 * argument is float32), but float64
                                       where it meets float64: a float64 gradient check then sees the scaling
                                       that it asked for (a GPU would round it to float32)
    input_precision bf16x3, bf16x6     accepted; computed in float32, like "tf32" and "ieee"
    range() over a run-time bound      works with NumPy >= 2.4 on Triton 3.6 too (3.7 mended that itself)
    kernels from several threads       one at a time: the program id and triton.language are process-wide state

What stays different from a GPU: the order of sums, fma contraction, the rounding of TF32 and bf16x3, atomics
on bf16, races, shared memory limits, inline assembly.
"""

import dataclasses
import functools
import importlib.util
import threading

try:
    import numpy as np
except ImportError:  # Triton's interpreter needs NumPy; torch and Triton on a GPU do not
    np = None

_repaired = False


def repair() -> bool:
    """Repair the interpreter of the installed Triton; True when it is in use and repaired.

    In use means TRITON_INTERPRET=1 when kernels are defined. Idempotent; does nothing without Triton or when
    kernels are compiled for a GPU.
    """
    global _repaired
    if _repaired:
        return True
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    if not triton.knobs.runtime.interpret:
        return False
    from triton.runtime import interpreter

    _repair_builder(interpreter)
    _repair_sum(interpreter)
    _repair_arguments(interpreter)
    _repair_threads(interpreter)
    _repaired = True
    return True


def bf16_to_float32(bits: "np.ndarray") -> "np.ndarray":
    """The float32 values, exact, of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: "np.ndarray", toward_zero: bool = False) -> "np.ndarray":
    """The bfloat16 bit patterns (uint16) of float32 `values`, rounded to nearest even (or toward zero).

    Other real dtypes are rounded to float32 first.
    """
    with np.errstate(over="ignore"):  # out of float32's range is inf, as on a GPU
        bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    # Add just under half of the last place kept, plus its parity: halfway cases go to the even neighbour, and
    # a carry into the exponent is the right result (up to inf). NaN is apart: a carry could turn it into -0.
    rounded = bits if toward_zero else bits + (0x7FFF + ((bits >> 16) & 1))
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x0040, rounded >> 16).astype(np.uint16)


def _repair_builder(interpreter) -> None:
    """Casts, elementwise operations and dots of `InterpreterBuilder`."""
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast_impl, create_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    binary_op, create_fma, create_dot = builder.binary_op, builder.create_fma, builder.create_dot
    create_splat = builder.create_splat

    def is_bf16(arg) -> bool:
        return arg.dtype.scalar == tl.bfloat16

    def widened(arg):
        return handle(bf16_to_float32(arg.data), tl.float32) if is_bf16(arg) else arg

    def narrowed(arg):  # what a comparison returns holds bool, and stays so
        return arg if arg.data.dtype == np.bool_ else handle(float32_to_bf16(arg.data), tl.bfloat16)

    def through_float32(operation):
        """`operation` on handles, done in float32 and rounded to bf16 when its last operand is bf16."""

        @functools.wraps(operation)
        def wrapped(self, *args):
            operands = [arg for arg in args if isinstance(arg, handle)]
            if not is_bf16(operands[-1]):
                return operation(self, *args)
            with np.errstate(all="ignore"):  # a GPU does not warn of inf and NaN
                return narrowed(operation(self, *[widened(a) if isinstance(a, handle) else a for a in args]))

        return wrapped

    def repaired_cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and not is_bf16(src):
            return handle(float32_to_bf16(src.data), tl.bfloat16)
        if dst_type.scalar == tl.float64 and "float64" in src.attr:
            return handle(src.attr["float64"], tl.float64)
        return cast_impl(self, widened(src), dst_type)

    def repaired_fp_to_fp(self, src, dst_type, rounding_mode):  # only float8 and fp_downcast_rounding="rtz"
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return handle(float32_to_bf16(src.data, toward_zero=True), tl.bfloat16)
        return create_fp_to_fp(self, src, dst_type, rounding_mode)

    def repaired_dot(self, a, b, d, *precision):
        return create_dot(self, widened(a), widened(b), d, *precision)

    def repaired_splat(self, block_type, scalar):
        # a comparison holds bool and is typed as what it compared: its splat would hold that type
        block = create_splat(self, block_type, scalar)
        return handle(block.data.astype(np.bool_), tl.int1) if scalar.data.dtype == np.bool_ else block

    builder.cast_impl = repaired_cast_impl
    builder.create_fp_to_fp = repaired_fp_to_fp
    builder.create_dot = repaired_dot
    builder.binary_op = through_float32(binary_op)
    builder.create_fma = through_float32(create_fma)
    builder.create_splat = repaired_splat
    if hasattr(builder, "create_fneg"):  # before 3.8 -a is 0 - a
        builder.create_fneg = through_float32(builder.create_fneg)
    # the constant in `bf16_tile * 2.0`: upstream has no such method
    builder.get_bf16 = lambda self, value: handle(float32_to_bf16(np.array([value])), tl.bfloat16)

    options = interpreter.interpreter_builder.options
    precisions = dict.fromkeys((*options.allowed_dot_input_precisions, "bf16x3", "bf16x6"))
    interpreter.interpreter_builder.options = dataclasses.replace(
        options, allowed_dot_input_precisions=tuple(precisions)
    )


def _repair_sum(interpreter) -> None:
    """`tl.sum` of bf16.

    The other reductions need nothing: Triton's max, min and cumsum cast bf16 to float32 themselves, and a
    reduction with the caller's own function applies the repaired operations to one element at a time.
    """
    import triton.language as tl

    handle, sum_ = interpreter.TensorHandle, interpreter.ReduceOps.sum

    def recast(tensor, data, dtype):
        block = tensor.type.is_block()
        return tl.tensor(handle(data, dtype), tensor.type.with_element_ty(dtype) if block else dtype)

    def repaired_sum(self, values):
        if values.dtype != tl.bfloat16:
            return sum_(self, values)
        total = sum_(self, recast(values, bf16_to_float32(values.handle.data), tl.float32))
        return recast(total, float32_to_bf16(total.handle.data), tl.bfloat16)

    interpreter.ReduceOps.sum = repaired_sum


def _repair_arguments(interpreter) -> None:
    """Float arguments of a kernel, and run-time integers as the bound of `range`."""
    import triton.language as tl

    implicit_cvt, patch_lang_tensor = interpreter._implicit_cvt, interpreter._patch_lang_tensor

    def repaired_implicit_cvt(arg):
        # Upstream leaves a Python float as it is, and Triton's promotion then takes it for a literal:
        # fp16 * argument is fp16, where the same line compiled for a GPU is float32.
        if not isinstance(arg, float):
            return implicit_cvt(arg)
        with np.errstate(over="ignore"):
            value = np.array([arg], dtype=np.float32)
        attr = {"float64": np.array([arg], dtype=np.float64)}
        return tl.tensor(interpreter.TensorHandle(value, tl.float32, attr), tl.float32)

    def repaired_patch_lang_tensor(tensor, scope):
        patch_lang_tensor(tensor, scope)
        # NumPy 2.4 refuses int() of an array of shape (1,), which is what the interpreter's scalars are
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._implicit_cvt = repaired_implicit_cvt
    interpreter._patch_lang_tensor = repaired_patch_lang_tensor


def _repair_threads(interpreter) -> None:
    """A kernel runs alone: upstream patches triton.language while it runs, and takes that back for all threads."""
    run, lock = interpreter.InterpretedFunction.run, threading.Lock()

    @functools.wraps(run)
    def repaired_run(self, *arguments, **keywords):
        with lock:
            return run(self, *arguments, **keywords)

    interpreter.InterpretedFunction.run = repaired_run
