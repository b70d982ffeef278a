"""The layers that enable() knows by structure, restated from their documented formulas: names, parameters, forward.

W: weight (N, K), A: lora_A (R, K), B: lora_B (N, R), m: magnitude (N,), s: scaling, n: the row norms of W + s B A,
g = m / n, b: bias. A holder class is a library's tree, as two of them call their layer `Linear`.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


def norms(weight):
    return weight.norm(dim=1)


class Llm:
    """NVlabs/DoRA's tree for language models."""

    class LoraLayer:
        """What the library's layers share: settings, and the state of merging."""

    class Linear(nn.Linear, LoraLayer):
        """x W^T + (g - 1) d(x) W^T + b + g s d(x) A^T B^T; n is constant with dora_simple; Wdecompose: without A and B.

        With merge_weights, train(False) makes W what computes the same alone.
        """

        def __init__(self, linear, r=4, alpha=6, dropout=0.0, merge_weights=False, Wdecompose=False, dora_simple=True):
            N, K = linear.weight.shape
            super().__init__(K, N, bias=linear.bias is not None)
            self.load_state_dict(linear.state_dict())
            self.weight.requires_grad_(False)
            self.r, self.lora_alpha, self.merged, self.merge_weights = r, alpha, False, merge_weights
            self.lora_dropout = nn.Dropout(dropout) if dropout else _unchanged
            self.disable_adapters = self.fan_in_fan_out = False
            self.Wdecompose, self.dora_simple = Wdecompose, dora_simple
            self.weight_m_wdecomp = nn.Linear(1, N, bias=False)
            if not Wdecompose:
                self.lora_A, self.lora_B = nn.Linear(K, r, bias=False), nn.Linear(r, N, bias=False)
                self.scaling = alpha / r
                nn.init.zeros_(self.lora_B.weight)
            self.weight_m_wdecomp.weight.data = norms(self.weight).unsqueeze(1)

        def direction(self):
            return (
                self.weight if self.Wdecompose else self.weight + self.scaling * self.lora_B.weight @ self.lora_A.weight
            )

        def gain(self):
            norm = norms(self.direction())
            return self.weight_m_wdecomp.weight[:, 0] / (norm.detach() if self.dora_simple else norm)

        def train(self, mode=True):
            nn.Linear.train(self, mode)
            if self.merge_weights and not self.merged and not mode:
                with torch.no_grad():
                    self.weight.copy_(self.gain().unsqueeze(1) * self.direction())
                self.merged = True

        def eval(self):
            self.train(False)

        def forward(self, x):
            if self.merged:
                return F.linear(x, self.weight, self.bias)
            gain, dropped = self.gain(), self.lora_dropout(x)
            y = F.linear(x, self.weight) + (gain - 1) * F.linear(dropped, self.weight)
            y = y if self.bias is None else y + self.bias
            if not self.Wdecompose:
                y = y + gain * self.lora_B(self.lora_A(dropped.to(self.lora_A.weight.dtype))) * self.scaling
            return y.to(self.weight.dtype)


def _unchanged(x):
    return x


class LlmWithEps(Llm.Linear):
    """Edited: eps is added to the norm."""

    def gain(self):
        return self.weight_m_wdecomp.weight[:, 0] / (norms(self.direction()).detach() + 1e-8)


class LlmWithScaledBias(Llm.Linear):
    """Edited: the bias is scaled too."""

    def forward(self, x):
        return super().forward(x) + (self.gain() - 1) * self.bias


class LlmWithOneDropout(Llm.Linear):
    """Edited: dropout of the adapter alone. In eval mode nothing is different."""

    def forward(self, x):
        gain, dropped = self.gain(), self.lora_dropout(x)
        return gain * (F.linear(x, self.weight) + self.scaling * self.lora_B(self.lora_A(dropped))) + self.bias


class LlmWithEvalGain(Llm.Linear):
    """Edited: half the gain in eval mode."""

    def gain(self):
        return super().gain() * (1.0 if self.training else 0.5)


class LlmWithFlowingNorm(Llm.Linear):
    """Edited: the norm has its gradient though dora_simple is set. The output is the same."""

    def gain(self):
        return self.weight_m_wdecomp.weight[:, 0] / norms(self.direction())


