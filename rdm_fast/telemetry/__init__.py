"""What a run tells of itself: `metrics.jsonl` always, a console line, trackers if asked.

`metrics.jsonl` holds one JSON object a line. The first is `{"environment": {...}}`; each later one
is flat, has `step`, and any of the keys in `KEYS`. JSON knows no NaN or infinity, so a value that
is not finite is written as null. A resumed run first drops the lines after the step it resumes
from, so the file's steps are those of an undisturbed run; if its environment is another one, a
line `{"environment": {...}, "resumed_step": n}` says so. `spectrum.jsonl`, with whole spectra, is
made in the same way.

Only rank zero has writers. All others have a `Telemetry` without any, so nobody asks for the rank.
"""

from rdm_fast.telemetry.console import ConsoleLine, Plan, progress_line
from rdm_fast.telemetry.keys import KEYS, Metrics, Value
from rdm_fast.telemetry.lines import SPECTRUM_KEYS, JsonLines, SpectrumLines, read_spectra
from rdm_fast.telemetry.timer import StepTimer
from rdm_fast.telemetry.trackers import TensorBoard, Trackio, WeightsAndBiases
from rdm_fast.telemetry.writers import Telemetry, Writer

__all__ = [
    "KEYS",
    "SPECTRUM_KEYS",
    "ConsoleLine",
    "JsonLines",
    "Metrics",
    "Plan",
    "SpectrumLines",
    "StepTimer",
    "Telemetry",
    "TensorBoard",
    "Trackio",
    "Value",
    "WeightsAndBiases",
    "Writer",
    "progress_line",
    "read_spectra",
]
