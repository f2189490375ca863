#!/bin/sh -eu
# The tests that need a GPU. From a checkout: it need not be installed.
cd "$(dirname "$0")/.."
PYTHONPATH=$PWD/.pkg${PYTHONPATH:+:$PYTHONPATH} exec python3 -m pytest tests/gpu tests/kernels -q "$@"
