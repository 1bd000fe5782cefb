#!/usr/bin/env bash
# Check everything:
#
#     bash tests/run.sh [--slow] [--device cpu|cuda] [pytest arguments ...]
#
# --slow    runs the tests marked slow too
# --device  where ranks compute: on the CPU with gloo, the default, or each on a GPU of its own with
#           NCCL, without the tests that need more GPUs than there are
#
# Other arguments go to pytest, paths in them relative to the checkout. A whole run that passes is
# certified: python -m uoe_parallel.doctor ends with what this machine has certified.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"

selection=(-m "not slow")
arguments=()
export UOE_TEST_DEVICE=cpu
while (($#)); do
    case $1 in
        --slow) selection=() ;;
        --device)
            UOE_TEST_DEVICE=${2:-}
            [[ $UOE_TEST_DEVICE =~ ^(cpu|cuda)$ ]] || {
                echo "--device is cpu or cuda, not '$UOE_TEST_DEVICE'" >&2
                exit 2
            }
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

make_environment requirements-test.txt
"$environment/bin/python" -m tests.device || exit
step "ruff check" "$environment/bin/ruff" check .
step "ruff format" "$environment/bin/ruff" format --check .
step "pyright" "$environment/bin/pyright" --pythonpath "$environment/bin/python"
step "pytest" "$environment/bin/python" -m pytest "${selection[@]}" "${arguments[@]}"
