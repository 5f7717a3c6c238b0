"""Counts what CUDA would launch, without a GPU, and predicts how long that must take.

Operations run on tensors without data that claim to be on an H100 (`bench.fake_device`). What CUDA
would run is what counts: for one of our ops its Triton launcher, for all others the operation that
PyTorch dispatches. A view costs nothing.

Products of cuBLAS are launches. Factorizations, solves and eigendecompositions are not: each is
many launches of cuSOLVER and is counted apart, and those that make the host wait again.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._C import DispatchKey, _dispatch_has_kernel_for_dispatch_key
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.fake_device import triton_calls
from bench.machine import H100, floor

OURS = "rdm"
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


def is_view(op: OpOverload) -> bool:
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


@contextmanager
def counting() -> Iterator[Launches]:
    """A counter of all that is launched in this context."""
    launches = Launches()
    with triton_calls(launches.launch_triton), launches:
        yield launches
