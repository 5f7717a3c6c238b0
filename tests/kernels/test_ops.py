"""The contract that all ops share: registration, layouts, launches, devices and CUDA graphs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as pairs
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from rdm_kernels import (
    centered_softmax,
    filter_factors,
    filtered_cosine,
    gram,
    matrix_power,
    neg_cosine,
    product,
    prototype_loss,
    safe_eigh,
    sinkhorn,
    sym_matmul,
)
from rdm_kernels.aot import listed
from rdm_kernels.apply_rows import apply_rows, apply_rows_triton, define_apply_rows
from rdm_kernels.filter_steps import (
    combine,
    combine_triton,
    define_combine,
    define_start,
    start,
    start_triton,
)
from rdm_kernels.filtered_cosine import (
    define_filtered_cosine,
    filtered_cosine_op,
    filtered_cosine_triton,
)
from rdm_kernels.gram import LARGE, define_gram, gram_op, gram_triton
from rdm_kernels.matrix_power import define_eigh_function, eigh_function
from rdm_kernels.neg_cosine import (
    define_neg_cosine,
    define_neg_cosine_backward,
    neg_cosine_backward,
    neg_cosine_backward_triton,
    neg_cosine_op,
    neg_cosine_triton,
)
from rdm_kernels.product import define_product, product_op, product_triton
from rdm_kernels.prototype_loss import (
    centered_softmax_op,
    centered_softmax_triton,
    define_centered_softmax,
    define_prototype_loss,
    define_prototype_loss_backward,
    prototype_loss_backward,
    prototype_loss_backward_triton,
    prototype_loss_op,
    prototype_loss_triton,
)
from rdm_kernels.safe_eigh import define_eigh, eigh_op
from rdm_kernels.sinkhorn import define_sinkhorn, sinkhorn_op, sinkhorn_triton
from rdm_kernels.sym_matmul import define_sym_matmul, sym_matmul_op, sym_matmul_triton
from rdm_kernels.variant import OPTIONS, POINTERS, Variant
from tests.kernels.common import DEVICE, INTERPRETED, Body, Launches, choose_device, randn
from tests.spies import nothing_waits

BF16, FP32 = torch.bfloat16, torch.float32
NARROW = (torch.float16, BF16, FP32)


@dataclass(frozen=True)
class Op:
    """An op with its definition and its launcher, which is the definition where there is none."""

    op: Body
    define: Body
    launch: Body

    @property
    def name(self) -> str:
        return self.define.__name__.removeprefix("define_")


GRAM = Op(gram_op, define_gram, gram_triton)
SYM_MATMUL = Op(sym_matmul_op, define_sym_matmul, sym_matmul_triton)
PRODUCT = Op(product_op, define_product, product_triton)
APPLY_ROWS = Op(apply_rows, define_apply_rows, apply_rows_triton)
COSINE = Op(neg_cosine_op, define_neg_cosine, neg_cosine_triton)
BACKWARD = Op(neg_cosine_backward, define_neg_cosine_backward, neg_cosine_backward_triton)
FILTERED = Op(filtered_cosine_op, define_filtered_cosine, filtered_cosine_triton)
START = Op(start, define_start, start_triton)
COMBINE = Op(combine, define_combine, combine_triton)
PROTOTYPES = Op(prototype_loss_op, define_prototype_loss, prototype_loss_triton)
OF_PROTOTYPES = Op(
    prototype_loss_backward, define_prototype_loss_backward, prototype_loss_backward_triton
)
SOFTMAX = Op(centered_softmax_op, define_centered_softmax, centered_softmax_triton)
SINKHORN = Op(sinkhorn_op, define_sinkhorn, sinkhorn_triton)
EIGH = Op(eigh_op, define_eigh, define_eigh)
FUNCTION = Op(eigh_function, define_eigh_function, define_eigh_function)


def calls() -> Iterator[tuple[Op, tuple[Any, ...]]]:
    """Small calls of every op, with and without each optional argument."""
    X = randn(2, 5, 9)
    for how in ((False, False, False), (True, True, False), (False, True, True)):
        yield from ((GRAM, (X.to(dtype), *how)) for dtype in (BF16, FP32))
    A = randn(2, 7, 7)
    A = A + A.mT
    for C in (None, A.clone()):
        yield from ((SYM_MATMUL, (A, A.clone(), C, 1.0, 2.0, 3.0, norm)) for norm in (False, True))
        yield PRODUCT, (randn(2, 7, 5), randn(2, 5, 7), C, 1.0, 2.0)
    scale = randn(2)
    for dtype in (FP32, BF16):
        X = randn(2, 5, 9, dtype=dtype)
        yield START, (X, A, A @ A, scale.abs(), scale.exp(), 0.1, 0.2, [1.0, 2.0, 3.0])
    yield COMBINE, (randn(2, 2, 3), list(randn(3, 2, 7, 7)), scale, scale, scale.exp(), 0.5)
    norm, *forms = randn(2, 4), *(randn(2, 4, 9, seed=seed) for seed in range(3))
    for dtype in (FP32, BF16):
        p, z, X = randn(2, 4, 9, dtype=dtype), randn(2, 4, 9, seed=1), randn(2, 6, 9, dtype=dtype)
        yield APPLY_ROWS, (randn(2, 5, 6), X, scale, scale.clone(), dtype)
        yield APPLY_ROWS, (randn(2, 5, 6), None, scale, scale.clone(), dtype)
        yield from ((APPLY_ROWS, (randn(2, 5, 6), rows, scale, None, dtype)) for rows in (X, None))
        yield COSINE, (p, z)
        yield BACKWARD, (scale, p, z, *randn(3, 2, 4).unbind())
        yield FILTERED, (p, norm, *forms, randn(2, 9, 6), X, scale)
        yield FILTERED, (p, norm, *forms, None, None, None)
        yield FILTERED, (p, norm, *forms, None, None, scale)
    logits, q, tau = randn(3, 4, 9), randn(2, 4, 9).softmax(dim=-1), scale[0].exp()
    yield PROTOTYPES, (logits, q, 0.1)
    yield OF_PROTOTYPES, (randn(3), logits, q, *randn(3, 3, 4).unbind(), 0.1)
    yield from ((SOFTMAX, (logits, center, tau)) for center in (None, randn(9)))
    yield from ((SINKHORN, (logits.tanh(), tau, iterations)) for iterations in (1, 3))
    for narrow in (False, True):
        yield EIGH, (A, narrow)
        yield FUNCTION, (A @ A, "power", -0.5, 1e-6, narrow)


CALLS = list(calls())
FIRST = list({op.name: (op, args) for op, args in reversed(CALLS)}.values())
LAUNCHED = [(op, args) for op, args in CALLS if op.launch is not op.define]


def each(calls: list[tuple[Op, tuple[Any, ...]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("op", "args"), calls, ids=lambda x: getattr(x, "name", ""))


def in_layout(X: Any, layout: str) -> Any:
    """The same values, if X is a tensor, in another layout."""
    if not isinstance(X, Tensor):
        return X
    if layout == "columns" and X.ndim > 1:
        return X.mT.contiguous().mT
    if layout == "misaligned":
        flat = torch.cat([X.new_full((1,), torch.nan), X.flatten()])
        return flat[1:].view(X.shape)
    return torch.stack([X, torch.full_like(X, torch.nan)], dim=-1)[..., 0]


LAYOUTS = pytest.mark.parametrize("layout", ["columns", "strided", "misaligned"])


def tensors(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


# ---- registration ----------------------------------------------------------------------------


@each(FIRST)
def test_the_op_is_registered_correctly(op: Op, args: tuple[Any, ...]) -> None:
    if op in (COSINE, FILTERED, PROTOTYPES, EIGH, FUNCTION):
        args = (args[0].clone().requires_grad_(), *args[1:])
    torch.library.opcheck(op.op, args)


@each(CALLS)
@LAYOUTS
def test_definition_fake_and_kernel_agree(op: Op, args: tuple[Any, ...], layout: str) -> None:
    """Compiled code relies on the strides of the fake, whatever layout the inputs have."""
    args = tuple(in_layout(x, layout) for x in args)
    with FakeTensorMode() as mode:
        fake = op.op(*tree_map_only(Tensor, mode.from_tensor, args))
    for found in (op.define(*args), op.launch(*args)):
        for a, b in zip(tensors(fake), tensors(found), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert b.is_contiguous()


@each(LAUNCHED)
@LAYOUTS
def test_any_layout_gives_the_same_bits(op: Op, args: tuple[Any, ...], layout: str) -> None:
    """Values between and before those of a view are NaN here."""
    other = tuple(in_layout(x, layout) for x in args)
    for a, b in zip(tensors(op.launch(*other)), tensors(op.launch(*args)), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(other, args, strict=True):
        assert a is b or not isinstance(a, Tensor) or torch.equal(a, b)


def test_kernels_are_compiled_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (DEVICE.type == "cpu") == INTERPRETED and randn(2).device.type == DEVICE.type
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device().type == kind


def test_autocast_changes_no_bit_and_only_losses_take_a_gradient() -> None:
    X = randn(2, 8, 64).requires_grad_()
    forms = [randn(2, 8), *(randn(2, 8, 8, seed=seed) for seed in range(3))]

    def work() -> list[Tensor]:
        products = [gram(X, side="samples"), sym_matmul(X).matrix, product(X, X.mT)]
        R = randn(2, 8, 8)
        losses = [neg_cosine(X, X.flip(0)), filtered_cosine(X, *forms, R, X.detach())]
        products += spectral_filter(X)
        assert not any(found.requires_grad for found in products)
        return [*products, *losses, *(torch.autograd.grad(loss.sum(), X)[0] for loss in losses)]

    plain = work()
    with torch.autocast(DEVICE.type, dtype=BF16):
        assert all(map(torch.equal, plain, work()))


Z = torch.zeros
FORMS = [torch.ones(2, 3, 8) for _ in range(3)]
R, X = torch.ones(2, 8, 6), torch.ones(2, 6, 10)
ROWS = torch.ones(2, 3, 10)
REFUSED: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (gram, (Z(4, 8),), {"side": "samples"}, "X torch.float32 (4, 8)"),
    (gram, (Z(1, 4, 8).double(),), {"side": "samples"}, "X torch.float64"),
    (gram, (Z(1, 0, 8),), {"side": "samples"}, "(1, 0, 8)"),
    (gram, (Z(1, 4, 8),), {"side": "rows"}, "side='rows'"),
    (gram, (Z(1, 4, 8),), {"side": "features", "stacked": True}, "stacked=True"),
    (sym_matmul, (Z(4, 4),), {}, "A torch.float32 (4, 4)"),
    (sym_matmul, (Z(1, 4, 5),), {"beta": 1.0}, "C torch.float32 (1, 4, 5)"),
    (sym_matmul, (Z(1, 4, 4).half(),), {}, "A torch.float16"),
    (sym_matmul, (Z(1, 4, 4),), {"C": Z(1, 4, 4).double()}, "C torch.float64"),
    (sym_matmul, (Z(1, 4, 4), Z(1, 5, 5)), {}, "B torch.float32 (1, 5, 5)"),
    (product, (Z(4, 4), Z(4, 4)), {}, "A torch.float32 (4, 4)"),
    (product, (Z(1, 4, 5), Z(1, 4, 5)), {}, "B torch.float32 (1, 4, 5)"),
    (product, (Z(1, 4, 4), Z(2, 4, 4)), {}, "B torch.float32 (2, 4, 4)"),
    (product, (Z(1, 0, 4), Z(1, 4, 4)), {}, "A torch.float32 (1, 0, 4)"),
    (product, (Z(1, 4, 4), Z(1, 4, 4).double()), {}, "B torch.float64"),
    (product, (Z(1, 4, 4).half(), Z(1, 4, 4).half()), {}, "A torch.float16"),
    (product, (Z(1, 4, 4), Z(1, 4, 4)), {"C": Z(1, 4, 5)}, "C torch.float32 (1, 4, 5)"),
    (neg_cosine, (Z(4, 8), Z(4, 9)), {}, "z torch.float32 (4, 9)"),
    (neg_cosine, (Z(4, 8), Z(4, 8).int()), {}, "z torch.int32"),
    (neg_cosine, (Z(8), Z(8)), {}, "p torch.float32 (8,)"),
    (filtered_cosine, (ROWS, Z(2, 4), *FORMS, R, X), {}, "norm torch.float32 (2, 4)"),
    (filtered_cosine, (ROWS, Z(2, 3), Z(2, 3, 9), *FORMS[1:], R, X), {}, "(2, 3, 9)"),
    (filtered_cosine, (ROWS, Z(2, 3), *FORMS[1:], FORMS[0].double(), R, X), {}, "float64"),
    (filtered_cosine, (ROWS, Z(2, 3), *FORMS, Z(2, 9, 6), X), {}, "R torch.float32 (2, 9, 6)"),
    (filtered_cosine, (ROWS, Z(2, 3), *FORMS, R, Z(2, 8, 10)), {}, "X torch.float32 (2, 8, 10)"),
    (filtered_cosine, (ROWS, Z(2, 3), *FORMS, R, X), {"unit": Z(3)}, "unit torch.float32 (3,)"),
    (filtered_cosine, (ROWS, Z(2, 3), *FORMS), {}, "p torch.float32 (2, 3, 10)"),
    (filter_factors, (Z(2, 3, 4), 0.5), {"cutoff": 1e-4}, "[1e-3, 0.1], got 0.0001"),
    (filter_factors, (Z(2, 3, 4), 0.5), {"cutoff": 0.2}, "[1e-3, 0.1], got 0.2"),
    (filter_factors, (Z(2, 3, 4), 7.0), {}, "7.0"),
    (filter_factors, (Z(2, 3), 0.5), {}, "X torch.float32 (2, 3)"),
    (prototype_loss, (Z(1, 3, 4), Z(2, 3, 4), 0.1), {}, "q torch.float32 (2, 3, 4)"),
    (prototype_loss, (Z(2, 3, 4), Z(2, 3, 5), 0.1), {}, "q torch.float32 (2, 3, 5)"),
    (prototype_loss, (Z(2, 3, 4), Z(2, 3, 4).double(), 0.1), {}, "q torch.float64"),
    (prototype_loss, (Z(2, 3, 4).half(), Z(2, 3, 4).half(), 0.1), {}, "logits torch.float16"),
    (centered_softmax, (Z(2, 3, 4), Z(3), Z(())), {}, "center torch.float32 (3,)"),
    (centered_softmax, (Z(2, 3, 4), None, Z(2)), {}, "temperature torch.float32 (2,)"),
    (centered_softmax, (Z(3, 4), None, Z(())), {}, "scores torch.float32 (3, 4)"),
    (sinkhorn, (Z(3, 4), Z(()), 3), {}, "scores torch.float32 (3, 4)"),
    (sinkhorn, (Z(2, 3, 4).half(), Z(()), 3), {}, "scores torch.float16"),
    (sinkhorn, (Z(2, 3, 4), Z(()), 0), {}, ", 0"),
    (safe_eigh, (Z(3),), {}, "A torch.float32 (3,)"),
    (safe_eigh, (Z(2, 3),), {}, "A torch.float32 (2, 3)"),
    (safe_eigh, (Z(3, 3).int(),), {}, "A torch.int32"),
    (safe_eigh, (Z(0, 0),), {}, "A torch.float32 (0, 0)"),
    (safe_eigh, (torch.eye(2),), {"solve": BF16}, "torch.bfloat16"),
    (matrix_power, (Z(2, 3), 0.5), {}, "A torch.float32 (2, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "args", "options", "found"), REFUSED)
def test_an_argument_that_does_not_fit_is_named(
    function: Body, args: tuple[Any, ...], options: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError) as error:
        function(*args, **options)
    assert function.__name__ in str(error.value) or "=" in found
    assert found in str(error.value)


# ---- launches --------------------------------------------------------------------------------


def large_calls() -> Iterator[tuple[Op, tuple[Any, ...]]]:
    """Calls over all dtypes, on both sides of every size at which a launcher decides."""
    sides = (LARGE, LARGE + 1)
    for dtype, n, center in pairs(NARROW, sides, (False, True)):
        yield GRAM, (torch.ones(1, n, 33, dtype=dtype), False, center, False)
        yield GRAM, (torch.ones(1, 3, n, dtype=dtype), True, center, False)
    A, B = torch.ones(1, 1100, 5), torch.ones(1, 5, 1100)
    yield from ((PRODUCT, (a, b, None, 1.0, 0.0)) for a, b in pairs((A, B.mT), (B, A.mT)))
    for dp, X, D in pairs(NARROW, NARROW, (130, 8448, 8449)):
        N, scale = torch.ones(1, 2, 5), torch.ones(1)
        yield APPLY_ROWS, (N, torch.ones(1, 5, D, dtype=X), scale, scale, dp)
        yield APPLY_ROWS, (N.double(), None, scale, scale, dp)
    for p, z in pairs(NARROW, NARROW):
        rows = torch.ones(2, 1025, dtype=p), torch.ones(2, 1025, dtype=z)
        yield COSINE, rows
        yield BACKWARD, (torch.ones(2), *rows, *(torch.ones(2) for _ in range(3)))


def is_launched_as_listed(variant: Variant, arguments: dict[str, Any]) -> bool:
    """Whether Triton would compile this variant for these arguments."""
    pointers = {getattr(torch, name): pointer for name, pointer in POINTERS.items()}
    pointers |= {torch.float64: "*fp64", torch.int32: "*i32"}
    for name, value in arguments.items():
        kind, _, size = variant.types.get(name, "").partition(":")
        if name in variant.launch or name in OPTIONS:
            fits = value == (variant.launch | variant.options)[name]
        elif isinstance(value, Tensor):
            fits = pointers[value.dtype] == kind and value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            fits = kind == "i32" and (not size or (size == "16" and value % 16 == 0))
        else:
            fits = kind == "fp32"
        if not fits:
            return False
    return True


def test_every_launch_is_listed_and_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """So `aot` checks all that is launched. Nothing is computed here."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)  # which widens bfloat16
    launches = Launches()
    launches.record(monkeypatch)
    for op, args in [*LAUNCHED, *large_calls()]:
        before = len(launches)
        op.launch(*args)
        assert len(launches) > before, op.name
        assert all(each["device"] == args[0].device for _, each in launches[before:]), op.name
    variants = listed()
    for kernel, arguments in launches:
        del arguments["device"]
        found = [v for v in variants if v.kernel is kernel and is_launched_as_listed(v, arguments)]
        assert found, (kernel.__name__, arguments)


