"""The parts of tools/mutate.py: subjects, changes, what is excluded, and the runs of the tests."""
