"""`rdm report`: a self-contained HTML page on one or more runs, and its figures as PNG.

    read          a run folder, as far as it can be read
    measure       spectra, filter response and embeddings of a run
    layout        embeddings in two dimensions
    style         colors, sizes and file format of all figures
    curves        figures over time
    snapshots     figures of one moment
    page, make    the page around the figures, and the whole command

Whatever cannot be read becomes a sentence in the page; the report itself does not fail.
"""
