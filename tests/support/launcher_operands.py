"""Every launcher of kernels/ with its operands by name, for the tests that move, hem in or cut off one of them."""

from unittest import mock

import torch

from dora_kernels.planning import plan
from dora_kernels.types import Prepared
from tests.support.problem import Problem

GROUPED = ("weight", "lora_A", "lora_B", "magnitude")
OPERANDS = {
    "norm": ("weight", "lora_A", "lora_B", "magnitude"),
    "start_norm": ("weight", "lora_A", "lora_B", "magnitude"),
    "merge": ("weight", "lora_A", "lora_B"),
    "prepare": ("lora_B",),
    "project": ("x", "lora_A"),
    "merged_forward": ("weight", "lora_A", "lora_B", "magnitude", "bias"),
    "epilogue": ("base", "low", "lora_B", "residual", "bias"),
    "bank_epilogue": ("base", "low", "bias"),
    "grouped_norm": GROUPED,
    "token_sums": ("dy", "low", "base", "lora_B", "dB"),
}


def launch(launcher: str, t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the launcher makes of the tensors."""
    from dora_kernels import kernels  # those of now: the guard pages' test plants faults in others

    if launcher == "norm":
        return list(kernels.norm(t["weight"], t["lora_A"], t["lora_B"], 0.75, t["magnitude"]))
    if launcher == "start_norm":  # with the step that finishes it, and what else that writes
        adapter = t["weight"], t["lora_A"], t["lora_B"]
        norm, gain, unfinished = kernels.start_norm(*adapter, 0.75, t["magnitude"])
        prepared = prepared_for(t)
        merged = kernels.merge(*adapter, gain, 0.75, unfinished=unfinished, prepared=prepared)
        return [norm, gain, merged, prepared.scaled_B, prepared.counters]
    if launcher == "prepare":
        prepared = prepared_for(t)
        kernels.prepare(prepared, t["lora_B"], t["gain"])
        return [prepared.scaled_B, prepared.counters]
    if launcher == "merge":
        return [kernels.merge(t["weight"], t["lora_A"], t["lora_B"], t["gain"], 0.75)]
    if launcher == "project":
        with mock.patch.object(plan, "project_by_kernel", return_value=True):
            counters = torch.zeros(len(t["x"]), dtype=torch.int32, device=t["x"].device)
            return [kernels.project(t["x"], t["lora_A"], counters=counters)]
    if launcher == "epilogue":
        more = (t["gain"], t["bias"], 0.75, t["x"].dtype, t["residual"])
        return [kernels.epilogue(t["base"], t["low"], t["lora_B"], *more)]
    if launcher == "merged_forward":
        adapter = t["weight"], t["lora_A"], t["lora_B"], t["magnitude"]
        return list(kernels.merged_forward(t["x"], *adapter, t["bias"], None, 0.75, True))
    if launcher == "bank_epilogue":
        lora_B, gain, scaling = t["lora_B"].unsqueeze(0), t["gain"].unsqueeze(0), t["gain"].new_full((1,), 0.75)
        index = torch.arange(len(t["base"]), device=gain.device) % 3 - 1  # the frozen layer, the adapter, none of them
        return [kernels.bank_epilogue(t["base"], t["low"], lora_B, gain, scaling, t["bias"], index)]
    if launcher == "grouped_norm":
        return list(kernels.grouped_norm(*([t[name], t[name]] for name in GROUPED), [0.75, 0.5]))
    sums = {"dB": t["dB"], "dmagnitude": torch.empty_like(t["gain"])}
    keywords = {"gain": t["gain"], "saved": t["base"], "norm": t["gain"], "lora_B": t["lora_B"]}
    kernels.token_sums(t["dy"], t["low"], 0.75, **keywords, **sums)
    return list(sums.values())


def prepared_for(t: dict[str, torch.Tensor]) -> Prepared:
    """To be written from lora_B: in rows of their own, whatever the strides of lora_B are."""
    N, R = t["lora_B"].shape
    return Prepared(
        t["gain"].new_empty((N, R), dtype=t["lora_B"].dtype), 0.5, t["gain"].new_empty(70, dtype=torch.int32)
    )


def tensors_of(problem: Problem) -> dict[str, torch.Tensor]:
    """What the launchers take, by name."""
    tensors = {name: value for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    tensors |= {"base": problem.x @ problem.weight.T, "low": problem.x @ problem.lora_A.T, "residual": problem.dy + 1}
    gain = problem.magnitude.to(torch.promote_types(problem.x.dtype, torch.float32))
    return tensors | {"gain": gain, "dB": 0 * problem.lora_B}