# ---- on a GPU ----------------------------------------------------------------------------------


def losses(p: Tensor, z: Tensor, R: Tensor, X: Tensor, norm: Tensor, *forms: Tensor) -> Any:
    found = [neg_cosine(p, z), filtered_cosine(p, norm, *forms, R, X)]
    return found + [torch.autograd.grad(loss.sum(), p)[0] for loss in found]


def spectral_filter(X: Tensor) -> Any:
    return *filter_factors(X, torch.log1p), *filter_factors(X, 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", [*dict.fromkeys(op.name for op, _ in LAUNCHED), "losses", "filter"]
)
def test_nothing_waits_and_a_captured_graph_replays_the_same_bits(name: str) -> None:
    found = {op.name: (op.op, args) for op, args in FIRST}
    X = randn(2, 64, 256, dtype=BF16)
    forms = [randn(2, 64), *(randn(2, 64, 64, seed=seed) for seed in range(3))]
    p = X.clone().requires_grad_()
    found["losses"] = losses, (p, X.flip(0), randn(2, 64, 64), X, *forms)
    found["filter"] = spectral_filter, (X.float(),)  # its first call copies constants
    work, args = found[name]
    work(*args)  # compiles
    with nothing_waits():
        work(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = tensors(work(*args))
    with torch.no_grad():
        for x in args:
            if isinstance(x, Tensor):
                x.mul_(0.75)
    graph.replay()
    assert all(map(torch.equal, captured, tensors(work(*args))))
