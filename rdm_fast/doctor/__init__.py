"""`rdm doctor`: what this machine has, where the time of a step goes, and which flag to try."""

from rdm_fast.doctor.diagnosis import diagnose
from rdm_fast.doctor.machine import Finding, look_at_machine
from rdm_fast.doctor.stages import Stage, Step, without_filter
from rdm_fast.doctor.verdict import Situation, Verdict, verdict

__all__ = [
    "Finding",
    "Situation",
    "Stage",
    "Step",
    "Verdict",
    "diagnose",
    "look_at_machine",
    "verdict",
    "without_filter",
]
