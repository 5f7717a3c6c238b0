"""How accurate are the losses of DINO and SwAV? Assignments and gradient against float64.

    python -m bench.prototypes [--device cpu] [--write FILE] [--rows FILE]

Prints a row for each loss and dtype of the factors of the logits: the error of the assignments q
relative to them (root mean square), 1 - cos of the gradient for z, and the error of the loss. Rows
z lie near a prototype each. Exits with 1 if q or the gradient exceeds its bound.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bench import report
from bench.accuracy import report_faults
from bench.markdown import replace_between
from bench.rows import SMALL, append
from rdm_fast.config import PrototypesConfig
from rdm_fast.config.prototypes import Centring
from rdm_fast.methods import Swav
from rdm_fast.methods.prototypes import Prototypes

RECIPES: dict[str, tuple[Centring, int, int]] = {
    "dino, K 4096": ("mean", 4096, 256),
    "dino, K 65536": ("mean", 65_536, 256),
    "swav, K 3000": ("sinkhorn", 3000, 128),
}
"""Losses of the recipes: the target map, K and D."""
LOSSES = RECIPES | {"dino, sinkhorn, K 4096": ("sinkhorn", 4096, 256)}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOUNDS = {"float32": (1e-4, 1e-7), "bfloat16": (1e-2, 1e-4), "float16": (2e-3, 1e-6)}
"""Of q and of the gradient."""


def loss_of(name: str, dtype: torch.dtype | None) -> Swav:
    """A loss by its name, without a network; it makes both methods' targets."""
    centring, K, D = LOSSES[name]
    K = min(K, 64) if SMALL else K
    settings = PrototypesConfig(centring=centring, epsilon=0.05 if "swav" in name else 0.04)
    return Swav(nn.Identity(), nn.Identity(), Prototypes(K, D, dtype), settings)


def errors(name: str, dtype: str, device: str) -> tuple[float, float, float]:
    """Errors of q, of dL/dz and of the loss."""
    generator = torch.Generator().manual_seed(0)
    narrow, wide = loss_of(name, DTYPES[dtype]), loss_of(name, None)
    C = torch.randn(narrow.prototypes.weight.shape, generator=generator)
    noise = torch.randn(2, 64, C.shape[1], generator=generator)
    z = F.normalize(C[torch.arange(64) % len(C)] + 2 * noise, dim=-1).to(device)
    found = []
    for method, exact in ((narrow, torch.float32), (wide, torch.float64)):
        method.prototypes.weight = nn.Parameter(C)
        temperature = method.target_temperature.item()  # before it is widened
        method.to(device, exact).target_temperature.fill_(temperature)
        rows = z.to(exact).requires_grad_()
        loss = method.loss(method.prototypes(rows), rows.detach().flip(0))
        (gradient,) = torch.autograd.grad(loss, rows)
        found.append([x.detach().double() for x in (method.assign(rows.flip(0)), gradient, loss)])
    (q, gradient, loss), (exact_q, exact_gradient, exact_loss) = found
    used = exact_q > 1e-6
    cosine = F.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0)
    error = ((q - exact_q) / exact_q)[used].square().mean().sqrt()
    return float(error), max(1 - float(cosine), 1e-16), abs(float(loss - exact_loss))


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.prototypes", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="Markdown file with such a table to replace")
    parser.add_argument("--rows", type=Path, help="file to append each row to, as JSON")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows, faults = [], []
    for name, dtype in product(LOSSES, DTYPES):
        q, gradient, loss = errors(name, dtype, args.device)
        rows.append({"case": name, "dtype": dtype, "q": q, "gradient": gradient, "loss": loss})
        append(args.rows, rows[-1])
        if q > BOUNDS[dtype][0] or gradient > BOUNDS[dtype][1]:
            faults.append(f"{name} {dtype}: q {q:.1e}, gradient {gradient:.1e}")
    (text,) = report.prototypes(rows)
    print(text)
    if args.write:
        replace_between(args.write, "prototypes", text)
    return report_faults(faults)


if __name__ == "__main__":
    sys.exit(main())
