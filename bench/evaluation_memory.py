"""Memory and time of evaluating cached embeddings: `python -m bench.evaluation_memory`.

Scores random embeddings by one protocol and by kNN, and prints the peak resident size of the
process (getrusage) before they exist, with them, and at the end.
"""

import argparse
import json
import resource
import time

import torch

from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.evaluation.score import score


def peak_mib() -> float:
    """Peak resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def clusters(n: int, d: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [n, d] around one center for each class, and labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(0))
    features = torch.randn(n, d, generator=generator)
    for rows in torch.arange(n).split(4096):
        features[rows] += 0.15 * centers[labels[rows]]
    return features, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=50_000, help="training images")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--width", type=int, default=2048, help="dimensions of an embedding")
    parser.add_argument("--classes", type=int, default=100, help="classes")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="closed-form")
    args = parser.parse_args()
    before = peak_mib()
    train = clusters(args.train, args.width, args.classes, 1)
    test = clusters(args.test, args.width, args.classes, 2)
    loaded, start = peak_mib(), time.perf_counter()
    result = score(train, test, PROTOCOLS[args.protocol], classes=args.classes, seed=0)
    measured = {
        "imports_mib": round(before), "embeddings_mib": round(loaded - before),
        "peak_mib": round(peak_mib()), "seconds": round(time.perf_counter() - start, 1),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "top1": result.top1, "knn_top1": result.knn_top1,
    }  # fmt: skip
    print(json.dumps(vars(args) | measured))


if __name__ == "__main__":
    main()
