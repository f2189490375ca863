#!/usr/bin/env bash
# From nothing to three streamed answers: installs Headrace into .venv, fetches the demo model, runs the example.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s.%N)

bash scripts/setup.sh
exec .venv/bin/python examples/async_streaming.py --model demo --since "$started" "$@"
