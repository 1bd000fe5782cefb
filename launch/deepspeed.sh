#!/usr/bin/env bash
# Train with the deepspeed launcher, from one node that reaches the others by pdsh and ssh:
#
#     HOSTFILE=hosts INTERFACE=eth0 bash launch/deepspeed.sh --config FILE [section.field=value ...]
#
# or, without ssh, started on every node with its own number:
#
#     HOSTFILE=hosts MASTER_ADDR=node0 NODE_RANK=1 bash launch/deepspeed.sh --config FILE
#
# HOSTFILE     lines such as "node0 slots=8", one rank for each slot; rank 0 is on the first node
# NODE_RANK    the line of this node, from 0
# MASTER_ADDR  the first node's address, needed with NODE_RANK; asked for by ssh if not set
# MASTER_PORT  of rank 0, that ranks meet at; 29500 if not set
# RANKS        how many ranks of each node; without a hostfile, of this one
# RESTARTS     how often a run that failed is started again; 3 if not set
# INTERFACE    the network interface between nodes, where the first one is wrong
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
source launch/restart.sh

options=(--master_port "${MASTER_PORT:-29500}") ask=(--ask-all USR1)
if [[ -z ${HOSTFILE:-} ]]; then
    needed RANKS "how many ranks to start here, or HOSTFILE for several nodes"
    # It would take one that the machine has for all users, /job/hostfile.
    options+=(--hostfile /dev/null/none)
else
    options+=(--hostfile "$HOSTFILE")
    if [[ -n ${NODE_RANK:-} ]]; then
        needed MASTER_ADDR "the address of the first node in $HOSTFILE"
        options+=(--no_ssh --node_rank "$NODE_RANK")
    else
        # The launcher hands on NCCL_* and PYTHON* alone, and what this file tells.
        DS_ENV_FILE=$(mktemp)
        export DS_ENV_FILE
        trap 'rm -f "$DS_ENV_FILE"' EXIT
        env | grep -E '^(GLOO_SOCKET_IFNAME|OMP_NUM_THREADS)=' >"$DS_ENV_FILE"
        # It ends what runs on other nodes by pdsh again, if it is told by SIGTERM.
        ask=(--ask TERM)
    fi
fi
[[ -z ${MASTER_ADDR:-} ]] || options+=(--master_addr "$MASTER_ADDR")
[[ -z ${RANKS:-} ]] || options+=(--num_gpus "$RANKS")
# At SIGTERM the launcher of a node kills after 30 seconds, and at SIGUSR1 it dies; ranks that get
# SIGUSR1 themselves save for as long as they need.
keep_running "${ask[@]}" "${RESTARTS:-3}" \
    deepspeed "${options[@]}" --module uoe_parallel.pretrain "$@" || exit
