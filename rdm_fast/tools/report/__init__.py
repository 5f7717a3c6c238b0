"""The picture of runs: one HTML page that needs nothing else, and its figures as PNG.

    read        a run folder, as far as it can be read
    measure     spectra, filter response and embeddings of a run
    layout      embeddings in two dimensions
    style       what figures share; curves (over time) and snapshots (of moments) draw them
    page, make  the page around the figures, and all of it

What cannot be read becomes a sentence in the page, never a failure of the report.
"""
