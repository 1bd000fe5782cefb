#!/usr/bin/env bash
# Run a command, and start it again when it fails:
#
#     bash launch/restart.sh [--ask SIGNAL | --ask-all SIGNAL] TIMES COMMAND...
#
# It starts the command up to TIMES times again, but not after exit code 0 or 2: a mistake in the
# config or the launch stays one. SIGTERM, SIGUSR1 and SIGINT ask it to leave: then it asks the
# command with SIGNAL, waits for as long as saving a checkpoint takes, and ends with 128 + the
# signal that it got itself, whatever the launcher makes of it. Asked again, it sends SIGTERM.
#
# --ask      sends SIGNAL (without it, TERM) to the command alone
# --ask-all  sends it to all processes of the command's group: for launchers that pass on none
#
# Other scripts source this for the function.
set -euo pipefail

keep_running() {
    local signal=TERM everyone="" times asked=0 child="" status
    if [[ $1 == --ask || $1 == --ask-all ]]; then
        [[ $1 == --ask ]] || everyone=-
        signal=$2
        shift 2
    fi
    times=$1
    shift
    trap 'ask 2' INT
    trap 'ask 10' USR1
    trap 'ask 15' TERM
    while true; do
        set -m # in a process group of its own
        "$@" &
        child=$!
        set +m
        ((asked == 0)) || kill -s "$signal" -- "$everyone$child"
        await_child
        if ((status == 0 || status == 2)); then
            return "$status"
        elif ((asked != 0)); then
            return $((128 + asked))
        elif ((times == 0)); then
            return "$status"
        fi
        echo "==> exit code $status: starting again, $times left: $*" >&2
        times=$((times - 1))
    done
}

# ask NUMBER: called by a signal, perhaps before there is a child.
ask() {
    ((asked == 0)) || signal=TERM
    asked=$1
    [[ -z $child ]] || kill -s "$signal" -- "$everyone$child" 2>/dev/null || true
}

# await_child: set its status, and leave nothing of its group running.
await_child() {
    while true; do
        status=0
        wait "$child" || status=$?
        # A signal to this shell ends `wait`, not the child.
        kill -0 "$child" 2>/dev/null || break
    done
    # Launchers that a signal ended leave ranks that still save. Those of one that crashed would
    # stand in the way of the next.
    while kill -0 -- "-$child" 2>/dev/null; do
        ((asked != 0)) || kill -s KILL -- "-$child" 2>/dev/null || true
        sleep 0.2
    done
    child=""
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || keep_running "$@"
