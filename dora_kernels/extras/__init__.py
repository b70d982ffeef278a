"""Useful additions to the core: they may import everything, and nothing imports them."""
