"""Python imports this at its start where the folder is on PYTHONPATH: a child of a process that pretends does too."""

from tools.pretended_gpu import start

start()
