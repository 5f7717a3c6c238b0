"""Evaluate a backbone: `python eval_linear.py RUN_DIR_OR_CHECKPOINT [--protocol ...]`."""

from rdm_fast.__main__ import evaluate

if __name__ == "__main__":
    evaluate()
