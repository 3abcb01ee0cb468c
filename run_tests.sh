#!/usr/bin/env bash
# Format, lint, types and tests; stops at the first that fails. --quick leaves out
# the tests marked slow. With other arguments: pytest alone, with them
# (./run_tests.sh tests/tokens/test_masking.py -k tube).
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
prepare_environment tests
cd -- "$root"
unset PYTHONDONTWRITEBYTECODE # without bytecode each of many processes compiles all modules anew

step() {
  printf '\n== %s\n' "$1" >&2
  shift
  "$@" || {
    local code=$?
    printf '== failed, with code %d\n' "$code" >&2
    exit "$code"
  }
}

# Not `python -m pytest`, which would make the folder `datasets` importable.
run_pytest() {
  "$python" -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())' "$@"
}

# One thread in each of the processes that share the cores, and one process more than cores, for the
# tests that wait; a file's tests stay together, and files in the order that tests/conftest.py gives.
run_suite() {
  OMP_NUM_THREADS=1 run_pytest --numprocesses "$(($(getconf _NPROCESSORS_ONLN) + 1))" \
    --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 20 "$@"
}

lane="not gpu"
if [[ $* == --quick ]]; then
  lane="not gpu and not slow"
elif (($#)); then
  step "pytest $*" run_pytest "$@"
  exit
fi
step "ruff format --check" "$python" -m ruff format --check .
step "ruff check" "$python" -m ruff check .
step "pyrefly check" "$python" -m pyrefly check --min-severity error \
  --python-interpreter-path "$python"
step "pytest" run_suite -m "$lane"
# By themselves, for all other tests are kept from seeing a GPU; without one these skip.
step "pytest -m gpu" run_pytest -m gpu tests/*/*gpu.py
printf '\n== everything passed\n' >&2
