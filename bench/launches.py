"""How many kernels does a loss launch on a GPU, and how long must that take?

    python -m bench.launches [--filters online target] [--shape 512 2048] [--dtype bfloat16]
                             [--engine auto gemm eigh] [--given] [--operations]
                             [--write FILE] [--check FILE] [--json FILE]

Needs no GPU: the loss and its gradient run on tensors without data that claim to be on an H100, and
everything that would be launched is counted. What CUDA would run is what counts: for one of our ops
its Triton launcher, for all others the operation that PyTorch dispatches. A view costs nothing.

Products of cuBLAS are launches. Factorizations, solves and eigendecompositions are not: each is
many launches of cuSOLVER and is counted apart, and those that make the host wait again.

The predicted times follow from the counts by the constants below, as kernels/README.md explains.
They are no measurements. `--check` fails if the table in a file has other counts or times.
"""

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch._C import DispatchKey, _dispatch_has_kernel_for_dispatch_key
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.accuracy import LOGS, ONLINE, PROTOTYPES
from bench.fake_device import backward, fake_device, triton_calls
from bench.machine import H100, floor
from bench.markdown import Columns, between, replace_between, table_of
from rdm_fast import FilterConfig
from rdm_fast.config import PrototypesConfig
from rdm_fast.filters.loss import SpectralCosine
from rdm_fast.methods import Swav
from rdm_fast.methods.prototypes import Prototypes

OURS = "rdm"
DTYPES = ["bfloat16", "float16", "float32"]
SHARE = 0.5  # of the data sheet's operations and bytes a second that a kernel reaches
LATENCY = 2.5e-6  # seconds a kernel takes in a graph, however little it does
HOST_LAUNCH, HOST_OP = 8e-6, 20e-6  # seconds of the host a launch, and more for one of our ops
PER_COLUMN = {"eig|svd": 15e-6, "cholesky|solve|lu_|geqrf|linalg_(inv|qr|lu)": 0.4e-6}
"""Seconds a column of a factorization."""
WAITS = re.compile("eig|svd|_local_scalar_dense")  # they read a result on the host
PRODUCT = re.compile("mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot")
ALLOCATES = re.compile("(new_)?empty.*|_unsafe_view|lift_fresh.*")  # launch nothing
SEVERAL = {"constant_pad_nd": 2, "eye": 2}  # kernels of an operation that has more than one


# ---- counting ----------------------------------------------------------------------------------


@dataclass
class Count:
    """What a loss and its gradient launch."""

    triton: int = 0
    products: int = 0
    """Of cuBLAS."""
    others: int = 0
    """Kernels of PyTorch that are not products."""
    factorizations: dict[str, int] = field(default_factory=dict)
    waits: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    """Every kernel, product and factorization by its name, and every op of rdm_kernels."""
    device: float = 0.0
    """Predicted seconds of the device, where nothing waits for the host."""
    host: float = 0.0
    """Predicted seconds of the host in eager mode."""

    @property
    def launches(self) -> int:
        return self.triton + self.products + self.others

    @property
    def eager(self) -> float:
        """Predicted seconds, where host and device work at the same time."""
        return max(self.device, self.host)


