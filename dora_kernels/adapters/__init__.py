"""enable(model) and disable(model): dora_kernels under the DoRA layers that another library has built.

    enabling.py     enable and disable
    report.py       the report that both return
    libraries.py    which libraries are known, and what the file of each offers
    taking.py       a layer is taken over by changing its class, and given back
    reading.py      whether a part of a layer may be read and not called
    classes.py      whether a class that derives from torch's computes torch's product; two_steps.py: Falcon's
    frozen.py       the frozen layer that stands in the place of a merged one
    calls.py        calls that are left to the library because of what surrounds them
    parents.py      modules that read a layer's weight past the layer; source.py reads their source
    promises.py     what a model may still save after its adapters were merged
    sharded.py      weights that FSDP and DeepSpeed ZeRO hold in pieces

    peft/  torchtune.py  lycoris.py
                    the layers of packages; a file is imported when a model holds a module of its package
    copied/         the layers of repositories that are copied and not installed, known by their structure:
                    nvlabs.py  llava.py  fsdp_qlora.py  megatron_bridge.py  automodel.py

A further library is one more file, and one more name in libraries.py.
"""

from dora_kernels.adapters.enabling import disable, enable
from dora_kernels.adapters.report import LayerReport, ModelReport

__all__ = ["LayerReport", "ModelReport", "disable", "enable"]
