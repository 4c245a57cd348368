#!/usr/bin/env bash
# Train in several processes on one or more machines:
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT say where this machine stands among several.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -lt 2 ]; then
    sed -n '2,4s/^# *//p' "$0" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$here/train.py" "$config" --launcher pytorch "$@"
