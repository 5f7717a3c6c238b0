"""The process of a run: ranks, precision, signals, printing, atomic files, copies to the host."""
