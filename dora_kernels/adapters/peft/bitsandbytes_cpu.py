"""Faults of bitsandbytes with 4-bit weights on a CPU, undone or refused; quant/bitsandbytes_cpu.py has the facts."""

from __future__ import annotations

from torch import nn

from dora_kernels import quant
from dora_kernels.planning import devices
from dora_kernels.quant import Weight


def unpack(base: nn.Module) -> None:
    """Undo what bitsandbytes did to the weight of a base layer in eval mode, if it did."""
    weight = getattr(base, "weight", None)
    if quant.is_packed_for_cpu(weight):
        devices.log_once(
            "dora_kernels: bitsandbytes had repacked a weight for inference on this CPU; it is unpacked, but its "
            "scales stay rounded to bfloat16: load the model again for the exact ones"
        )
        quant.unpack_for_cpu(weight)


def wrong_decoding(weight: Weight | None) -> str | None:
    """A sentence on a weight that bitsandbytes decodes wrongly on this machine; None of any other."""
    if not isinstance(weight, quant.QuantizedWeight) or not quant.is_decoded_wrongly(weight):
        return None
    return f"bitsandbytes decodes K = {weight.shape[1]} in blocks of {weight.numbers[0]} wrongly on this CPU"


def refuse_wrong_decoding(function: str, weight: Weight | None) -> None:
    """Raise ValueError where bitsandbytes' product or decoding of this weight is wrong on this machine."""
    reason = wrong_decoding(weight)
    if reason is not None:
        raise ValueError(f"{function}: {reason}; expected a GPU, or another blocksize")