class LlmWithGate(Llm.Linear):
    """Edited: one more parameter, which changes nothing before it is trained."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gate * super().forward(x)


class LlmThatRaises(Llm.Linear):
    """Edited: takes no x but one of its own making."""

    def forward(self, x):
        raise RuntimeError("a mask is needed")


class VisionDora(nn.Module):
    """NVlabs/DoRA's VL-T5 tree: x (g (W + s B A))^T + b, with parameters for all of it, b trained."""

    constant_norm = False

    def __init__(self, linear, r=4, s=1.5):
        super().__init__()
        N, K = linear.weight.shape
        self.in_features, self.out_features, self.scaling, self.merged = K, N, s, False
        self.original_weight_matrix = linear.weight.detach()
        self.lora = SimpleNamespace(r=r, lora_dropout=0.1)
        self.weight_m = nn.Parameter(norms(linear.weight.detach()).unsqueeze(1))
        self.weight_v = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.lora_A = nn.Parameter(torch.randn(r, K) * K**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(N, r))

    def forward(self, x):
        direction = self.weight_v + self.scaling * self.lora_B @ self.lora_A
        norm = norms(direction.detach() if self.constant_norm else direction).unsqueeze(1)
        return F.linear(x, self.weight_m / norm * direction, self.bias)


class DoraLinear(VisionDora):
    """The norm has its gradient."""


class DoraLinear_simple(VisionDora):
    """The norm is constant."""

    constant_norm = True


class Llava:
    """NVlabs/DoRA's tree for LLaVA."""

    class LoraLayer:
        """As Llm's, by adapter name."""

    class Linear(nn.Linear, LoraLayer):
        """Llm's formula with the active adapter; the norm is always constant; y has x's dtype."""

        def __init__(self, linear, r=4, alpha=6, dropout=0.0, name="default"):
            N, K = linear.weight.shape
            super().__init__(K, N, bias=linear.bias is not None)
            self.load_state_dict(linear.state_dict())
            self.weight.requires_grad_(False)
            self.merged = self.disable_adapters = self.fan_in_fan_out = self.Wdecompose = False
            self.active_adapter, self.r, self.scaling = name, {name: r}, {name: alpha / r}
            self.lora_dropout = nn.ModuleDict({name: nn.Dropout(dropout) if dropout else nn.Identity()})
            self.weight_m_wdecomp = nn.ModuleDict({name: nn.Linear(1, N, bias=False)})
            self.lora_A = nn.ModuleDict({name: nn.Linear(K, r, bias=False)})
            self.lora_B = nn.ModuleDict({name: nn.Linear(r, N, bias=False)})
            nn.init.zeros_(self.lora_B[name].weight)
            self.weight_m_wdecomp[name].weight.data = norms(self.weight).unsqueeze(1)

        def forward(self, x):
            name = self.active_adapter
            if name not in self.lora_A or self.disable_adapters or self.merged:
                return F.linear(x, self.weight, self.bias)
            A, B, s = self.lora_A[name], self.lora_B[name], self.scaling[name]
            gain = self.weight_m_wdecomp[name].weight[:, 0] / norms(self.weight + s * B.weight @ A.weight).detach()
            dropped = self.lora_dropout[name](x)
            y = F.linear(x, self.weight, self.bias) + (gain - 1) * F.linear(dropped, self.weight)
            return (y + gain * B(A(dropped.to(A.weight.dtype))) * s).to(x.dtype)


class DORA(nn.Module):
    """fsdp_qlora: g (base_layer(x) + x A^T B^T), s = 1, with g of the decoded weight, x of three dimensions."""

    def __init__(self, base_layer, magnitude, r=4, dtype=torch.float32):
        super().__init__()
        N, K = base_layer.out_features, base_layer.in_features
        self.base_layer = base_layer
        self.magnitude_layer, self.dora_layer = nn.Module(), nn.Module()
        self.magnitude_layer.magnitude = nn.Parameter(magnitude.to(dtype))
        self.dora_layer.lora_A = nn.Linear(K, r, bias=False, dtype=dtype)
        self.dora_layer.lora_B = nn.Linear(r, N, bias=False, dtype=dtype)
        nn.init.zeros_(self.dora_layer.lora_B.weight)

    def forward(self, x):
        A, B = self.dora_layer.lora_A, self.dora_layer.lora_B
        y = self.base_layer(x) + B(A(x.to(A.weight.dtype)))
        norm = norms(self.decoded() + B.weight @ A.weight).detach()
        return y / norm.view(1, 1, -1) * self.magnitude_layer.magnitude.view(1, 1, -1)

    def decoded(self):
        """The dense weight, as each library decodes it."""
        weight = self.base_layer.weight if hasattr(self.base_layer, "weight") else None
        if hasattr(weight, "quant_state"):
            import bitsandbytes

            return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        return self.base_layer.dequantize() if weight is None else weight.detach()


class Parallel(nn.Module):
    """A parallel linear layer on one rank: returns its bias beside the product, or (adds_bias) has added it."""

    def __init__(self, linear, adds_bias=False):
        super().__init__()
        self.weight, self.bias, self.adds_bias = linear.weight, linear.bias, adds_bias

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias if self.adds_bias else None)
        return y, None if self.adds_bias else self.bias


