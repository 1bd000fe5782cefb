#!/usr/bin/env bash
# Run a program on two simulated hosts: network namespaces of this machine, joined by a link whose
# rate is limited. For looking at what a slow network does to a layout, where there is no network.
#
#     bash launch/simulated_hosts.sh [--rate 200mbit] [--ranks 2] -m uoe_parallel.pretrain --config FILE
#
# --rate     of the link, in one direction, in tc's words: 200mbit, 1gbit, ... ; "none" for no limit
# --ranks    of each host; host 0 has the first ones
# --program  what runs on both hosts if not torchrun, with variables that tell where it is:
#            NODE_RANK (0, 1), NODE_ADDRESSES (of both), RANKS_PER_NODE and INTERFACE
#
# What follows is handed to the program on both hosts. Needs root and iproute2 (ip, tc). The
# namespaces go when the program ends, however it ends.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

rate=200mbit ranks=2 program=""
while [[ ${1:-} == --rate || ${1:-} == --ranks || ${1:-} == --program ]]; do
    declare "${1#--}=$2"
    shift 2
done
if ((EUID != 0)) || ! command -v ip >/dev/null || ! command -v tc >/dev/null; then
    echo "simulated hosts need root and the programs ip and tc (Debian: iproute2)" >&2
    exit 2
fi
torchrun=${TORCHRUN:-.venv/bin/torchrun}
# Names and addresses of this process's own, so that several can run side by side.
hosts=("uoe$$a" "uoe$$b") link=eth$$
subnet=10.$(($$ / 256 % 256)).$(($$ % 256))

cleanup() {
    for host in "${hosts[@]}"; do
        # Some end by themselves meanwhile.
        ip netns pids "$host" 2>/dev/null | xargs --no-run-if-empty kill -9 2>/dev/null || true
        ip netns delete "$host" 2>/dev/null || true
    done
}
trap cleanup EXIT
trap 'exit 1' INT TERM

for host in "${hosts[@]}"; do
    ip netns add "$host"
    ip -n "$host" link set lo up
done
ip link add "$link" netns "${hosts[0]}" type veth peer name "$link" netns "${hosts[1]}"
for number in 0 1; do
    host=${hosts[$number]}
    ip -n "$host" address add "$subnet.$((number + 1))/24" dev "$link"
    ip -n "$host" link set "$link" up
    if [[ $rate != none ]]; then
        # A bucket of a few milliseconds, and a queue that drops nothing a run would send at once.
        ip netns exec "$host" tc qdisc add dev "$link" root tbf rate "$rate" burst 256kb latency 400ms
    fi
done

export NODE_ADDRESSES="$subnet.1 $subnet.2" RANKS_PER_NODE=$ranks INTERFACE=$link
export GLOO_SOCKET_IFNAME=$link NCCL_SOCKET_IFNAME=$link OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
pids=()
for number in 1 0; do
    command=("$program")
    if [[ -z $program ]]; then
        command=("$torchrun" --nnodes 2 --node-rank "$number" --nproc-per-node "$ranks"
            --master-addr "$subnet.1" --master-port 29500)
    fi
    # Programs tell hosts apart by their names.
    NODE_RANK=$number ip netns exec "${hosts[$number]}" unshare --uts \
        bash -c 'hostname "$0" && exec "$@"' "${hosts[$number]}" "${command[@]}" "$@" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
done
exit "$status"
