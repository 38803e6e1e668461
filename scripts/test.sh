#!/usr/bin/env bash
# Makes the environment and runs the tests: bash scripts/test.sh [pytest arguments]
# In CI the parity extra (torch) comes too, and its absence is a failure; elsewhere those tests skip.
[ "${CI:-}" = true ] && extras=test,parity || extras=test
. "$(dirname "$0")/env.sh" "$extras"
exec "$PY" -m pytest "$@"
