"""The card's state by nvidia-smi, without a CUDA context: stages may fork, and the card may be exclusive."""

from __future__ import annotations

import os
import subprocess
import time

# a reading's names for nvidia-smi's fields
SAMPLED = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
}
SLOW_SECONDS = 2.0  # without its persistence mode the driver starts anew for every question
Sample = dict[str, int | float | str]


def query(*fields: str) -> list[str]:
    """nvidia-smi's answers for the first card that is visible, as text; empty where it is not there or refuses."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    command += ["-i", visible] if visible else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=4)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines()
    answers = [answer.strip() for answer in lines[0].split(",")] if lines else []
    return answers if done.returncode == 0 and len(answers) == len(fields) else []


_answers = True


def sample() -> Sample:
    """Clocks, power and temperature now; empty from then on where nvidia-smi does not answer within SLOW_SECONDS."""
    global _answers
    if not _answers:
        return {}
    start = time.monotonic()
    answers = query(*SAMPLED.values())
    _answers = bool(answers) and time.monotonic() - start < SLOW_SECONDS
    # whole seconds since the epoch, an int: of a float the report keeps four digits
    return {"at": int(time.time())} | dict(zip(SAMPLED, map(_number, answers), strict=True)) if answers else {}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
