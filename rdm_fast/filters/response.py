"""The family of spectral filters g(s), and the rule for what counts as a direction at all.

A filter is W = V g(S) V^T for a batch of projections Z = U S V^T. It takes the place of the
learned predictor: z W rescales every principal direction by g of its strength s.

    kind    g(s)            domain                        on s > 0
    poly    s^sigma         scale free under cosine       rises for sigma > 0, falls for sigma < 0
    log     log s           negative for s < 1            rises
    log_1   log(1 + s)      non-negative                  rises
    log_2   log(1 + s^2)    non-negative                  rises
    custom  any function    that of FilterConfig.response, from Python; computed by eigh

RDM (arXiv:2303.02387): training raises the effective rank while the target branch's output has
a higher one than the online branch's. A rising g lowers the effective rank of what it filters,
a falling one raises it; so the online branch wants a rising g, the target a falling one.

s are the singular values of the global batch of un-normalized projections, as in the paper's
code: they grow with the square root of the batch, and the log kinds therefore depend on it.
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
    """tau: singular values up to it are rounding noise or too weak to filter, and are cut off.

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
    rms = (s.square().sum(dim=-1, keepdim=True) / (samples * features)).sqrt()
    noise = noise_floor(rms, samples=samples, features=features, dtype=dtype)
    return torch.maximum(relative * s.amax(dim=-1, keepdim=True), noise)


def noise_floor(rms: Tensor, *, samples: int, features: int, dtype: torch.dtype) -> Tensor:
    """Largest singular value of the rounding error of projections [B, D] of this dtype and rms."""
    return NOISE * unit_roundoff(dtype) * (math.sqrt(samples) + math.sqrt(features)) * rms


def g(config: FilterConfig, s: Tensor) -> Tensor:
    """The paper's g, element by element of singular values s > 0."""
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
            return _custom(config, s)


def _custom(config: FilterConfig, s: Tensor) -> Tensor:
    assert config.response is not None  # FilterConfig has seen to it
    values = config.response(s)
    if not isinstance(values, Tensor) or (values.shape, values.dtype) != (s.shape, s.dtype):
        found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else values
        raise ValueError(
            f"FilterConfig(kind='custom') gave its response {s.dtype} {tuple(s.shape)} singular "
            f"values, and it made {found} of them: it must work element by element"
        )
    return values


def response(config: FilterConfig, s: Tensor, tau: Tensor) -> Tensor:
    """g(s) where s > tau, and 0 where the direction is cut off.

    poly is taken of s / s_max: the cosine loss ignores a constant factor, and 16-bit arithmetic
    then cannot overflow.

    Args:
        config: which g.
        s: singular values, [v, n].
        tau: from `cutoff`, [v, 1].

    Returns:
        [v, n] in the dtype of s, finite for finite s.
    """
    kept = s > tau
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


def advice(config: FilterConfig) -> str | None:
    """What RDM predicts for a filter on the wrong branch, or None if there is nothing to say."""
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
