"""The process a run lives in: ranks, precision, signals, atomic files, copies to the host."""
