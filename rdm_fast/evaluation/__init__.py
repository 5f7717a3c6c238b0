"""How good the embeddings of a frozen backbone are: linear probes and nearest neighbors.

`features` embeds every image exactly once and caches the result, `probe` fits linear
classifiers, `knn` votes among neighbors, `protocols` names the settings of published
evaluations, and `evaluate` puts them together. Importing this package, or `protocols`, does not
import torch: a command line is checked before torch is loaded.
"""
