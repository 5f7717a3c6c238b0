"""Where does a call of the filtered loss spend its time? One row for each filter.

    python -m bench.profile [--shape 512 2048] [--rows FILE]

A row has the kernels of one forward and backward of both views, with calls and microseconds each,
the slowest first; on a CPU they are PyTorch's operators.
"""

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.bench_spectral_loss import DEVICE, DTYPE, FILTERS, GPU
from bench.bench_spectral_loss import SMALL as SMALLEST
from bench.exact import views
from bench.rows import SMALL, append
from rdm_fast import spectral_loss

WARM_UP = 3
SHOWN = 40  # kernels of a row


def trace(filtered: str, B: int, D: int) -> dict[str, Any]:
    """The kernels of one call."""
    z1, z2 = views(B, D, DEVICE, DTYPE)

    def call() -> None:
        torch.autograd.grad(spectral_loss(z1, z2, FILTERS[filtered]), (z1, z2))
        if GPU:
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        call()
    kind = ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        call()
    return {"case": f"{B}x{D} {filtered}"} | summary(found.key_averages())


def summary(averages: Iterable[Any]) -> dict[str, Any]:
    """Launches, microseconds, and both of each kernel."""
    kernels = [
        (each.key, each.count, each.self_device_time_total if GPU else each.self_cpu_time_total)
        for each in averages
        if not GPU or each.device_type == DeviceType.CUDA  # else it is the launch of a kernel
    ]
    kernels.sort(key=lambda kernel: -kernel[2])
    return {
        "launches": sum(count for _, count, _ in kernels),
        "us": round(sum(us for *_, us in kernels), 1),
        "kernels": [(name[:100], count, round(us, 1)) for name, count, us in kernels[:SHOWN]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.profile", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs=2, type=int, default=[512, 2048], metavar=("B", "D"))
    parser.add_argument("--rows", type=Path, help="file to append each row to, as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="filter.")
    for filtered in FILTERS:
        row = trace(filtered, *(SMALLEST[0] if SMALL else args.shape))
        append(args.rows, row)
        print(f"{row['case']}: {row['launches']} launches, {row['us']} us", flush=True)


if __name__ == "__main__":
    main()
