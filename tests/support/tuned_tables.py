"""Tables of what was measured on a GPU, for tests that have none: an H200's, whatever device the tensors are on."""

import json

from dora_kernels.functional import linear
from dora_kernels.planning import configs, devices, measured
from dora_kernels.planning.devices import DeviceFacts

H200 = DeviceFacts("NVIDIA H200", "sm_90", 132)


def entry(M=8192, N=4096, K=4096, R=64, **parts):
    """An entry of "ways": one way -> microseconds of each part that is named."""
    return {"M": M, "N": N, "K": K, "R": R} | parts


def pretend_table(monkeypatch, folder, *entries, facts=H200, **parts):
    """Let all tensors be on a GPU for which these entries, and other parts, are in the package's folder."""
    monkeypatch.setattr(configs, "TUNED_FOLDER", folder)
    monkeypatch.setattr(devices, "device_facts", lambda device: facts)
    configs.tuned_path(H200.name).write_text(json.dumps({"meta": {}, "ways": entries} | parts))
    forget_tables()


def forget_tables():
    """Read the files again when they are asked for next, as a new process does."""
    configs.tuned_configs.cache_clear()
    measured.table_of.cache_clear()
    linear._known.clear()
