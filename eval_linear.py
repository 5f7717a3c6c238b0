"""Evaluate a backbone: `python eval_linear.py RUN_DIR_OR_CHECKPOINT [--protocol ...]`."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    if find_spec("rdm_kernels") is None:
        print("error: rdm-fast is not installed: run `pip install -e .` here", file=sys.stderr)
        sys.exit(69)
    from rdm_fast.cli.commands import evaluate

    evaluate()
