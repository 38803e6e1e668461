#!/usr/bin/env bash
# Makes the environment and runs the tests: bash scripts/test.sh [pytest arguments]
. "$(dirname "$0")/env.sh" test
exec "$PY" -m pytest "$@"
