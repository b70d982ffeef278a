"""The package's GEMM for Hopper by itself: its variants, launched, held to float64 and timed for the probe."""
