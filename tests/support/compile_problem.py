"""A backend of torch.compile that runs each graph as it is, as aot_eager does, and remembers our operators in it."""

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition


def operators(graph):
    """How often each of our operators is called in `graph`."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    names = [target.split(".")[1] for target in targets if target.startswith("dora_kernels.")]
    return {name: names.count(name) for name in sorted(set(names))}


class Recorder:
    """frames: how often Dynamo compiled; graphs: (kind, operators) of every graph, in order."""

    def __init__(self):
        self.frames = 0
        self.graphs = []
        self._aot = aot_autograd(
            fw_compiler=self._recording("forward"),
            bw_compiler=self._recording("backward"),
            inference_compiler=self._recording("inference"),
            partition_fn=min_cut_rematerialization_partition,
            keep_inference_input_mutations=True,
        )

    def __call__(self, graph, inputs):
        self.frames += 1
        return self._aot(graph, inputs)

    def compile(self, function, **settings):
        """`function` with this backend; a graph break is an error."""
        return torch.compile(function, backend=self, fullgraph=True, **settings)

    def _recording(self, kind):
        def compiler(graph, inputs):
            self.graphs.append((kind, operators(graph)))
            return boxed_nop(graph, inputs)

        return compiler
