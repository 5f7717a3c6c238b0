"""Spectral filters: the response g(s), Gram matrices, engines, and the losses."""
