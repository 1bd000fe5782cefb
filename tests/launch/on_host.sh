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
    deepspeed)
        export HOSTFILE=$hostfile MASTER_ADDR=${addresses[0]}
        ;;
    mpirun | deepspeed-by-ssh)
        ((NODE_RANK == 0)) || exit 0
        unset NODE_RANK
        export HOSTFILE=$hostfile PATH=$PWD/tests/launch/remote:$PATH
        ;;
esac
bash "launch/${launcher%-by-ssh}.sh" "$@"
