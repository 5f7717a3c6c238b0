"""The family of spectral filters g(s), and the cutoff that separates directions from noise.

A filter is W = V g(S) V^T for a batch of projections Z = U S V^T. It replaces the learned
predictor: z W rescales every principal direction by g of its strength s.

    kind    g(s)            domain                        on s > 0
    poly    s^sigma         scale free under cosine       rises for sigma > 0, falls for sigma < 0
    log     log s           negative for s < 1            rises
    log_1   log(1 + s)      non-negative                  rises
    log_2   log(1 + s^2)    non-negative                  rises
    custom  any function    FilterConfig.response, from Python only; computed by eigh

RDM (arXiv:2303.02387): training raises the effective rank as long as the target branch's output
has a higher one than the online branch's. A rising g lowers the effective rank of the branch it
filters and a falling g raises it, so the online branch needs a rising g, the target a falling one.

s are the singular values of the global batch of un-normalized projections, as in the paper's
code. They grow with the square root of the batch, so the log kinds depend on the batch size.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from rdm_fast.config import FilterConfig

NOISE = 0.75
"""Rounding noise of a [B, D] matrix is at most about this times u rms (sqrt B + sqrt D)."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """u of a dtype: 2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


def cutoff(
    s: Tensor, *, samples: int, features: int, dtype: torch.dtype, relative: float
) -> Tensor:
    """tau: singular values up to it are cut off, as rounding noise or as too weak.

        tau = max(relative * s_max, 0.75 u rms (sqrt B + sqrt D))

    The second term is the measured norm of the rounding error of the projections themselves.

    Args:
        s: singular values, [v, n], in any order.
        samples: B, rows of the batch they come from.
        features: D, its columns.
        dtype: of the projections before any widening; it decides u.
        relative: FilterConfig.cutoff.

    Returns:
        [v, 1] in the dtype of s.
    """
    noise = noise_share(samples=samples, features=features, dtype=dtype)
    size = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return torch.maximum(relative * s.amax(dim=-1, keepdim=True), noise * size)


def noise_share(*, samples: int, features: int, dtype: torch.dtype) -> float:
    """Largest singular value of the rounding error of [B, D] projections, in units of |Z|_F."""
    roots = math.sqrt(samples) + math.sqrt(features)
    return NOISE * unit_roundoff(dtype) * roots / math.sqrt(samples * features)


def g(config: FilterConfig, s: Tensor) -> Tensor:
    """The paper's g, element by element of singular values s > 0, or the user's."""
    match config.kind:
        case "poly":
            return s**config.sigma
        case "log":
            return s.log()
        case "log_1":
            return s.log1p()
        case "log_2":
            return s.square().log1p()
        case "custom":
            assert config.response is not None  # checked by FilterConfig
            return config.response(s)


@torch.no_grad()
def _custom(config: FilterConfig, s: Tensor, kept: Tensor) -> Tensor:
    """g of each view's kept values, which `config.response` may compare with each other."""
    values = torch.zeros_like(s)
    for view in range(len(s)):
        if len(own := s[view, kept[view]]):
            values[view, kept[view]] = _checked(g(config, own), own)
    return values


def _checked(values: object, s: Tensor) -> Tensor:
    if isinstance(values, Tensor) and (values.shape, values.dtype) == (s.shape, s.dtype):
        return values
    found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else values
    raise ValueError(
        f"FilterConfig(kind='custom'): response returned {found} for {s.dtype} {tuple(s.shape)} "
        "singular values: return a value for each of them, in their dtype"
    )


def response(config: FilterConfig, s: Tensor, tau: Tensor) -> Tensor:
    """g(s) where s > tau, and 0 where the direction is cut off.

    kind=poly uses s / s_max: the cosine loss ignores a constant factor, and 16-bit arithmetic
    cannot overflow.

    Args:
        config: which g.
        s: singular values, [v, n].
        tau: from `cutoff`, [v, 1].

    Returns:
        [v, n] in the dtype of s, finite for finite s.
    """
    kept = s > tau
    if config.kind == "custom":
        return _custom(config, s, kept)
    s = s.where(kept, 1)
    if config.kind == "poly":
        s_max = s.where(kept, 0).amax(dim=-1, keepdim=True)
        s = s / s_max.where(s_max > 0, 1)
    return g(config, s).where(kept, 0)


def trend(config: FilterConfig) -> Literal["rising", "falling", "flat", "unknown"]:
    """How g moves with s."""
    if config.kind == "custom":
        return "unknown"
    if config.kind != "poly" or config.sigma > 0:
        return "rising"
    return "falling" if config.is_falling else "flat"


FEW_ROWS = 8
"""A batch of fewer rows than this part of the width shows too few directions."""


def few_rows(batch: int, width: int) -> str | None:
    """A warning that a filter of a global batch sees few of its directions; None if it sees enough.

    Args:
        batch: rows of the global batch.
        width: of the projector.
    """
    if FEW_ROWS * batch >= width:
        return None
    return (
        f"--optim.global-batch {batch} shows at most {batch} of the projector's {width} "
        "directions, and the filter shapes only those: give "
        f"{-(-width // FEW_ROWS)} or more, or a smaller --model.projector-dim"
    )


def normalized_apart(batch: int, parts: int, rows: int) -> str | None:
    """A warning that batch norm and the filter see different batches; None if they see the same.

    Args:
        batch: rows of the global batch, which the filter sees together.
        parts: optim.accumulate.
        rows: over which batch norm computes its statistics.
    """
    if parts == 1:
        return None
    return (
        f"--optim.accumulate {parts}: batch norm normalizes {rows} images at a time, and the "
        f"filter sees all {batch}, with the differences between the parts as directions of their "
        "own: lower it if the memory allows, or take a model without batch norm"
    )


def advice(config: FilterConfig) -> str | None:
    """RDM's prediction for a filter on the wrong branch; None for any other filter."""
    g = f"sigma={config.sigma:g}" if config.kind == "poly" else f"kind={config.kind}"
    if config.location == "target" and trend(config) == "rising":
        return (
            f"filter.location=target with {g}, a rising g, lowers the target's effective rank: "
            "RDM predicts dimensional collapse. Use a negative sigma, or filter.location=online."
        )
    if config.location == "online" and trend(config) == "falling":
        return (
            f"filter.location=online with {g}, a falling g, raises the online branch's effective "
            "rank: RDM predicts dimensional collapse, and the weakest directions dominate the "
            "gradient. Use a positive sigma, or filter.location=target."
        )
    return None
