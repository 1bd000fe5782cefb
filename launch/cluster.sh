# Sourced by the scripts that start a run on a cluster, with the environment of the run active: goes
# to the top of this checkout, and settles what all launchers need.
#
# INTERFACE        the network interface between nodes; if not set, backends choose
# OMP_NUM_THREADS  threads of a rank on the CPU; 1 if not set, for ranks share the cores

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# needed VARIABLE WHAT: leave, as for any mistake of the user's, if the variable is not set.
needed() {
    if [[ -z ${!1:-} ]]; then
        echo "$(basename "$0"): $1 is not set: $2" >&2
        exit 2
    fi
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n ${INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
