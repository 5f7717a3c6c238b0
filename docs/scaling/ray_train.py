"""One run through Ray Train: `python docs/scaling/ray_train.py`, from the checkout.

Ray starts one worker per node and restarts them if one is lost; each worker starts the ranks of its
node with torchrun. The same command resumes the run.
"""

import os
import shlex
import subprocess

from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer

NODES, GPUS = 2, 8  # GPUs per node
OUT = "/shared/runs/imagenet_rdm_simsiam"  # on a file system that all nodes share
COMMAND = "bash docs/scaling/torchrun.sh imagenet_rdm_simsiam --data.root /data/imagenet"


def node() -> None:
    """Start the ranks of one node and wait for them. Ray sets MASTER_ADDR."""
    settings = {
        "NNODES": str(get_context().get_world_size()),
        "NODE_RANK": str(get_context().get_world_rank()),
        "NPROC": str(GPUS),
        "MASTER_PORT": "29501",  # Ray uses its own
        "OUT": OUT,
    }
    code = subprocess.run(shlex.split(COMMAND), env=os.environ | settings).returncode
    if code != 0:
        raise RuntimeError(f"the run ended with exit code {code}: see {OUT}/status.json")


if __name__ == "__main__":
    TorchTrainer(
        node,
        torch_config=TorchConfig(backend="gloo"),  # for Ray's workers; the ranks choose theirs
        scaling_config=ScalingConfig(
            num_workers=NODES,
            use_gpu=True,
            resources_per_worker={"GPU": GPUS},
            placement_strategy="STRICT_SPREAD",
        ),
        run_config=RunConfig(storage_path=OUT, failure_config=FailureConfig(max_failures=3)),
    ).fit()
