"""Device code and its launchers. Importing this package needs triton; only ops.py imports it."""

from dora_kernels.kernels import interpreter

interpreter.repair()  # before the first kernel runs; does nothing outside TRITON_INTERPRET=1

from dora_kernels.kernels.bank_epilogue import bank_epilogue  # noqa: E402
from dora_kernels.kernels.dx import dx  # noqa: E402
from dora_kernels.kernels.epilogue import epilogue  # noqa: E402
from dora_kernels.kernels.fused_forward import fused_forward  # noqa: E402
from dora_kernels.kernels.grouped_norm import grouped_norm  # noqa: E402
from dora_kernels.kernels.merge import dense, merge, prepare  # noqa: E402
from dora_kernels.kernels.merged_forward import merged_forward  # noqa: E402
from dora_kernels.kernels.norm import norm, start_norm  # noqa: E402
from dora_kernels.kernels.outer_product import outer_product  # noqa: E402
from dora_kernels.kernels.parts import factors  # noqa: E402
from dora_kernels.kernels.project import project  # noqa: E402
from dora_kernels.kernels.shares import counters  # noqa: E402
from dora_kernels.kernels.side import fork  # noqa: E402
from dora_kernels.kernels.token_sums import token_sums  # noqa: E402
from dora_kernels.types import Steps  # noqa: E402

KERNELS = Steps(
    dense=dense,
    factors=factors,
    norm=norm,
    start_norm=start_norm,
    grouped_norm=grouped_norm,
    merge=merge,
    counters=counters,
    prepare=prepare,
    project=project,
    epilogue=epilogue,
    fused_forward=fused_forward,
    merged_forward=merged_forward,
    token_sums=token_sums,
    outer_product=outer_product,
    dx=dx,
    fork=fork,
    bank_epilogue=bank_epilogue,
)
