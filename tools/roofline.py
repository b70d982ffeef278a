"""The roofs of this machine on this day: copy bandwidth, and the matmul rate of each dtype, on random data.

    python tools/roofline.py                  # into bench/results/<gpu>/roofline.json
    python tools/roofline.py --device cpu     # small sizes
    python tools/roofline.py --predict        # what the planner's constants of each card predict; nothing is measured

bytes/s counts bytes read and bytes written of one copy of a 2 GiB buffer; FLOP/s is an 8192^3 product by the vendor's
library, float32 at full precision. Medians, L2 flushed. Beside each stands the constant of costs.py for this card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.lib import machine, outputs, report, roof  # noqa: E402
from bench.studies import predictions  # noqa: E402
from dora_kernels.planning import costs, devices  # noqa: E402


@outputs.command("roofline")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 where the device is not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="default: bench/results/<gpu>/roofline.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    parser.add_argument("--predict", action="store_true", help="print the predictions of docs/performance.md instead")
    arguments = parser.parse_args(argv)
    if arguments.predict:
        print("predicted, not measured: a training step in bf16 over the frozen linear layer")
        print(predictions.ratios_table())
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("roofline: --device cuda but torch sees no GPU; expected a GPU, or --device cpu", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu")
    out = arguments.out or machine.ROOT / "bench" / "results" / machine.device_folder(device) / "roofline.json"
    outputs.claim("roofline", out)
    large = device.type == "cuda"
    sizes = (roof.COPY_BYTES, 8192, 20) if large else (64 << 20, 512, 5)
    rows = roof.rows_of(roof.measure_roof(device, *sizes))
    information = machine.meta(device, arguments.commit)
    report.write(out, information | {"conditions": machine.conditions(device)}, rows)
    print(information["device"])
    model = costs.device_model(devices.device_facts(device))
    constants = {"copy": model.bandwidth, "bf16": model.matmul, "fp16": model.matmul, "fp32": model.matmul_float32}
    for row in rows:
        planned = constants[row["dtype"] or row["what"]]
        measured = f"{1e-12 * row['value']:>9.3f} T{row['unit']}"
        print(f"{row['what']:<8}{row['dtype'] or '':<6}{measured}, costs.py has {1e-12 * planned:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
