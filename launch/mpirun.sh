#!/usr/bin/env bash
# Train with Open MPI's mpirun, which finds its nodes in a hostfile and starts ranks there by ssh:
#
#     HOSTFILE=hosts INTERFACE=eth0 bash launch/mpirun.sh --config FILE [section.field=value ...]
#
# HOSTFILE     lines such as "node0 slots=8", one rank for each slot; rank 0 is on the first node.
#              The checkout and this environment's Python have the same paths on every node.
# RANKS        how many ranks; as many as there are slots if not set. Without a hostfile, here.
# RESTARTS     how often a run that failed is started again; 3 if not set
# MASTER_PORT  of rank 0, that ranks meet at; 29500 if not set
# INTERFACE    the network interface between nodes, also for mpirun's own messages
#
# The run needs mpi4py: `pip install "uoe-parallel[mpi]"`, which brings mpirun along.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

export MASTER_PORT=${MASTER_PORT:-29500}
# Ranks bound to one core each would have all their threads there.
options=(--bind-to none)
if [[ -n ${HOSTFILE:-} ]]; then
    options+=(--hostfile "$HOSTFILE")
else
    needed RANKS "how many ranks to start here, or HOSTFILE for several nodes"
fi
[[ -z ${RANKS:-} ]] || options+=(-n "$RANKS")
[[ -z ${INTERFACE:-} ]] || options+=(--mca oob_tcp_if_include "$INTERFACE" --mca btl_tcp_if_include "$INTERFACE")
# mpirun gives ranks a terminal, also where it writes to a file that bars would fill.
[[ -t 1 ]] || options+=(-x TTY_COMPATIBLE=0)
for variable in MASTER_PORT OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
    [[ -z ${!variable:-} ]] || options+=(-x "$variable")
done
# At SIGTERM mpirun leaves its ranks a fraction of a second; SIGUSR1 it hands on, and waits.
exec bash launch/restart.sh --ask USR1 "${RESTARTS:-3}" \
    mpirun "${options[@]}" "$(command -v python)" -m uoe_parallel.pretrain "$@"
