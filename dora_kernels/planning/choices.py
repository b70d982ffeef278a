"""The choices that there are, and that of the environment: all that can be said of them before torch is imported."""

import os

BACKENDS = ("auto", "triton", "reference")
WAYS = ("auto", "split", "merged", "fused")
PRECISIONS = ("auto", "exact")


def backend_of_environment() -> str:
    """The backend that DORA_KERNELS_BACKEND asks for; unset and empty mean auto. ValueError where it names no backend.

    planning/options.py asks when it is imported: so a script ends at its first line, and not in its first forward pass,
    and no call is ever computed by another backend than the one that was asked for.
    """
    backend = os.environ.get("DORA_KERNELS_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"DORA_KERNELS_BACKEND is {backend!r:.80}; expected one of {', '.join(BACKENDS)}")
    return backend
