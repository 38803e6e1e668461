#!/usr/bin/env bash
# Makes the environment and runs the tests: bash scripts/test.sh [pytest arguments]
# In CI the extras parity (torch) and aot (libtpu) come too, and their absence is a failure; elsewhere
# those tests skip.
[ "${CI:-}" = true ] && extras=test,parity,aot || extras=test
. "$(dirname "$0")/env.sh" "$extras"
exec "$PY" -m pytest "$@"
