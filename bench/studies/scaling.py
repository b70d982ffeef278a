"""The arithmetic of a large model on several GPUs, from the cost model alone: what a rank holds, receives and computes.

Predictions, for docs/scaling.md. One step of Llama-3.1-70B with DoRA on every linear layer, the base in bf16 or NF4
and sharded by FSDP2 (or whole on each rank, in DDP), adapters in float32 with AdamW, each block checkpointed.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.lib.shapes import LAYERS
from dora_kernels.planning import costs, plan

H200 = costs.DEVICES["NVIDIA H200"]
MODEL = "Llama-3.1-70B"
BLOCKS = 80
# of the linear layers of a block, by the names in bench/lib/shapes.py
PER_BLOCK = {"q/o": 2, "k/v": 2, "gate/up": 2, "down": 1}
HIDDEN = 8192
VOCABULARY = 128256
RANK = 64
TOKENS = 8192
"""Of one rank and micro-batch."""

# of one GPU: NVLink 4 in a node of 8 (450 GB/s each way by its data sheet), one 400 Gbit/s InfiniBand port beyond
LINKS = {8: 450e9, 64: 50e9}
# float32 parameter, gradient and the two moments of AdamW
BYTES_OF_AN_ADAPTER = 16
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: the code, a byte of scale for each 64, a float32 for each 256 of those."""


@dataclass(frozen=True)
class RankStep:
    """A step of one micro-batch on one of `ranks` ranks: bytes held, bytes received, and seconds."""

    ranks: int
    base: str
    sharded: bool

    @property
    def itemsize(self) -> float:
        """Bytes of a frozen weight."""
        return 2.0 if self.base == "bf16" else NF4_BYTES

    @property
    def base_bytes(self) -> float:
        """The frozen linear layers, and the embedding and the head in bf16."""
        whole = linear_weights() * self.itemsize + 2 * 2 * VOCABULARY * HIDDEN
        return whole / (self.ranks if self.sharded else 1)

    @property
    def adapter_bytes(self) -> float:
        """Adapters, their gradients and the optimizer's state."""
        return adapter_weights() * BYTES_OF_AN_ADAPTER / (self.ranks if self.sharded else 1)

    @property
    def activation_bytes(self) -> float:
        """The input of each block, and one block at work: per layer x, base, low, norm and gain, which ours keeps."""
        inputs = BLOCKS * TOKENS * HIDDEN * 2
        at_work = sum(count * (TOKENS * (N + RANK) * 2 + 8 * N) for N, _, count in layers())
        distinct_x = TOKENS * 2 * (3 * HIDDEN + 28672)  # q, k and v share theirs, gate and up theirs
        gathered = 2 * linear_weights() / BLOCKS * self.itemsize if self.sharded else 0  # this block and the next
        return inputs + at_work + distinct_x + gathered

    @property
    def received(self) -> float:
        """Bytes that a rank receives in a step.

        Sharded: the base for the forward pass and again for the backward pass (whose recomputation uses it too), the
        adapters twice, and their gradients reduced once. Not sharded: the gradients, which an all-reduce moves twice.
        """
        share = (self.ranks - 1) / self.ranks
        if not self.sharded:
            return share * 2 * 4 * adapter_weights()
        return share * (2 * linear_weights() * self.itemsize + 3 * 4 * adapter_weights())

    @property
    def seconds_received(self) -> float:
        """At the speed of the slowest link that the step crosses."""
        return self.received / LINKS[self.ranks]

    @property
    def seconds_computed(self) -> float:
        """Of the linear layers on an H200, by costs.py: two forward passes (one recomputed) and one backward pass."""
        total = 0.0
        for N, K, count in layers():
            shape = costs.Shape(TOKENS, N, K, RANK, 2, 0.0 if self.base == "bf16" else NF4_BYTES)
            passes = (
                costs.forward_costs(shape, "split", H200),
                costs.forward_costs(shape, "split", H200, norm_given=True),  # recomputed with the norm of the first
                costs.backward_costs(shape, plan.dx_way("auto", shape, H200), H200),
            )
            total += count * sum(costs.seconds(steps, shape, H200) for steps in passes)
        return BLOCKS * total


def layers() -> list[tuple[int, int, int]]:
    """(N, K, how often) of a block's linear layers."""
    return [(shape.N, shape.K, PER_BLOCK[shape.layer]) for shape in LAYERS if shape.model == MODEL]


def linear_weights() -> int:
    """Elements of all frozen linear layers."""
    return BLOCKS * sum(count * N * K for N, K, count in layers())


def adapter_weights() -> int:
    """Elements of all adapters: lora_A, lora_B and the magnitude."""
    return BLOCKS * sum(count * (RANK * (N + K) + N) for N, K, count in layers())


def norm_seconds() -> float:
    """Of all norms of the model once: what `frozen_adapters` saves for each micro-batch but the first of a step."""
    shapes = [(costs.Shape(TOKENS, N, K, RANK, 2), count) for N, K, count in layers()]
    return BLOCKS * sum(count * costs.norm_cost(shape, H200).seconds(shape, H200) for shape, count in shapes)


def table() -> str:
    """The table of docs/scaling.md."""
    lines = [
        "| GPUs | base | engine | frozen weights | adapters and optimizer | activations | received in a step | "
        "receiving takes | linear layers take |",
        "| --- " * 9 + "|",
    ]
    for step in STEPS:
        engine = "FSDP2" if step.sharded else "DDP"
        sizes = (step.base_bytes, step.adapter_bytes, step.activation_bytes, step.received)
        columns = [f"{size / 2**30:.1f} GiB" for size in sizes]
        times = (f"{seconds:.2f} s" for seconds in (step.seconds_received, step.seconds_computed))
        lines.append(f"| {step.ranks} | {step.base} | {engine} | {' | '.join((*columns, *times))} |")
    return "\n".join(lines)


STEPS = (
    RankStep(8, "bf16", True),
    RankStep(8, "NF4", True),
    RankStep(8, "NF4", False),
    RankStep(64, "bf16", True),
    RankStep(64, "NF4", True),
    RankStep(64, "NF4", False),
)


def section() -> str:
    """The text between the markers of docs/scaling.md."""
    weights, adapters = linear_weights(), adapter_weights()
    return (
        f"{MODEL}: {weights / 1e9:.1f}e9 frozen weights in linear layers, {adapters / 1e6:.0f}e6 trained at rank "
        f"{RANK}, {TOKENS} tokens of each rank. All of it predicted.\n\n{table()}\n\n"
        f"The norms of all {BLOCKS * sum(PER_BLOCK.values())} layers take {1e3 * norm_seconds():.0f} ms of it: that is "
        "what `frozen_adapters` saves for each micro-batch but the first of an optimizer step."
    )
