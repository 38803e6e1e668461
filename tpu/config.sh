# Names, zones and versions of a Cloud TPU run; read by tpu.sh. Edit here, or set them in the environment.
# Nothing secret belongs here: a token stays in Secret Manager, and only its name is given (HF_SECRET).
# shellcheck shell=bash disable=SC2034

PROJECT=${PROJECT:-}                      # Google Cloud project
ZONE=${ZONE:-us-east5-b}                  # https://cloud.google.com/tpu/docs/regions-zones
NAME=${NAME:-srrl}                        # of the queued resource and of its slices
ACCELERATOR=${ACCELERATOR:-v6e-16}        # v5litepod-8 (v5e), v6e-16, v6e-64, v5p-128 (v5p counts cores: 64 chips)
SLICES=${SLICES:-1}                       # more than 1: multi-slice; the recipe then gets mesh.slice
PROVISIONING=${PROVISIONING:-spot}        # spot, reserved or on-demand
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}      # of the VMs; empty: the project's default

# The image of the TPU VMs: https://cloud.google.com/tpu/docs/runtimes
case $ACCELERATOR in
  v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
  v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
  v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
  *) RUNTIME=${RUNTIME:-tpu-ubuntu2204-base} ;;
esac
PYTHON=${PYTHON:-3.12}                    # uv fetches it: the images bring Python 3.10

# What runs.
RECIPE=${RECIPE:-configs/qwen3_8b_v6e-16.yaml}
RUN_DIR=${RUN_DIR:-}                      # gs://BUCKET/..., so that a run outlives its machines
OVERRIDES=${OVERRIDES:-}                  # further key=value of the recipe, separated by spaces
GIT_URL=${GIT_URL:-}                      # empty: this checkout's HEAD is copied
GIT_REF=${GIT_REF:-main}
HF_SECRET=${HF_SECRET:-}                  # name of a Secret Manager secret with a Hugging Face token; empty: none

# Of `tpu.sh watch`.
POLL=${POLL:-60}                          # seconds between looks
MAX_RESTARTS=${MAX_RESTARTS:-10}          # of a program that fails on healthy machines; preemptions do not count
