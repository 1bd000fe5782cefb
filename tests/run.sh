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
step "ruff check" .venv/bin/ruff check .
step "ruff format" .venv/bin/ruff format --check .
step "pyright" .venv/bin/pyright
step "pytest" .venv/bin/python -m pytest "${selection[@]}" "${arguments[@]}"
