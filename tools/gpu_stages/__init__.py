"""The stages of tools/gpu_suite.py, one module each kind of them."""
