#!/usr/bin/env bash
# Makes the environment and trains the embedded tiny model by self-reward: bash scripts/demo.sh [key=value ...]
. "$(dirname "$0")/env.sh" ""
exec "$PY" scripts/demo.py "$@"
