"""Checks for users to run on their own layers and machines, and the error measure behind them.

In a test suite it takes three lines for a model:

    @pytest.mark.parametrize("name, layer", dora_layers(model))
    def test_dora(name, layer):
        check_layer(layer).raise_if_failed()
"""

from dora_kernels.testing.gradients import check_gradients
from dora_kernels.testing.layers import check_layer, dora_layers
from dora_kernels.testing.measure import (
    MEAN_RATIO,
    WORST_MAX_RATIO,
    WORST_RATIO,
    Comparison,
    compare,
    geometric_mean,
    rms_error,
)
from dora_kernels.testing.problem import SCALING, random_inputs
from dora_kernels.testing.report import Report, Row
from dora_kernels.testing.run import nan_filled_memory

__all__ = [
    "MEAN_RATIO",
    "SCALING",
    "WORST_MAX_RATIO",
    "WORST_RATIO",
    "Comparison",
    "Report",
    "Row",
    "check_gradients",
    "check_layer",
    "compare",
    "dora_layers",
    "geometric_mean",
    "nan_filled_memory",
    "random_inputs",
    "rms_error",
]
