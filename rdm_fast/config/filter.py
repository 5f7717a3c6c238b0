"""The spectral filter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rdm_fast.config.checks import Between, require, require_fields
from rdm_fast.config.flags import Alias, Shape

Kind = Literal["poly", "log", "log_1", "log_2", "custom"]
Location = Literal["online", "target"]
Basis = Literal["own", "online"]
Engine = Literal["auto", "gemm", "eigh", "reference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """The spectral filter g, applied to the singular values s of a batch of projections."""

    kind: Annotated[Kind, Alias("--pred-type")] = "poly"
    """g(s): poly is s^sigma, log is log s, log_1 is log(1 + s), log_2 is log(1 + s^2); custom is
    your own function, from Python only."""
    location: Annotated[Location, Alias("--pred-location")] = "online"
    """Branch to filter. RDM calls for a rising g on the online branch, falling on the target."""
    sigma: Annotated[float, Between(-100, 100), Alias("--sigma")] = 1.0
    """Exponent of kind=poly; 0 filters nothing. The other kinds ignore it."""
    basis: Basis = "own"
    """Spectrum that filters the target: the target's own, or the online branch's."""
    cutoff: Annotated[float, Between(0, 1, above=True)] = 1e-4
    """Cut off singular values up to this share of the largest, and those of rounding noise;
    engine=gemm damps those under 1e-3 in any case."""
    center: bool = False
    """Take the spectrum of the centered projections (covariance) instead of the raw correlation."""
    engine: Engine = "auto"
    """How to compute the filter: auto chooses, reference repeats the paper's released code."""
    response: Annotated[Callable[[Any], Any] | None, Shape.HIDDEN] = field(
        default=None, metadata={"saved": False}
    )
    """g(s) of kind=custom (not a flag), called once for each view: takes the singular values of a
    batch that are above the cutoff, float64 [k], ascending, and returns as many, in float64."""

    def __post_init__(self) -> None:
        require_fields("filter.", self)
        require(
            self.kind != "custom" or self.response is not None,
            "filter.kind=custom needs a function, so it exists only in Python as "
            "FilterConfig(kind='custom', response=f): use poly, log, log_1 or log_2 here",
        )
        require(
            self.response is None or (self.kind == "custom" and callable(self.response)),
            f"FilterConfig has response={self.response!r} with kind={self.kind}: give a function, "
            "with kind='custom' only",
        )
        require(
            self.cutoff < 1,
            f"filter.cutoff={self.cutoff} is not a share of the largest singular value: "
            "give a number between 0 and 1, such as 1e-4",
        )
        require(
            self.basis == "own" or self.location == "target",
            "filter.basis=online applies to the target branch only: "
            "use filter.location=target, or leave filter.basis=own",
        )
        require(
            not (self.center and self.engine == "reference"),
            "filter.engine=reference is the paper's formulation, which never centers: "
            "leave out filter.center, or use filter.engine=eigh",
        )
        require(
            self.engine != "gemm" or self.why_not_gemm is None,
            f"filter.engine=gemm cannot be accurate with {self.why_not_gemm}: "
            "use filter.engine=eigh or auto",
        )

    @property
    def is_falling(self) -> bool:
        """Whether g falls with s."""
        return self.kind == "poly" and self.sigma < 0

    @property
    def why_not_gemm(self) -> str | None:
        """The setting that rules out engine=gemm (matrix products alone), if any."""
        if self.kind == "custom":
            return "filter.kind=custom"
        if self.center:
            return "filter.center"
        if not 1e-4 <= self.cutoff <= 0.1:
            return f"filter.cutoff={self.cutoff:g} (gemm takes 1e-4 to 0.1)"
        least = -1 if self.location == "target" and self.basis == "own" else -0.5
        if self.kind == "poly" and not least <= self.sigma <= 6:
            return f"filter.sigma={self.sigma:g} (gemm takes {least:g} to 6 here)"
        return None
