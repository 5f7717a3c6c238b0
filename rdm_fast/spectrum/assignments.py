"""Spectra of DINO's and SwAV's outputs, which are softmaxes over K prototypes.

    p = softmax(l / t)      online output, of logits l = z C^T
    q                       target output, made from the target's logits l'

Everything follows from Gram matrices such as p p^T, [B, B]. Ranks gather them block by block, so
beside copies of this rank's logits nothing is K wide.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from rdm_fast.filters.decomposition import center_samples, eigen_of_gram
from rdm_fast.filters.response import cutoff
from rdm_fast.runtime.distributed import gather_rows, world_size
from rdm_fast.spectrum.branches import BranchSpectra, Profile
from rdm_fast.spectrum.directions import ALL_BUT, KEEP
from rdm_fast.spectrum.measures import (
    attainable_rank,
    channel_std,
    effective_rank,
    eigenvalues,
    eigenvalues_of_gram,
)

ROWS = 2048
"""Rows of a global batch whose Gram matrices are formed, at most: the first ones of every rank."""
BLOCK = 4096
"""Prototypes whose columns are gathered at a time."""


@dataclass(frozen=True)
class PrototypeOutputs:
    """What one step made of the two large views. Rows are this rank's; no gradient.

    Attributes:
        online: logits l, [2, b, K].
        target: assignments q that entered the loss, [2, b, K]; q[v] is matched with online[v].
        temperature: t of the online output.
        target_temperature: that of the targets: DINO's teacher's, or Sinkhorn's epsilon. A scalar.
        averaged: whether the target has weights of its own, a moving average.
        map: name of what else makes q of the logits: "centring" or "equipartition"; empty to leave
            out the attribution, as with a spectral filter.
        center: DINO's, [K], or None.
    """

    online: Tensor
    target: Tensor
    temperature: float
    target_temperature: Tensor
    averaged: bool
    map: str
    center: Tensor | None = None


@torch.no_grad()
def assignment_spectra(
    outputs: PrototypeOutputs, projection: Tensor, target_logits: Tensor | None = None
) -> BranchSpectra:
    """Spectra of both outputs, and what moves their ranks apart; every rank must call it.

    Args:
        outputs: of the step.
        projection: unit rows z of the online branch, [2, b, D].
        target_logits: l', [2, b, K]; with them the result has a profile, the ranks of the logits
            and of the centered outputs, and the attribution of the rank difference:

                ema          rank softmax(l' / t)  - rank p, if averaged (else it is 0)
                sharpening   rank softmax(l' / t') - rank softmax(l' / t)
                map          rank q                - rank softmax(l' / t')
    """
    own, t = outputs, outputs.temperature
    log_p = (own.online / t).log_softmax(dim=-1)
    rows = {"p": log_p.exp(), "q": own.target}
    pairs = ["pp", "qq"]
    if target_logits is not None:
        rows |= {"t": (target_logits / t).softmax(dim=-1), "l": own.online}
        rows["s"] = (target_logits / own.target_temperature).softmax(dim=-1)
        rows["m"] = target_logits if own.center is None else target_logits - own.center
        pairs += ["tt", "ss", "ll", "mm", "qt", "pq"]
    G = _grams(rows, pairs)
    projection = gather_rows(projection)
    K = own.online.shape[-1]
    values = {name: _mean_eigenvalues(G[name], K) for name in pairs if name[0] == name[1]}
    more = _usage(log_p, rows["p"], own.target) | {"teacher_temp": own.target_temperature}
    if own.center is not None:
        more["center_norm"] = own.center.norm()
    profile = None
    if target_logits is not None:
        ranks = {name[0]: effective_rank(each) for name, each in values.items()}
        more |= {
            "effective_rank/logits_online": ranks["l"],
            "effective_rank/logits_target": ranks["m"],
        }
        if own.map:
            parts = {"ema": ranks["t"] - ranks["p"]} if own.averaged else {}
            parts |= {"sharpening": ranks["s"] - ranks["t"], own.map: ranks["q"] - ranks["s"]}
            more |= {f"rank_difference/{part}": value for part, value in parts.items()}
        for name, key in (("pp", "online"), ("qq", "target")):
            centered = effective_rank(_mean_eigenvalues(center_samples(G[name]), K))
            more[f"effective_rank/{key}_centred"] = centered
        profile = _profile(G, K, own.online.dtype)
    return BranchSpectra(
        online=values["pp"],
        target=values["qq"],
        projection=torch.stack([eigenvalues(z) for z in projection]).mean(dim=0),
        std=channel_std(projection.flatten(0, 1)),
        attainable=attainable_rank(projection[0]),
        profile=profile,
        more=more,
    )


def _grams(rows: Mapping[str, Tensor], pairs: list[str]) -> dict[str, Tensor]:
    """x y^T of the rows of all ranks for each pair "xy", [2, B, B] float64."""
    first = max(1, ROWS // world_size())
    found: dict[str, Tensor] = {}
    for columns in _blocks(next(iter(rows.values())).shape[-1]):
        block = {
            name: gather_rows(each[:, :first, columns].contiguous()).to(torch.float64)
            for name, each in rows.items()
        }
        for pair in pairs:
            product = block[pair[0]] @ block[pair[1]].mT
            found[pair] = product if pair not in found else found[pair].add_(product)
    return found


def _blocks(K: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, K, BLOCK))


def _mean_eigenvalues(G: Tensor, K: int) -> Tensor:
    """Of the correlation matrices of rows [B, K] with these Gram matrices, mean over views."""
    B = G.shape[-1]
    views = [eigenvalues_of_gram(each, B)[-min(B, K) :] for each in G]
    return torch.stack(views).mean(dim=0)


def _usage(log_p: Tensor, p: Tensor, q: Tensor) -> dict[str, Tensor]:
    """Prototypes in use, softness of the rows, and the part of the loss that can be trained."""

    def over_batch(x: Tensor) -> Tensor:
        """Mean over the rows of all ranks, [2, n], for x [2, b, n]."""
        return gather_rows(x.mean(dim=1, keepdim=True)).mean(dim=1)

    def entropy(x: Tensor) -> Tensor:
        return -torch.special.xlogy(x, x).sum(dim=-1)

    softness = {"online": entropy(p), "target": entropy(q)}
    cross = -(q * log_p).sum(dim=-1)  # log_p is finite where p is 0
    rows = over_batch(torch.stack([*softness.values(), cross], dim=-1)).mean(dim=0)
    return {
        "perplexity/online": entropy(over_batch(p)).exp().mean(),
        "perplexity/target": entropy(over_batch(q)).exp().mean(),
        "entropy/online": rows[0] / log(p.shape[-1]),
        "entropy/target": rows[1] / log(p.shape[-1]),
        "kl": rows[2] - rows[1],
    }


def _profile(G: Mapping[str, Tensor], K: int, dtype: torch.dtype) -> Profile:
    """The measures of `directions.py`. With X = U S V^T, rows Y have Y v_i = Y X^T u_i / s_i."""
    s, responses, alignments = [], [], []
    for view in range(len(G["pp"])):
        u, taken, kept = _axes(G["tt"][view], K, dtype)
        g = (u * (G["qt"][view] @ u)).sum(dim=0) / taken.square()
        s.append(taken)
        responses.append(g.where(kept, torch.nan))
        u, made, kept = _axes(G["qq"][view], K, dtype)
        variance = made.square()
        top = kept & (variance.cumsum(dim=0) - variance < (1 - ALL_BUT) * variance.sum())
        onto = (G["pq"][view] @ u[:, top]) / made[top]
        turned = (onto * (G["pp"][view] @ onto)).sum(dim=0).clamp_min(0).sqrt()
        tiny = torch.finfo(turned.dtype).tiny
        alignments.append((onto.square().sum(dim=0) / turned.clamp_min(tiny)).mean())
    return Profile(*(torch.stack(views).mean(dim=0) for views in (s, responses, alignments)))


def _axes(G: Tensor, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors [B, n], singular values [n], strongest first; which are no noise."""
    eigen, n = eigen_of_gram(G[None]), min(len(G), K)
    s = eigen.eigenvalues[0].flip(0)[:n].sqrt()
    tau = cutoff(s[None], samples=len(G), features=K, dtype=dtype, relative=KEEP.cutoff)
    return eigen.vectors[0].flip(1)[:, :n], s, s > tau[0]
