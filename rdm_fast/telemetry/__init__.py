"""Telemetry of a run: `metrics.jsonl`, a console line, and optional trackers.

`metrics.jsonl` holds one JSON object a line. The first is `{"environment": {...}}`; the others are
flat, with `step` and any of the keys in `KEYS`. JSON has no NaN or infinity, so values that are not
finite are null. A resumed run first drops the lines after its step, so the file has the steps of an
undisturbed run. If its environment differs, it adds `{"environment": {...}, "resumed_step": n}`.
`spectrum.jsonl`, with whole spectra, is written in the same way.

Only rank zero has writers. Other ranks have a `Telemetry` without any, so callers need no rank
checks.
"""

from rdm_fast.telemetry.console import Plan
from rdm_fast.telemetry.keys import KEYS
from rdm_fast.telemetry.lines import SPECTRUM_KEYS, read_spectra
from rdm_fast.telemetry.timer import StepTimer
from rdm_fast.telemetry.writers import Telemetry

__all__ = ["KEYS", "SPECTRUM_KEYS", "Plan", "StepTimer", "Telemetry", "read_spectra"]
