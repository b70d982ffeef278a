"""The mutants that no test can or should kill."""

from __future__ import annotations

from dataclasses import dataclass

from mutation.changes import Mutant


@dataclass(frozen=True)
class Excluded:
    """Mutants that no test can or should kill: in a function of a file ("" is the top level), on a line that holds
    `source`, whose change is one of `changes`, or whose original begins with one. "" is every change of the function.
    """

    path: str
    function: str
    source: str
    changes: tuple[str, ...]
    reason: str

    def covers(self, mutant: Mutant) -> bool:
        """True if this row excludes the mutant."""
        same = (self.path, self.function) == (mutant.path, mutant.function) and self.source in mutant.source
        return same and (mutant.change in self.changes or mutant.original.startswith(self.changes))


_BANK, _EPILOGUE, _FOUR_BITS, _GROUPED_NORM, _MERGE, _NORM, _PROJECT, _SHARES, _STORED, _TILE, _TOKEN_SUMS = (
    f"dora_kernels/kernels/{name}.py"
    for name in (
        *("bank_epilogue", "epilogue", "four_bits", "grouped_norm", "merge", "norm"),
        *("project", "shares", "stored_weight", "tile", "token_sums"),
    )
)
_DVORA, _FORMATS, _OPS = (f"dora_kernels/{name}.py" for name in ("extras/dvora/function", "quant/formats", "ops"))
_AUTOGRAD, _WEIGHT_FUNCTIONS = (f"dora_kernels/functional/{name}.py" for name in ("autograd", "weight"))
_GEMM, _PYTORCH, _REFERENCE = (f"dora_kernels/{name}.py" for name in ("gemm", "pytorch", "reference"))
_SERVING, _SHARING, _STARTS = (
    f"dora_kernels/{name}.py" for name in ("extras/serving", "reuse/sharing", "extras/starts")
)
_MASKED = "what is loaded outside the mask is not stored, and not summed over"
_NO_QUOTIENT = "the quotient of a row whose norm is 0 is not used; another row is divided by its norm, which is 1"
_NO_TENSOR = "strides, a rank or a scaling of a tensor that is not there"
_INT64 = "the other operand is int64 already; each of the two alone is enough"
_CAST = "Triton promotes, and casts to what it stores to, by itself"
_GRADIENT = "autograd casts a gradient to the dtype of what it is the gradient of, by itself"
_TILES = "which of two tables of tiles, or a loop of one step: speed"
_SPLITS = "into how many parts a sum is split: speed, and the order of the sum"
_SPEED = "which of two ways to the same numbers: speed"
_NO_STATISTICS = "a batch norm that takes no statistics leaves them and their momentum alone"
_BETA = "beta times zeros"
_BLOCKS = "how large a block of rows is: memory and speed"
_LINEAR = "autocast casts the operands of torch's own linear by itself"
_MESSAGE = "how many rows a message names"
_GROUPS_OF_ONE = "a group of one weight, reshaped or not"
_WHOLE_ROWS = "the general formula where a shorter one would do: speed"
_HINT = "a hint to the compiler, which the interpreter does not read"
_FEW = "there are fewer tiles than 2**30"
_NO_REST = "beside a basis of the whole space there is only rounding"
_ONE_DEVICE = "all are on one device"
_ON_A_GPU = "asked on a GPU alone"
_PROMOTED = "another factor has the dtype already, and torch promotes"
_NO_FEATURES = "layers without in features may share their lows or not: those are 0"
EXCLUDED = (
    Excluded(_TOKEN_SUMS, "_token_sums_kernel", "tl.load(gain_ptr", ("0.0 -> 1.0",), _MASKED),
    Excluded(_TOKEN_SUMS, "_finish", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_TOKEN_SUMS, "_dB_of_dz", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_EPILOGUE, "_epilogue_kernel", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_SHARES, "add_parts", "acc += tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_MERGE, "_merge_kernel", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_TILE, "load_vector", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_BANK, "_bank_epilogue_kernel", "gain = tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_BANK, "_bank_epilogue_kernel", "load_vector(bias", ("load_vector(",), _CAST),
    Excluded(_BANK, "_bank_epilogue_kernel", "tl.store(", ("y.to(",), _CAST),
    Excluded(_BANK, "_plan", "ONE_CHUNK=", ("R <=",), _TILES),
    Excluded(_GROUPED_NORM, "_grouped_norm_kernel", "magnitude = tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_GROUPED_NORM, "_grouped_norm_kernel", "magnitude = tl.load(", ("tl.load(",), _CAST),
    Excluded(_GROUPED_NORM, "_grouped_norm_kernel", "tl.multiple_of(", ("16",), _HINT),
    Excluded(_GROUPED_NORM, "_grouped_norm_kernel", "if ALIGNED:", ("ALIGNED",), _HINT),
    Excluded(_GROUPED_NORM, "_grouped_norm_kernel", "tile = tl.", ("tl.program_id(0).to",), _FEW),
    Excluded(_GROUPED_NORM, "_plan", "STAGES=", ("aligned",), _TILES),
    Excluded(_GROUPED_NORM, "_to_device", "return", ("tensor.to(", "True"), "on a CPU the tensor is there already"),
    Excluded(_FOUR_BITS, "_nibbles", "tl.multiple_of(", ("BLOCK_K // 2 -> (BLOCK_K * 2)", "2 -> 3 (2)"), _HINT),
    Excluded(_FOUR_BITS, "_load_numbers", "mask=mask, other=0", ("0 -> 1",), _MASKED),
    Excluded(_FOUR_BITS, "nf4_torchao", "tl.where(mask, factor, 1.0)", ("1.0 -> 0.0",), _MASKED),
    Excluded(_FOUR_BITS, "nf4_torchao", "tl.where(mask, scale, 0.0)", ("0.0 -> 1.0",), _MASKED),
    Excluded(_FOUR_BITS, "codebook4", "mask=mask, other=", ("0.0 -> 1.0",), _MASKED),
    Excluded(_FOUR_BITS, "codebook4", "absmax = tl.where(", ("0.0 -> 1.0",), _MASKED),
    Excluded(
        _DVORA,
        "dvora_update",
        "return",
        ("lambda_b.to(dtype) -> lambda_b", "vera_B.to(dtype) -> vera_B", "lambda_d.to("),
        _PROMOTED,
    ),
    Excluded(_DVORA, "", "_BLOCK_ROWS =", ("1024",), _BLOCKS),
    Excluded(_DVORA, "norm_terms", "if P <", ("P < weight.shape[1]",), _NO_REST),
    Excluded(_FORMATS, "", "_BLOCK_ELEMENTS =", ("1", "18", "24"), _BLOCKS),
    Excluded(_FORMATS, "QuantizedWeight.dequantize", "if stop - start <= step", ("stop - start <=",), _SPEED),
    Excluded(
        _FORMATS,
        "_nf4_torchao",
        "scale = (scalers",
        ("(scalers[block:last_block] / factor[outer]).to(weight.dtype) -> scalers[block:last_block] / factor[outer]",),
        _PROMOTED,
    ),
    Excluded(_FORMATS, "QuantizedWeight.new_empty", "return self.tensors", ("0 -> 1",), _ONE_DEVICE),
    Excluded(_WEIGHT_FUNCTIONS, "", "ROWS_SHOWN =", ("8",), _MESSAGE),
    Excluded(_WEIGHT_FUNCTIONS, "unmerge_weight", "shown =", ("len(lost) > ROWS_SHOWN",), _MESSAGE),
    Excluded(_SERVING, "bank_linear", "F.linear(rows.to(base_dtype)", ("rows.to(", "weight.to("), _LINEAR),
    Excluded(_SERVING, "bank_linear", "check_adapter(", ("1.0",), "a scaling that is checked, and used nowhere"),
    Excluded(_STARTS, "", "_ROWS =", ("256",), _BLOCKS),
    Excluded(_STARTS, "", "_LARGEST_SCALING =", ("2.0", "15"), _SPEED),
    Excluded(_STARTS, "_norm_of_base", "weight = weight.detach().to(", ("weight.detach().to(",), _ONE_DEVICE),
    Excluded(_STARTS, "_norm_of_base", 'if weight.device.type != "cpu"', ("",), _ON_A_GPU),
    Excluded(_STARTS, "_row_norms", "if isinstance(weight, Tensor)", ("weight.dtype == dtype or",), _SPEED),
    Excluded(_STARTS, "_row_norms", "if isinstance(weight, Tensor)", ("weight.device.type !=",), _ON_A_GPU),
    Excluded(_STARTS, "_row_norms", "return torch.linalg.norm(weight.to(", ("weight.to(",), _ON_A_GPU),
    Excluded(_STARTS, "_why_not_call", "> _LARGEST_SCALING", ("abs(scaling) > _LARGEST_SCALING",), _SPEED),
    Excluded(_OPS, "plain_mode", "elsewhere = ", ("device.index !=",), "the current one of several GPUs"),
    Excluded(_TOKEN_SUMS, "_finish", "divisor =", ("0 -> 1", "1.0 -> 0.0"), _NO_QUOTIENT),
    Excluded(_NORM, "gain_of", "divisor =", ("0 -> 1", "1.0 -> 0.0"), _NO_QUOTIENT),
    Excluded(_REFERENCE, "over_norm", "torch.where(norm == 0, 1, norm)", ("0 -> 1 (3)",), _NO_QUOTIENT),
    Excluded(_TOKEN_SUMS, "token_sums", "is None else", ("0 -> 1",), _NO_TENSOR),
    Excluded(_MERGE, "_launch", "R, strides = 0", ("0 -> 1",), _NO_TENSOR),
    Excluded(_MERGE, "dense", "None, None, None, 0.0", ("0.0",), _NO_TENSOR),
    Excluded(_TOKEN_SUMS, "_token_sums_kernel", "first_unit.to(", ("first_unit.to(", "end_unit.to("), _SPEED),
    Excluded(_TOKEN_SUMS, "_finish", "offs_n = column *", ("tl.arange(0, BLOCK_N).to",), _INT64),
    Excluded(_PROJECT, "_project_kernel", "offs_k = step", ("tl.arange(0, BLOCK_K).to",), _INT64),
    Excluded(_STORED, "direction_tile", "offs_k = k +", ("tl.arange(0, BLOCK_K).to",), _INT64),
    Excluded(_TOKEN_SUMS, "_token_sums_kernel", "product =", ("tile.to(DTYPES.accumulate) -> tile",), _CAST),
    Excluded(
        _TOKEN_SUMS, "_token_sums_kernel", "product =", ("saved_tile.to(DTYPES.accumulate) -> saved_tile",), _CAST
    ),
    Excluded(_TOKEN_SUMS, "_token_sums_kernel", "dz = gain", ("tile.to(DTYPES.accumulate) -> tile",), _CAST),
    Excluded(_TOKEN_SUMS, "_token_sums_kernel", "tl.store(", ("dz.to(",), _CAST),
    Excluded(_TOKEN_SUMS, "_finish", "lora_B_tile = load(", ("load(",), _CAST),
    Excluded(_TOKEN_SUMS, "_finish", "axis=0) > 0", ("is_infinite.to(tl.int32) -> is_infinite",), _CAST),
    Excluded(_TOKEN_SUMS, "_finish", "axis=0) > 0", ("tl.max(is_infinite.to(tl.int32), axis=0) > 0",), _SPEED),
    Excluded(_TOKEN_SUMS, "_finish", "of_scaled)", ("mask_n & is_infinite",), "the other rows' sums are the same"),
    Excluded(_TOKEN_SUMS, "_dB_of_dz", "tl.load(", ("tl.load(",), _CAST),
    Excluded(_TILE, "store", "tl.store(", ("tile.to(",), _CAST),
    Excluded(_TOKEN_SUMS, "_finish", "tl.store(", ("dmagnitude.to(", "total.to("), _CAST),
    Excluded(_EPILOGUE, "_epilogue_kernel", "load_vector(bias", ("load_vector(",), _CAST),
    Excluded(
        _EPILOGUE,
        "_epilogue_kernel",
        "load(residual",
        ("load(residual, offs_m, offs_n, mask_m, mask_n).to",),
        _CAST,
    ),
    Excluded(_STORED, "direction_tile", "w = weight_tile(", ("weight_tile(",), _CAST),
    Excluded(_NORM, "_norm_kernel", "magnitude_tile =", ("load_vector(",), _CAST),
    Excluded(_NORM, "squares_of", "if k + BLOCK_K", ("k + BLOCK_K > K",), _SPEED),
    Excluded(_NORM, "finished_gain", "gain = gain_of(", ("magnitude.to(",), _CAST),
    Excluded(_NORM, "_plan", "rows, least =", ("",), _TILES),
    Excluded(_NORM, "_plan", "while rows >", ("",), _TILES),
    Excluded(_NORM, "_plan", "rows //= 2", ("",), _TILES),
    Excluded(_MERGE, "_scale_rows", "tile = whole(", ("offs_r <",), _MASKED),
    Excluded(_MERGE, "_prepare_kernel", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_STORED, "walk_config", "", ("",), _TILES),
    Excluded(_AUTOGRAD, "DoraLinearFunction.backward", ".to(ctx.dropped_dtype)", ("made.x_dropped.to(",), _GRADIENT),
    Excluded(_TILE, "Launch.threads", "return", ("config.num_warps *", "self.facts", "64", "32"), _SPLITS),
    Excluded(_TILE, "Launch.config", "R <= configs.HIGH_RANK", ("R <=",), _TILES),
    Excluded(_STORED, "weight_config", "", ("",), _TILES),
    Excluded(_FOUR_BITS, "_nibbles", "packed = tl.load(", ("0 -> 1",), _MASKED),
    Excluded(_FOUR_BITS, "hqq4", "packed = tl.load(", ("0 -> 1 (2)",), _MASKED),
    Excluded(_STORED, "weight_tile", "offs_k = k +", ("tl.arange(0, BLOCK_K).to",), _INT64),
    Excluded(_FOUR_BITS, "_nibbles", "offs_byte =", ("tl.arange(0, BLOCK_K // 2).to",), _INT64),
    Excluded(_FOUR_BITS, "_nibbles", "offs_k = k +", ("tl.arange(0, BLOCK_K).to",), _INT64),
    Excluded(
        _FOUR_BITS,
        "_groups",
        "offs_k = k +",
        ("tl.arange(0, BLOCK_K // GROUP).to(tl.int64) -> tl.arange(0, BLOCK_K // GROUP)",),
        _INT64,
    ),
    Excluded(_FOUR_BITS, "_wrapped", "offs_k = k +", ("tl.arange(0, BLOCK_K).to",), _INT64),
    Excluded(_STORED, "weight_tile", "scale = load_vector(", ("load_vector(",), _CAST),
    Excluded(_STORED, "weight_tile", "tile = scale", ("tile.to(",), _CAST),
    Excluded(_FOUR_BITS, "_nibbles", "return codes", ("codes.to(",), _CAST),
    Excluded(_FOUR_BITS, "codebook4", "index = tl.reshape(", ("absmax.to(",), _CAST),
    Excluded(
        _FOUR_BITS,
        "nf4_torchao",
        "quotient =",
        ("tl.div_rn(scaler, tl.where(mask, factor, 1.0)).to(FORMAT.dtype).to(",),
        _CAST,
    ),
    Excluded(_FOUR_BITS, "_load_numbers", "word >>", ("(index % (32 // BITS) * BITS).to(",), _CAST),
    Excluded(_FOUR_BITS, "codebook", "return tl.load(", ("tl.load(",), _CAST),
    Excluded(
        _FOUR_BITS,
        "nf4_torchao",
        "scale = (quotient",
        ("(quotient + weight.pointers[3]).to(FORMAT.dtype).to(",),
        _CAST,
    ),
    Excluded(_FOUR_BITS, "hqq4", "codes = tl.where(", ("tl.where(",), _CAST),
    Excluded(
        _FOUR_BITS,
        "hqq4",
        "scale = _load_numbers(",
        ("_load_numbers(weight.pointers[1], group, mask, FORMAT).to(FORMAT.dtype).to(",),
        _CAST,
    ),
    Excluded(
        _FOUR_BITS,
        "hqq4",
        "zero = _load_numbers(",
        ("_load_numbers(weight.pointers[2], group, mask, FORMAT).to(FORMAT.dtype).to(",),
        _CAST,
    ),
    Excluded(
        _FOUR_BITS,
        "hqq4",
        "tile = (codes",
        ("(codes - zero).to(FORMAT.dtype).to(tl.float32) -> (codes - zero).to(FORMAT.dtype)",),
        _CAST,
    ),
    Excluded(_FOUR_BITS, "codebook4", "if FORMAT.sizes[1] > 0", ("0 -> 1",), "nobody nests blocks of one"),
    Excluded(_STORED, "_float8", "value = 256.0", ("half.to(tl.float16, bitcast=True).to(",), "exact in float16, too"),
    Excluded(_FOUR_BITS, "_scaled", "if GROUP > 1", ("GROUP > 1", "1"), _GROUPS_OF_ONE),
    Excluded(_FOUR_BITS, "hqq4", "if FORMAT.group > 1", ("FORMAT.group > 1", "1"), _GROUPS_OF_ONE),
    Excluded(_STORED, "weight_format", "group = 1", ("1",), _GROUPS_OF_ONE),
    Excluded(_STORED, "weight_format", "group = math.gcd(K, group_size", ("1 -> 0 (2)",), _GROUPS_OF_ONE),
    Excluded(_STORED, "weight_format", "sizes = group_size", ("0 -> 1", "0 -> 1 (2)"), _WHOLE_ROWS),
    Excluded(_STORED, "weight_stages", "", ("",), _TILES),
    Excluded(_TOKEN_SUMS, "_plan", "stages = max(", ("",), _TILES),
    Excluded(_TOKEN_SUMS, "_plan", "rows_at_once =", ("16",), _SPLITS),
    Excluded(_TOKEN_SUMS, "_programs", "return min(", ("",), _SPLITS),
    Excluded(
        _WEIGHT_FUNCTIONS,
        "unmerge_weight",
        "if merged.numel() else gain == 0",
        ("gain == 0 -> (gain != 0)", "0 -> 1"),
        "without elements every norm is 0, and no row is lost",
    ),
    Excluded(_PYTORCH, "bank_epilogue", "y = base", ("base.to(",), _PROMOTED),
    Excluded(_PYTORCH, "", "_BLOCK_BYTES_ELSEWHERE =", ("256",), _BLOCKS),
    Excluded(
        _PYTORCH,
        "_scale_columns",
        "if matrix.device.type",
        ("matrix.device.type == \"cpu\" -> (matrix.device.type != 'cpu')",),
        _SPEED,
    ),
    Excluded(_PYTORCH, "epilogue", "if low is None and", ("base.dtype == out_dtype",), _SPEED),
    Excluded(_PYTORCH, "_column_sums", "if half and", ('dy.device.type == "cpu"',), _SPEED),
    Excluded(_SHARING, "shared_low", "operand.shape[-1] == 0", ("-1", "1", "0"), _NO_FEATURES),
    Excluded(_SHARING, "_key", "stream_of(x.device) if on_cuda", ("0 -> 1",), "any number, where there is no stream"),
    Excluded(_SHARING, "_key", "stream_capturing", ("on_cuda and",), "nothing is captured where there is no GPU"),
    Excluded(_PYTORCH, "_column_sums", "wanted = [False", ("False",), "makes a gradient that is not used: speed"),
    Excluded(_PYTORCH, "_scale_columns", "statistics =", ("0 -> 1", "0 -> 1 (2)"), _NO_STATISTICS),
    Excluded(_PYTORCH, "_scale_columns", "torch.native_batch_norm(", ("0.0 -> 1.0",), _NO_STATISTICS),
    Excluded(_GEMM, "product_onto_low_rank", "beta=0", ("0 -> 1",), _BETA),
)
