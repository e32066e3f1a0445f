"""Count what a training step asks of a GPU, on fake CUDA tensors: no GPU is needed.

``python tests/fake_cuda`` prints the counts of all cases as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import budgets
import fake_device

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/fake_cuda", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="preset/NAME or rule/NAME")
    parser.add_argument("--write", action="store_true", help="update budgets.json and the docs")
    parser.add_argument(
        "--where", action="store_true", help="print the lines that cause what should not be there"
    )
    args = parser.parse_args()
    try:
        fake_device.load()
    except fake_device.UnavailableError as error:
        sys.exit(str(error))
    sys.path.insert(0, str(REPOSITORY))
    import torch

    torch.set_num_threads(1)
    import fake_cases

    from gatdist.bench.roofline import GPUS, bound

    found = {}
    for name in args.cases or fake_cases.CASES:
        began = time.perf_counter()
        case = fake_cases.CASES[name]()
        with torch.autograd.set_detect_anomaly(args.where, check_nan=False):
            steps = fake_cases.costs(case, locates=args.where)
        batch = {"batch": case.config.run.global_batch}
        found[name] = {kind: batch | costs.table() for kind, costs in steps.items()}
        if name.startswith("preset/"):
            for kind, costs in steps.items():
                found[name][kind]["roofline_ms"] = {
                    gpu.name: least and round(least.seconds * 1e3, 3)
                    for gpu in GPUS
                    for least in [bound(costs, gpu, tf32=case.config.precision.tf32)]
                }
        sys.stderr.write(f"{name}: {time.perf_counter() - began:.1f} s\n")
        if args.where:
            for kind, costs in steps.items():
                for place, count in costs.where.most_common():
                    sys.stdout.write(f"{name} {kind}: {count} × {place}\n")
    if args.write:
        budgets.write(found, is_all=not args.cases)
    elif not args.where:
        json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