def add(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_view(op: torch._ops.OpOverload) -> bool:
    returned = [result.alias_info for result in op._schema.returns]
    return bool(returned) and all(alias and not alias.is_write for alias in returned)


class Launches(TorchDispatchMode):
    """Counts what CUDA would launch for the operations in this context, on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self.inside = False  # an rdm op

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == OURS:
            return self._run_ours(op, args, kwargs)
        if op.namespace == "aten":
            with self:  # inside an rdm op autograd does not take others apart
                out = op.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = op(*args, **kwargs)
        name = op._overloadpacket.__name__
        on_device = any(x.device.type == "cuda" for x in tensors((args, kwargs, out)))
        if not on_device or not tensors(out) or is_view(op) or ALLOCATES.fullmatch(name):
            return out
        add(self.count.operations, name)
        self.count.waits += bool(WAITS.search(name))
        per_column = next((cost for key, cost in PER_COLUMN.items() if re.search(key, name)), None)
        if per_column:
            add(self.count.factorizations, name)
            self.count.device += per_column * tensors(out)[0].shape[-1]
            return out
        kernels = SEVERAL.get(name, 1)
        if PRODUCT.fullmatch(name):
            self.count.products += 1
        else:
            self.count.others += kernels
        self._add_time(kernels, HOST_LAUNCH * kernels)
        if not self.inside:
            work = flops(op, args, kwargs, out) if op._overloadpacket in flop_registry else {}
            self._add_work((args, kwargs), out, work)
        return out

    def _run_ours(self, op, args, kwargs):
        """Run the op's CUDA launcher, or its body if it has none, and count inside."""
        add(self.count.operations, op.name())
        has_launcher = _dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA")
        key = DispatchKey.CUDA if has_launcher else DispatchKey.CompositeExplicitAutograd
        outermost, self.inside = not self.inside, True
        with self:
            out = op._op_dk(key, *args, **kwargs)
        self.inside = not outermost
        self.count.host += HOST_OP
        if outermost:
            self._add_work((args, kwargs), out, work_of_body(op, args, kwargs))
        return out

    def launch_triton(self, kernel: Any) -> None:
        self.count.triton += 1
        add(self.count.operations, kernel.__name__)
        self._add_time(1, HOST_LAUNCH)

    def _add_time(self, kernels: int, host: float) -> None:
        self.count.device += LATENCY * kernels
        self.count.host += host

    def _add_work(self, given: object, out: object, work: Counter[str]) -> None:
        """Time of the bytes that are given and returned, and of these operations."""
        moved = {id(x): x.numel() * x.element_size() for x in tensors((given, out))}
        self.count.device += floor(H100, sum(moved.values()), work) / SHARE


# ---- operations --------------------------------------------------------------------------------


def flops(op, args, kwargs, out, given: Sequence[Tensor] = ()) -> Counter[str]:
    """Operations of a product in each arithmetic of `bench.machine.Peak`.

    Args:
        given: the inputs of the rdm op that this product defines; their dtypes decide what its
            kernel multiplies. None for a product of cuBLAS, which does as its operands say.
    """
    count = flop_registry[op._overloadpacket](*args, **kwargs, out_val=out)
    floating = [x for x in given or tensors(args) if x.is_floating_point()]
    most = max(x.ndim for x in floating)
    sizes = [x.element_size() for x in floating if x.ndim == most]  # of matrices
    if max(sizes) == 8:
        return Counter(fp64=count)
    if max(sizes) == 2:
        return Counter(bf16=count)
    if not given:
        return Counter(fp32=count)
    # float32 is split: into two terms beside 16 bits, else into three products of tf32
    return Counter(bf16=2 * count) if min(sizes) == 2 else Counter(tf32=3 * count)


class Products(TorchDispatchMode):
    """Operations of all products in the body that defines an rdm op."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given, self.work = given, Counter[str]()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if op._overloadpacket in flop_registry:
            self.work += flops(op, args, kwargs, out, self.given)
        return out


def work_of_body(op, args, kwargs) -> Counter[str]:
    with Products(tensors((args, kwargs))) as products:
        op._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    return products.work


# ---- a filter ------------------------------------------------------------------------------------


@contextmanager
def counting() -> Iterator[Launches]:
    """A counter of all that is launched in this context."""
    launches = Launches()
    with triton_calls(launches.launch_triton), launches:
        yield launches


def count(
    config: FilterConfig, shape: tuple[int, int], dtype: torch.dtype, *, given: bool = False
) -> Count:
    """Launches of the mean loss of two views [B, D] and its gradient; needs `fake_device`.

    Args:
        given: the targets are given, as in BYOL; else they are the other view, as in SimSiam.
    """
    criterion = SpectralCosine(config)
    online = torch.empty(2, *shape, device="cuda", dtype=dtype, requires_grad=True)
    target = torch.empty(2, *shape, device="cuda", dtype=dtype) if given else None
    with counting():
        criterion(online, target)  # copies constants to the device
    with counting() as launches:
        (grad,) = backward(criterion(online, target).mean()).values()
    assert grad.shape == online.shape and grad.dtype == dtype
    return launches.count


# ---- prototypes --------------------------------------------------------------------------------


def count_prototypes(name: str, B: int, dtype: torch.dtype) -> Count:
    """Launches from two views of B rows of unit length to the loss, and back to their gradient and
    the prototypes'; needs `fake_device`."""
    centring, K, D = PROTOTYPES[name]
    settings = PrototypesConfig(centring=centring)
    with torch.device("cuda"):
        prototypes = Prototypes(K, D, None if dtype == torch.float32 else dtype)
        method = Swav(nn.Identity(), nn.Identity(), prototypes, settings)
        z = torch.empty(2, B, D, requires_grad=True)
    with counting() as launches:
        grads = backward(method.loss(method.prototypes(z), z.detach()))
    assert len(grads) == 2  # of z and of the prototypes
    return launches.count


# ---- the report --------------------------------------------------------------------------------


def filters() -> dict[str, FilterConfig]:
    """Every filter by its name, a row each."""
    found = {}
    for location in ("online", "target"):
        for sigma in ONLINE:
            found[f"{location} s^{sigma:g}"] = FilterConfig(location=location, sigma=sigma)
        for kind in LOGS:
            found[f"{location} {kind}"] = FilterConfig(location=location, kind=kind)
    return found


COLUMNS: Columns = {
    "filter": lambda row: row["filter"],
    "launches": lambda row: str(row["launches"]),
    "Triton": lambda row: str(row["triton"]),
    "cuBLAS": lambda row: str(row["products"]),
    "PyTorch": lambda row: str(row["others"]),
    "factorizations": lambda row: named(row["factorizations"]) or "-",
    "waits": lambda row: str(row["waits"]),
    "graph, ms": lambda row: f"{1e3 * row['device']:.2f}" if not row["waits"] else "-",
    "eager, ms": lambda row: f"{1e3 * row['eager']:.2f}",
    "measured": lambda row: row["measured"],
}


def named(calls: dict[str, int]) -> str:
    return ", ".join(f"{times} {name}" for name, times in sorted(calls.items()))


def measured(table: str) -> dict[str, str]:
    """What was measured, which is the last column of a table, by filter."""
    cells = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    return {row[1].strip(): row[-2].strip() for row in cells}


def counted(table: str) -> list[str]:
    """The rows of a table without what was measured."""
    return [line.rsplit("|", 2)[0] for line in table.splitlines() if line.startswith("| ")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.launches", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--filters", nargs="+", default=[""], help="only those with one of these in their name"
    )
    parser.add_argument("--shape", nargs=2, type=int, default=[512, 2048], metavar=("B", "D"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--engine", choices=["auto", "gemm", "eigh"], default="auto")
    parser.add_argument("--given", action="store_true", help="targets are given, as in BYOL")
    parser.add_argument("--operations", action="store_true", help="list what is launched, by name")
    parser.add_argument("--write", type=Path, help="Markdown file with a table to replace")
    parser.add_argument("--check", type=Path, help="Markdown file with the same table")
    parser.add_argument("--json", type=Path, help="JSON file for all numbers")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="filter.")

    file = args.write or args.check
    known = measured(between(file, "launches")) if file else {}
    rows = []
    with fake_device():
        for name, config in filters().items():
            if not any(part in name for part in args.filters):
                continue
            config = replace(config, engine=args.engine)
            found = count(config, tuple(args.shape), getattr(torch, args.dtype), given=args.given)
            totals = {"launches": found.launches, "eager": found.eager}
            own = {"filter": name, "measured": known.get(name, "")}
            rows.append(own | totals | asdict(found))
        of_filters = len(rows)
        for name in PROTOTYPES:
            if any(part in name for part in args.filters):
                found = count_prototypes(name, args.shape[0], getattr(torch, args.dtype))
                totals = {"launches": found.launches, "eager": found.eager}
                own = {"filter": name, "measured": known.get(name, "")}
                rows.append(own | totals | asdict(found))
    B, D = args.shape
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    targets = "given targets" if args.given else "each other's targets"
    text = (
        f"Two views ({B}, {D}), {args.dtype}, {targets}, engine={args.engine}, {versions}.\n"
        f"Counted; times predicted.\n\n{table_of(rows[:of_filters], COLUMNS)}"
    )
    columns: Columns = {"loss": COLUMNS["filter"]} | COLUMNS
    del columns["filter"]
    if of_prototypes := rows[of_filters:]:
        text += (
            f"\n\nDINO and SwAV from two views of {B} rows of unit length to the loss, and back; D "
            f"is 256 and 128.\n\n{table_of(of_prototypes, columns)}"
        )
    print(text)
    if args.operations:
        for row in rows:
            print(f"\n{row['filter']}: {named(row['operations'])}")
    if args.write:
        replace_between(args.write, "launches", text)
    if args.json:
        args.json.write_text(json.dumps({"args": vars(args), "rows": rows}, default=str))
    if args.check and counted(between(args.check, "launches")) != counted(text):
        print(f"error: {args.check} has another table: use --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
