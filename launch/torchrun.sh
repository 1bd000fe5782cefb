#!/usr/bin/env bash
# Train with torchrun, on one node
#
#     PET_NPROC_PER_NODE=8 bash launch/torchrun.sh --config FILE [section.field=value ...]
#
# or on several, started on each with the same variables:
#
#     PET_NNODES=2 PET_RDZV_ENDPOINT=node0:29400 INTERFACE=eth0 bash launch/torchrun.sh --config FILE
#
# Options of torchrun come from its own variables, PET_<OPTION>, which Kubeflow sets too:
#
# PET_NNODES            1 if not set; 2:4 starts with two nodes or more, up to four: any of them may
#                       come and go, and the run goes on from its checkpoint with those that are there
# PET_RDZV_ENDPOINT     host:port of the node that the others meet at, with more than one node
# PET_NPROC_PER_NODE    ranks of a node; if not set, one for each GPU, or core if there is none
# PET_MAX_RESTARTS      how often failed ranks are started again, all nodes together; 3 if not set
# PET_SHUTDOWN_TIMEOUT  seconds that ranks have for a checkpoint when the job is told to end; 300
# PET_LOCAL_ADDR        this node's address, where others can't find it by its name
# INTERFACE             the network interface between nodes, where the first one is wrong
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

export PET_NNODES=${PET_NNODES:-1} PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-auto}
export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-3} PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}
# Ranks that are started again must not find where their predecessors listened, and the store that
# torchrun shares with them keeps that.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [[ -n ${PET_RDZV_ENDPOINT:-} ]]; then
    export PET_RDZV_BACKEND=c10d PET_RDZV_ID=${PET_RDZV_ID:-uoe}
elif [[ $PET_NNODES == 1 ]]; then
    export PET_STANDALONE=1
else
    needed PET_RDZV_ENDPOINT "host:port of the node that all $PET_NNODES nodes meet at"
fi
# To torchrun a mistake in the config is a failure like any other, and it would start again. RANK is
# not this process's: Kubeflow numbers nodes by it, and only rank 0 tells mistakes.
env -u RANK -u WORLD_SIZE python -m uoe_parallel.pretrain --print-config "$@" >/dev/null
exec bash launch/restart.sh --ask TERM 0 torchrun -m uoe_parallel.pretrain "$@"
