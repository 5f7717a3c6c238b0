"""Does a spectral filter hold a vision transformer's rank? Runs of a small one on digits."""

from bench.measured import Runs, Values, measure_runs

VIT = {
    "RDM-SimSiam, target filter s⁻¹": ["digits_vit_rdm_simsiam"],
    "RDM-SimSiam, online filter s¹": [
        *("digits_vit_rdm_simsiam", "--pred-location", "online", "--sigma", "1")
    ],
    "SimSiam, learned predictor": ["digits_vit_simsiam"],
    "BYOL, learned predictor": ["digits_vit_byol"],
    "SymSimSiam, the control": ["digits_vit_symsimsiam"],
}


def measure_vit(runs: Runs, quick: bool) -> Values:
    """Accuracies and last effective rank."""
    return measure_runs(runs, VIT)
