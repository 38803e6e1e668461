#!/usr/bin/env bash
# Makes the environment and runs the tests: bash scripts/test.sh [pytest arguments]
# In CI the extras parity (torch), aot (libtpu) and trackers come too, and their absence is a failure;
# elsewhere those tests skip. CI also gets Debian's chromium, in which the pages of srrl view are tested.
# The slow ones (a good half hour on 2 cores): bash scripts/test.sh -m slow
[ "${CI:-}" = true ] && extras=test,parity,aot,trackers || extras=test
if [ "${CI:-}" = true ] && [ -z "$(command -v chromium)" ]; then
  apt-get update -qq && apt-get install -qq -y chromium >/dev/null
fi
. "$(dirname "$0")/env.sh" "$extras"
export TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1  # libtpu compiles here, in several workers at once
exec "$PY" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
