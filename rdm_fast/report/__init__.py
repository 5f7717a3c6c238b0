"""The picture of runs: one HTML page that needs nothing else, and its figures as PNG.

read      a run folder, as far as it can be read; what cannot becomes a sentence
measure   spectra, filter response and embeddings, from a checkpoint
layout    embeddings in two dimensions
figures   all of it drawn
page      the page around the figures
"""
