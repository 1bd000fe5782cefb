#!/usr/bin/env bash
# Check everything:
#
#     bash tests/run.sh [--slow] [pytest arguments ...]
#
# --slow runs the tests marked slow too. Other arguments go to pytest, paths in them relative to
# the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"

selection=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [[ $argument == --slow ]]; then
        selection=()
    else
        arguments+=("$argument")
    fi
done

make_environment requirements-test.txt
step "ruff check" "$environment/bin/ruff" check .
step "ruff format" "$environment/bin/ruff" format --check .
step "pyright" "$environment/bin/pyright" --pythonpath "$environment/bin/python"
step "pytest" "$environment/bin/python" -m pytest "${selection[@]}" "${arguments[@]}"
