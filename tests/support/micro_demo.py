"""The demo at a size that takes a second."""

from dora_kernels.extras import demo

# 7 linear layers, 12 steps
MICRO = demo.Preset(
    hidden=32,
    layers=1,
    intermediate=64,
    heads=2,
    kv_heads=1,
    sequence=32,
    batch=4,
    base_steps=4,
    steps=12,
    base_rate=3e-3,
    rate=1e-2,
)
