"""Spectra of projections: eigenvalues, effective rank, rank difference, measured responses."""

from rdm_fast.spectrum.assignments import PrototypeOutputs, assignment_spectra
from rdm_fast.spectrum.branches import BranchSpectra, Profile, branch_spectra
from rdm_fast.spectrum.directions import Directions, alignment, directions, measured_response
from rdm_fast.spectrum.measures import (
    attainable_rank,
    channel_std,
    effective_rank,
    eigenvalues,
    filtered_eigenvalues,
    filtered_rows,
    rank_difference,
)
from rdm_fast.spectrum.watching import Watch, WatchedBatch, watch

__all__ = [
    "BranchSpectra",
    "Directions",
    "Profile",
    "PrototypeOutputs",
    "Watch",
    "WatchedBatch",
    "alignment",
    "assignment_spectra",
    "attainable_rank",
    "branch_spectra",
    "channel_std",
    "directions",
    "effective_rank",
    "eigenvalues",
    "filtered_eigenvalues",
    "filtered_rows",
    "measured_response",
    "rank_difference",
    "watch",
]
