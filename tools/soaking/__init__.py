"""The parts of tools/soak.py, in the order in which they are read: models, twins, comparing, changes, steps, walks."""
