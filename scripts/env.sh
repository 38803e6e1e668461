# Sourced by the other scripts: goes to the repository root and makes .venv once; $PY is its Python.
# Usage: . "$(dirname "$0")/env.sh" EXTRAS    (e.g. "test"; "" for none)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=.venv/bin/python
stamp=.venv/installed${1:+-$1}
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  base=${PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || {
    echo "needs Python 3.11 to 3.14, but $base is $("$base" --version 2>&1); set PYTHON=/path/to/python" >&2
    exit 2
  }
  echo "making .venv (about two minutes)"
  [ -x "$PY" ] || "$base" -m venv .venv
  "$PY" -m pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}"
  touch "$stamp"
fi
