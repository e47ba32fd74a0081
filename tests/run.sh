#!/usr/bin/env bash
# Runs every check from a fresh checkout, in an environment of its own. Arguments go to pytest:
# bash tests/run.sh --slow
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${TRINITYX_TEST_VENV:-.venv-test}
python=${PYTHON:-python3}
stamp="$venv/.installed"

install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

if [ ! -f "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    install -e '.[test]'
    # Before torch arrives: the main job must run without it.
    "$venv/bin/python" -m pytest tests/test_without_torch.py
    install -e '.[test,torch]'
    touch "$stamp"
else
    "$venv/bin/python" -m pytest tests/test_without_torch.py
fi
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
"$venv/bin/python" -m pytest --ignore tests/test_without_torch.py -n 2 --dist loadfile "$@"
