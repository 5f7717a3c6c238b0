#!/usr/bin/env bash
# One run on several nodes. Start this on every node, with that node's NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 OUT=/shared/runs/a \
#     bash docs/scaling/torchrun.sh imagenet_rdm_simsiam --data.root /data/imagenet
#
# NNODES       number of nodes
# NODE_RANK    0 on the node that MASTER_ADDR names, then 1, 2, ...
# MASTER_ADDR  address of node 0 for the others;  MASTER_PORT (29500) is a free port there
# OUT          run folder, on a file system that all nodes share and that can rename folders
# NPROC        ranks on this node: gpu (one per GPU, the default) or a number
#
# It returns the exit code of the run (docs/running.md); torchrun alone returns 1 for every failure.
set -euo pipefail

: "${NNODES:?}" "${NODE_RANK:?}" "${MASTER_ADDR:?}" "${OUT:?}"

code=0
torchrun \
  --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "${NPROC:-gpu}" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
  -m rdm_fast train "$@" --out "$OUT" || code=$?

if [ "$code" -ne 0 ] && [ -r "$OUT/status.json" ]; then
  status=$(sed -n 's/.*"code": *\([0-9]*\).*/\1/p' "$OUT/status.json")
  if [ "${status:-0}" -ne 0 ]; then code=$status; fi
fi
exit "$code"
