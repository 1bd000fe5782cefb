#!/usr/bin/env bash
# One of two simulated hosts: starts its part of a run by a launcher's script.
#
#     bash launch/simulated_hosts.sh --ranks 1 --program tests/launch/on_host.sh LAUNCHER ARGUMENT...
set -euo pipefail

launcher=$1
shift
read -ra addresses <<<"$NODE_ADDRESSES"
hostfile=$(mktemp)
trap 'rm "$hostfile"' EXIT
printf "%s slots=$RANKS_PER_NODE\n" "${addresses[@]}" >"$hostfile"
case $launcher in
    torchrun)
        # Nobody knows the names of these hosts: only addresses will do.
        export PET_NNODES=2 PET_NPROC_PER_NODE=$RANKS_PER_NODE
        export PET_RDZV_ENDPOINT=${addresses[0]}:29400 PET_RDZV_CONF=is_host=$((1 - NODE_RANK))
        export PET_LOCAL_ADDR=${addresses[NODE_RANK]}
        ;;
    mpirun)
        ((NODE_RANK == 0)) || exit 0
        export HOSTFILE=$hostfile PRTE_MCA_plm_ssh_agent=$PWD/tests/launch/enter_host.sh
        ;;
    deepspeed)
        export HOSTFILE=$hostfile MASTER_ADDR=${addresses[0]}
        ;;
esac
bash "launch/$launcher.sh" "$@"
