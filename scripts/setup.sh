#!/usr/bin/env bash
# Makes .venv in the repository's root and installs Headrace into it, editable. Does nothing when that is done
# and pyproject.toml has not changed since.
#
#   bash scripts/setup.sh [EXTRAS]      for example: dev, or dev,plot
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}

say() { printf '== %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

stamp=".venv/headrace${extras:+-$extras}.stamp"
state=$({ printf '%s\n' "$PWD" && cat pyproject.toml; } | sha256sum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    exit 0
fi

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if ! [ -x .venv/bin/python ]; then
    for python in python3 python3.13 python3.12 python3.11 ''; do
        if [ -n "$python" ] && new_enough "$python"; then break; fi
    done
    [ -n "$python" ] || fail "Python 3.11 or newer is needed, found $(python3 --version 2>&1 || true)"
    "$python" -c 'import venv, ensurepip' 2>/dev/null \
        || fail "$python has no venv module; on Debian or Ubuntu: sudo apt install python3-venv"
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
new_enough .venv/bin/python || fail ".venv holds $(.venv/bin/python --version), 3.11 is needed: remove .venv"
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null

say "installing headrace${extras:+[$extras]} and what it needs (minutes, the first time)"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" >"$log" 2>&1
then
    cat "$log" >&2
    fail "pip install failed"
fi
printf '%s\n' "$state" >"$stamp"
