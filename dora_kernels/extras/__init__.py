"""What is useful beside the core: it may import everything, and nothing imports it."""
