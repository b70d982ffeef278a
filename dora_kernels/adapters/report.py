"""The report of enable(model) and disable(model): every DoRA layer of a model, and who computes it."""

from __future__ import annotations

from dataclasses import dataclass

NAMES_SHOWN = 3
"""The number of layer names that a line of str(ModelReport) shows before it abbreviates."""


@dataclass(frozen=True)
class LayerReport:
    """One DoRA layer of a model: its name in the model, and who computes it from now on."""

    name: str
    library: str
    taken_over: bool
    reason: str = ""
    """The reason why the layer was left alone; of one taken over, what its library still computes, if anything. Of
    both, which code reads its weight past it (parents.py)."""
    shares_with: tuple[str, ...] = ()
    """The layers that are called with the same x, with which it shares the product of x and lora_A."""
    remarks: tuple[str, ...] = ()
    """The parameters that may not train as their owner thinks, whoever computes the layer (training.py)."""


@dataclass(frozen=True)
class ModelReport:
    """Every DoRA layer found in a model, in the order of model.named_modules()."""

    layers: tuple[LayerReport, ...] = ()

    @property
    def taken_over(self) -> list[LayerReport]:
        """The layers whose forward is now dora_linear."""
        return [layer for layer in self.layers if layer.taken_over]

    @property
    def left_alone(self) -> list[LayerReport]:
        """The layers their own library computes, each with the reason."""
        return [layer for layer in self.layers if not layer.taken_over]

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "no DoRA layer found"
        lines = [f"taken over {len(self.taken_over)} of {len(self.layers)} DoRA layers"]
        groups: dict[tuple[bool, str, str], list[str]] = {}
        for layer in self.layers:
            if layer.reason:
                groups.setdefault((layer.taken_over, layer.library, layer.reason), []).append(layer.name)
        for (taken_over, library, reason), names in groups.items():
            verb = "taken over but for" if taken_over else f"left to {library}"
            lines.append(f"  {len(names)} {verb}: {reason} ({shown(names)})")
        remarked: dict[str, list[str]] = {}
        for layer in self.layers:
            for remark in layer.remarks:
                remarked.setdefault(remark, []).append(layer.name)
        lines += [f"  {len(names)} may not train as meant: {what} ({shown(names)})" for what, names in remarked.items()]
        sharing_groups = {frozenset({layer.name, *layer.shares_with}) for layer in self.layers if layer.shares_with}
        if sharing_groups:
            count = sum(map(len, sharing_groups))
            lines.append(f"  {count} share the product of x and lora_A, in {len(sharing_groups)} groups")
        return "\n".join(lines)


def shown(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
