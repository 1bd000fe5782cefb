# Sourced by scripts that run something in this checkout: goes to its top, and offers `step` and
# `make_environment`. Nothing is activated: they call $environment/bin/... by name. That folder is
# theirs: they rebuild one that they did not finish.

caller=$PWD
CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
[[ $PWD == "$caller" ]] || echo "==> working in $PWD: paths below are relative to it"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# step NAME COMMAND...: say what runs and how long it took; leave at the first failure.
step() {
    local name=$1 start=$SECONDS status=0
    shift
    echo "==> $name"
    "$@" || status=$?
    if ((status != 0)); then
        echo "FAILED: $name (exit code $status, after $((SECONDS - start)) s)" >&2
        exit "$status"
    fi
    echo "==> $name: done in $((SECONDS - start)) s"
}

# find_python: print the interpreter to build from, $PYTHON if it is set.
find_python() {
    local candidate candidates=(python3.11 python3.12 python3 python)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or 3.12 is needed and '${PYTHON:-python3}' is not one: install it, or name" \
        "one that you have: PYTHON=/path/to/python3.11 bash $0" >&2
    echo "FAILED: environment: find Python" >&2
    return 1
}

# make_environment REQUIREMENTS: a folder with the pinned packages and this one, made only once.
# $environment is .venv, or .venv-3.12 if $PYTHON is a Python 3.12, which has pins of its own.
make_environment() {
    local requirements=$1 installed pins python
    environment=.venv
    if [[ -n ${PYTHON:-} ]]; then
        python=$(find_python) || exit
        [[ $("$python" --version) != "Python 3.12."* ]] || environment=.venv-3.12
    fi
    installed=$environment/installed
    pins=$(cat pyproject.toml requirements.txt requirements-test.txt | sha256sum | cut -c1-16)
    if grep -qsxF "$PWD $pins $requirements" "$installed"; then
        echo "==> environment: found $environment with $requirements installed, reusing it"
        return
    fi
    # An installation that was cut off, or made elsewhere and moved here, can't be trusted.
    if [[ -e $installed ]] && ! grep -qF "$PWD " "$installed"; then
        step "environment: remove the unfinished or moved $environment" rm -rf "$environment"
    fi
    if [[ ! -x $environment/bin/python ]]; then
        python=$(find_python) || exit
        mkdir -p "$environment"
        echo unfinished >"$installed"
        step "environment: make $environment with $("$python" --version)" \
            "$python" -m venv "$environment"
    fi
    echo unfinished >"$installed"
    step "environment: install $requirements" \
        "$environment/bin/python" -m pip install -r "$requirements"
    step "environment: install uoe_parallel" \
        "$environment/bin/python" -m pip install --no-deps --no-build-isolation --editable .
    # The requirements of the tests include those of a run.
    printf '%s\n' "$PWD $pins requirements.txt" "$PWD $pins $requirements" >"$installed"
}
