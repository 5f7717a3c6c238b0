#!/usr/bin/env bash
# One run on several nodes. Start this on every node, each with its own NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 OUT=/shared/runs/a \
#     bash docs/scaling/torchrun.sh imagenet_rdm_simsiam --data.root /data/imagenet
#
# NNODES       number of nodes
# NODE_RANK    0 on the node that MASTER_ADDR names, then 1, 2, ...
# MASTER_ADDR  address of node 0, as the others reach it;  MASTER_PORT (29500) is free there
# OUT          run folder, on a file system that all nodes see and that can rename
# NPROC        ranks on this node: gpu (one for each, the default) or a number
#
# It ends with the exit code of the run (docs/running.md), which torchrun alone turns into 1.
set -euo pipefail

: "${NNODES:?}" "${NODE_RANK:?}" "${MASTER_ADDR:?}" "${OUT:?}"

code=0
torchrun \
  --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "${NPROC:-gpu}" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
  -m rdm_fast train "$@" --out "$OUT" || code=$?

if [ "$code" -ne 0 ] && [ -r "$OUT/status.json" ]; then
  told=$(sed -n 's/.*"code": *\([0-9]*\).*/\1/p' "$OUT/status.json")
  if [ "${told:-0}" -ne 0 ]; then code=$told; fi
fi
exit "$code"
