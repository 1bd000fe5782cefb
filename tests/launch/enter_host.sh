#!/usr/bin/env bash
# Runs a command on the simulated host that has an address, as ssh would:
#
#     enter_host.sh ADDRESS COMMAND...
set -euo pipefail

address=$1
shift
for host in /run/netns/*; do
    host=$(basename "$host")
    if ip -n "$host" -o address show 2>/dev/null | grep -qF " $address/"; then
        exec ip netns exec "$host" unshare --uts bash -c "hostname $host && $*"
    fi
done
echo "no simulated host has the address $address" >&2
exit 255
