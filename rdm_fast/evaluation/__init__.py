"""Linear probes and nearest neighbors on the embeddings of a frozen backbone.

`features` embeds every image once and caches the result, `probe` and `logistic` fit linear
classifiers, `knn` votes among neighbors, `protocols` holds the settings of published evaluations,
`score` measures, and `run` is the whole command. This package and `protocols` do not import torch,
so a command line is checked before torch loads.
"""
