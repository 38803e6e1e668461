#!/usr/bin/env bash
# One run on Cloud TPU VMs, from a queued resource to its results. What it acts on is named in config.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/config.sh"

usage() {
  cat <<'USAGE'
usage: tpu/tpu.sh [--dry-run] COMMAND
  create        ask for the slices (queued resource)
  state         print the queued resource's state
  setup         copy or clone the code to every worker and install it
  launch        start the recipe on every worker, in the background
  status        print for every worker: new, running, or the exit code
  logs          follow the log of the first worker; `logs all`: the last lines of every worker
  stop          end the program on every worker; the slices stay
  collect DIR   copy the run directory to DIR, without its checkpoints
  delete        give the slices back; what is on gs:// stays
  watch         create, set up and launch as needed, again after a preemption; delete when the run is done
--dry-run prints every command instead of running it.
USAGE
}

say() { echo "tpu.sh: $*" >&2; }

refuse() {
  say "$*"
  exit 2
}

run() {
  if [ -z "$dry_run" ]; then
    "$@"
    return
  fi
  local word
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    printf '%s ' "$word"
  done
  echo
}

queued() { # queued VERB ARGUMENTS...: on the queued resource's project and zone
  run gcloud compute tpus queued-resources "$@" --project="$PROJECT" --zone="$ZONE"
}

everywhere() { queued ssh "$NAME" --worker=all --node=all --command="$1"; }
first() { queued ssh "$NAME" --worker=0 --node=0 --command="$1"; }

create() {
  local flags=(--node-id="$NAME")
  [ "$SLICES" -eq 1 ] || flags=(--node-count="$SLICES" --node-prefix="$NAME")
  case $PROVISIONING in
    spot | reserved) flags+=("--$PROVISIONING") ;;
    on-demand) ;;
    *) refuse "PROVISIONING: must be spot, reserved or on-demand, not $PROVISIONING" ;;
  esac
  [ -z "$SERVICE_ACCOUNT" ] || flags+=(--service-account="$SERVICE_ACCOUNT")
  queued create "$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${flags[@]}" \
    --scopes=https://www.googleapis.com/auth/cloud-platform
}

state() { queued describe "$NAME" --format='value(state.state)'; }

delete() { queued delete "$NAME" --force --quiet; }

setup() {
  local install="bash tpu/worker.sh install ${PYTHON@Q}" archive=${TMPDIR:-/tmp}/$NAME.tar.gz
  if [ -n "$GIT_URL" ]; then
    everywhere "rm -rf srrl && git clone --quiet ${GIT_URL@Q} srrl && cd srrl && git checkout --quiet ${GIT_REF@Q} && $install"
  else
    run git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD &&
      queued scp "$archive" "$NAME:srrl.tar.gz" --worker=all --node=all &&
      everywhere "rm -rf srrl && mkdir srrl && tar -xzf srrl.tar.gz -C srrl && cd srrl && $install"
  fi
}

launch() {
  [ -n "$RUN_DIR" ] || refuse "RUN_DIR: set it in tpu/config.sh, e.g. gs://BUCKET/runs/8b"
  local slices=
  [ "$SLICES" -eq 1 ] || slices=" mesh.slice=$SLICES"
  everywhere "cd srrl && HF_SECRET=${HF_SECRET@Q} bash tpu/worker.sh launch ${RECIPE@Q} run_dir=${RUN_DIR@Q}$slices $OVERRIDES"
}

status() { everywhere "[ ! -d srrl ] && echo worker: new || bash srrl/tpu/worker.sh status"; }

stop() { everywhere "bash srrl/tpu/worker.sh stop"; }

logs() {
  case ${1:-} in
    all) everywhere "tail -n 20 srrl-run/train.log" ;;
    *) first "tail -n 100 -F srrl-run/train.log" ;;
  esac
}

collect() {
  [ $# -eq 1 ] || refuse "collect: give the directory to copy to"
  run mkdir -p "$1"
  case $RUN_DIR in
    gs://*) run gcloud storage rsync --recursive --exclude='^checkpoints/.*' "$RUN_DIR" "$1" ;;
    *)
      first "tar -czf run.tar.gz --exclude=./checkpoints -C srrl/${RUN_DIR@Q} ."
      queued scp "$NAME:run.tar.gz" "$1/run.tar.gz" --worker=0 --node=0
      run tar -xzf "$1/run.tar.gz" -C "$1"
      ;;
  esac
}

start() { setup && launch; }

# Looks at the machines every POLL seconds and does the next thing. A run resumes by itself from the last
# checkpoint of its directory on gs://, so to recover is to ask for machines again and to launch again.
watch() {
  local now codes restarts=0
  case $RUN_DIR in
    gs://*) ;;
    *) refuse "RUN_DIR: watch needs gs://BUCKET/... (a preempted machine takes its disk with it), not '$RUN_DIR'" ;;
  esac
  if [ -n "$dry_run" ]; then
    say "watch does these as the state asks for them, in a loop"
    state
    create
    status
    start
    delete
    return
  fi
  while :; do
    # An absent resource and an unreachable service look alike; to create what exists fails harmlessly.
    now=$(state 2>/dev/null) || now=ABSENT
    case $now in
      ABSENT) create || say "not created; trying again" ;;
      SUSPENDED | FAILED)
        say "the slices are $now; asking for new ones"
        delete || say "not deleted; trying again"
        ;;
      ACTIVE)
        codes=$(status 2>/dev/null | sed -n 's/^.*worker: *//p' | sort -u | tr '\n' ' ') || codes=
        case " $codes" in
          " ") say "no answer from every worker; trying again" ;;
          *" running "*) ;;
          " 0 ")
            say "the run is done; giving the slices back"
            delete
            return
            ;;
          *" 2 "*)
            say "the recipe was refused: see logs, mend it, then setup, launch and watch again"
            return 2
            ;;
          " new ")
            say "setting up and launching"
            start || say "not launched; trying again"
            ;;
          *)
            restarts=$((restarts + 1))
            if [ "$restarts" -gt "$MAX_RESTARTS" ]; then
              say "the program failed $restarts times: see logs all; the slices are still held"
              return 1
            fi
            say "the program ended with: $codes(restart $restarts of $MAX_RESTARTS)"
            start || say "not launched; trying again"
            ;;
        esac
        ;;
      *) say "$now" ;;
    esac
    sleep "$POLL"
  done
}

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
case ${1:-} in
  create | state | setup | launch | status | logs | stop | collect | delete | watch)
    [ -n "$PROJECT" ] || refuse "PROJECT: set it in tpu/config.sh, or in the environment"
    "$@"
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
