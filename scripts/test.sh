#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lint, types, layers, tests (those without a GPU).
#
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"

stage() {
    printf '== %s\n' "$1"
    shift
    "$@"
}

layers() { # static tools know the package by the link in .pkg; the report matters only when it is bad
    local report
    report=$(PYTHONPATH="$PWD/.pkg" lint-imports 2>&1) || {
        printf '%s\n' "$report" >&2
        return 1
    }
}

stage "format" ruff format --quiet --check .
stage "lint" ruff check --quiet .
stage "types: the package" mypy --no-error-summary
stage "types: tests, scripts, examples" mypy --no-error-summary tests scripts examples
stage "layers" layers
# A file's tests stay together: they share engines. More than four files at a time want much memory.
stage "tests" pytest --quiet --no-header -m "not gpu and not multi_gpu" \
    --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