class LayerNormParallel(Parallel):
    """Parallel, with a layer norm before it whose output it returns too."""

    def __init__(self, linear):
        super().__init__(linear)
        self.layer_norm_weight = nn.Parameter(torch.rand(linear.in_features) + 0.5, requires_grad=False)

    def forward(self, x):
        normed = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight)
        return (F.linear(normed, self.weight), normed), self.bias


class ParallelLinearDoRAAdapter(nn.Module):
    """Megatron-Bridge's adapter: scaling * dropout(x) A^T B^T, with the magnitude beside A and B."""

    def __init__(self, K, N, dim, alpha, dropout, magnitude):
        super().__init__()
        self.linear_in = Parallel(nn.Linear(K, dim, bias=False))
        self.linear_out = Parallel(nn.Linear(dim, N, bias=False))
        nn.init.zeros_(self.linear_out.weight)
        self.activation, self.dim, self.alpha, self.dropout_position = nn.Identity(), dim, alpha, "pre"
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.disable_sequence_parallel_comm, self.is_expert, self.input_is_parallel = True, False, False
        self.config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False, cpu_offloading=False)
        self.weight_magnitude = nn.Parameter(magnitude)

    def forward(self, x):
        return self.linear_out(self.activation(self.linear_in(self.dropout(x))[0]) * (self.alpha / self.dim))[0]


class DoRALinear(nn.Module):
    """Megatron-Bridge: g (base + adapter(xn)) + (g - 1) to_wrap(d(xn) - xn), and to_wrap's bias; d is drawn anew."""

    def __init__(self, to_wrap, r=4, alpha=6, dropout=0.0):
        super().__init__()
        N, K = to_wrap.weight.shape
        self.to_wrap, self._adapter_enabled = to_wrap, True
        self.adapter = ParallelLinearDoRAAdapter(K, N, r, alpha, dropout, norms(to_wrap.weight.detach()))
        self.scaling = alpha / r

    def base_linear_forward(self, x):
        y, bias = self.to_wrap(x)
        return (y[0], bias, y[1]) if isinstance(y, tuple) else (y, bias, x)

    def forward(self, x):
        base, bias, xn = self.base_linear_forward(x)
        if not self._adapter_enabled:
            return base, bias
        A, B = self.adapter.linear_in.weight, self.adapter.linear_out.weight
        adapted = self.adapter(xn)
        gain = (self.adapter.weight_magnitude / norms(self.to_wrap.weight + self.scaling * B @ A).detach()).view(
            1, 1, -1
        )
        y = gain * (base + adapted)
        if self.training and not isinstance(self.adapter.dropout, nn.Identity):
            y = y + (gain - 1) * self.base_linear_forward(self.adapter.dropout(xn) - xn)[0]
        return y, bias


class LinearLoRA(nn.Linear):
    """Automodel: g (x W^T + s d(x A^T B^T)) + b, or x W^T + b + (g - 1) d(x) W^T + g s d(x) A^T B^T with "pre"."""

    @staticmethod
    def patch(linear, dim=4, alpha=6, dropout=0.0, position="post", use_dora=True):
        """`linear` itself, of a class of its own, as the library makes it."""
        N, K = linear.weight.shape
        linear.requires_grad_(False)
        linear.dim, linear.scale, linear.use_dora = dim, alpha / dim, use_dora
        linear.dropout_p, linear.dropout_position = dropout, position
        linear.lora_A, linear.lora_B = nn.Linear(K, dim, bias=False), nn.Linear(dim, N, bias=False)
        nn.init.zeros_(linear.lora_B.weight)
        if use_dora:
            linear.lora_magnitude = nn.Parameter(norms(linear.weight))
        linear.__class__ = type("PatchedLinearLoRA", (LinearLoRA, type(linear)), {})
        return linear

    def forward(self, x):
        pre = self.dropout_position == "pre"
        dropped = F.dropout(x, self.dropout_p, self.training) if pre and self.training and self.dropout_p > 0 else x
        low_rank = self.lora_B(self.lora_A(dropped))
        low_rank = low_rank if pre else F.dropout(low_rank, self.dropout_p, self.training)
        y = F.linear(x, self.weight, self.bias)
        if not self.use_dora:
            return y + self.scale * low_rank
        norm = norms(self.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)).detach()
        gain = self.lora_magnitude.to(x.dtype) / norm.to(x.dtype)
        return y + (gain - 1) * F.linear(dropped, self.weight) + gain * low_rank * self.scale


class LinearLoRAWithDroppedOutput(LinearLoRA):
    """Edited: dropout of all of y."""

    def forward(self, x):
        return F.dropout(super().forward(x), self.dropout_p, self.training)
