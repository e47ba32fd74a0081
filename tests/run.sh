#!/usr/bin/env bash
# Runs every check from a fresh checkout, in an environment of its own. Arguments go to pytest:
# bash tests/run.sh --slow
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${TRINITYX_TEST_VENV:-.venv-test}
python=${PYTHON:-python3}
stamp="$venv/.installed"
# Commands under test compile the same small programs again and again: once is enough.
export JAX_COMPILATION_CACHE_DIR="$(realpath -m "$venv")/xla" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

without_torch() { # types are checked on the other core meanwhile
    "$venv/bin/mypy" & types=$!
    "$venv/bin/python" -m pytest tests/test_without_torch.py
    wait "$types"
}

if [ ! -f "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    install -e '.[test]'
    without_torch # before torch arrives: the main job must run without it
    install -e '.[test,torch,tpu,loggers]' # libtpu compiles for TPUs that are not there
    touch "$stamp"
else
    without_torch
fi
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
slow=()
for argument; do [ "$argument" != --slow ] || slow=(-m "not slow"); done
"$venv/bin/python" -m pytest --ignore tests/test_without_torch.py -n 2 --dist loadfile --no-loadscope-reorder "$@" ${slow[@]+"${slow[@]}"}
if [ ${#slow[@]} -gt 0 ]; then # alone on the machine: they compare times
    "$venv/bin/python" -m pytest --ignore tests/test_without_torch.py -s "$@" -m slow
fi
