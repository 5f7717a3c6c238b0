"""Commands around a run: doctor, export, report, sweep, preview."""
