"""Random arguments of dora_linear in which every term counts."""

import torch
from torch import Tensor

from dora_kernels.functional.arguments import (
    check_elements,
    check_flag,
    check_number,
    check_placement,
    check_size,
    check_type,
)

# 0.75 and not 0.7: Triton takes a float32 scaling, and a check in float64 wants it exact
SCALING = 0.75


def random_inputs(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    scaling: float = SCALING,
    update: float | None = None,
    *,
    bias: bool = True,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor | float | None]:
    """Arguments of dora_linear by name, for M tokens, N out features, K in features, rank R.

    A fresh adapter (lora_B zero, gain 1) hides nearly every mistake, so lora_B is random and the gains are spread over
    0.5 to 1.5. adapter_dtype: of lora_A, lora_B and magnitude; None is `dtype`. All but weight want a gradient.
    update: |scaling * lora_B lora_A| / |weight|, about; None leaves lora_B lora_A alone as large as weight.
    generator: a CPU generator, advanced by the call; None is one with seed 0. The numbers are drawn in float64 and do
    not depend on dtype or device.

    Raises ValueError, and draws nothing, where an argument is none of these.
    """
    function = "random_inputs"
    M, N, K, R = (check_size(function, name, size) for name, size in {"M": M, "N": N, "K": K, "R": R}.items())
    for sizes in ({"M": M, "K": K}, {"N": N, "K": K}, {"R": R, "K": K}, {"N": N, "R": R}, {"M": M, "N": N}):
        check_elements(function, **sizes)
    check_type(function, "dtype", dtype, torch.dtype, "a floating-point dtype")
    check_placement(function, device, dtype=dtype, adapter_dtype=adapter_dtype)
    scaling = check_number(function, "scaling", scaling)
    if update is not None:
        update = check_number(function, "update", update)
        if scaling == 0:
            raise ValueError(f"{function}: scaling is {scaling} and update {update}; expected a scaling other than 0")
    check_flag(function, "bias", bias)
    if generator is not None:
        check_type(function, "generator", generator, torch.Generator, "a torch.Generator of the CPU's, or None")
        if generator.device.type != "cpu":
            raise ValueError(f"{function}: generator is on {generator.device}; expected one of the CPU's")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    adapter_dtype = adapter_dtype or dtype

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).to(device)

    x = normal(M, K)
    weight = normal(N, K) * max(K, 1) ** -0.5
    lora_A = normal(R, K, dtype=adapter_dtype) * max(K, 1) ** -0.5
    size = 1.0 if update is None else update / abs(scaling)
    lora_B = normal(N, R, dtype=adapter_dtype) * (size * max(R, 1) ** -0.5)
    spread = 0.5 + torch.rand(N, dtype=torch.float64, generator=generator).to(device)
    norm = torch.linalg.vector_norm(weight.double() + scaling * lora_B.double() @ lora_A.double(), dim=1)
    inputs = {
        "x": x,
        "weight": weight,
        "lora_A": lora_A,
        "lora_B": lora_B,
        "magnitude": (spread * norm).to(adapter_dtype),
        "scaling": scaling,
        "bias": normal(N) if bias else None,
    }
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name != "weight":
            value.requires_grad_()
    return inputs
