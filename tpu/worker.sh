#!/usr/bin/env bash
# What tpu.sh runs on each worker, from ~/srrl. The log, process id and exit code are in ~/srrl-run.
#   worker.sh install PYTHON | launch RECIPE [KEY=VALUE]... | status | stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
files=$HOME/srrl-run
mkdir -p "$files"

running() { [ -f "$files/pid" ] && kill -0 "$(cat "$files/pid")" 2>/dev/null; }

case $1 in
  install)
    python3 -m pip install --quiet --user uv
    uv=$HOME/.local/bin/uv
    "$uv" venv --quiet --python "$2" .venv
    "$uv" pip install --quiet --python .venv/bin/python -e '.[tpu]'
    ;;
  launch)
    shift
    if running; then
      echo "worker: still running; stop it first" >&2
      exit 1
    fi
    if [ -n "${HF_SECRET:-}" ]; then # read here, so that no command line ever holds the token
      HF_TOKEN=$(gcloud secrets versions access latest --secret="$HF_SECRET")
      export HF_TOKEN
    fi
    rm -f "$files/exit.code" "$files/pid"
    # A session of its own outlives the ssh connection, and `stop` can end it whole.
    # shellcheck disable=SC2016
    setsid nohup bash -c 'echo $$ > "$0/pid"; .venv/bin/srrl train "$@"; echo $? > "$0/exit.code"' \
      "$files" "$@" >> "$files/train.log" 2>&1 < /dev/null &
    until [ -f "$files/pid" ]; do sleep 0.1; done
    ;;
  status)
    if [ -f "$files/exit.code" ]; then
      echo "worker: $(cat "$files/exit.code")"
    elif running; then
      echo "worker: running"
    else
      echo "worker: new"
    fi
    ;;
  stop)
    if running; then
      kill -TERM -- "-$(cat "$files/pid")"
    fi
    ;;
esac
