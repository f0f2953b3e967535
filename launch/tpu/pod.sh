#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice; run the commands in this order:
#
#   launch/tpu/pod.sh create             the slice (billed from here on)
#   launch/tpu/pod.sh setup              this checkout and .venv on all workers
#   launch/tpu/pod.sh train FLAGS...     launch.train on all workers, detached
#   launch/tpu/pod.sh log                follows the log of worker 0
#   launch/tpu/pod.sh stop               SIGTERM: saves, ends as 'preempted'
#   launch/tpu/pod.sh delete             the slice
#
# After a preemption: create, setup and the same train command. README.md says
# where the workdir may be. Settings are environment variables:
set -euo pipefail

: "${NAME:=lmopt}"
: "${ZONE:=europe-west4-b}"
: "${TYPE:=v5litepod-16}"          # 16 chips on 4 workers
: "${VERSION:=v2-alpha-tpuv5-lite}" # the runtime image of this TYPE
: "${SPOT:=--spot}"                # SPOT= for a slice that is not preempted
: "${MOUNT:=true}"                 # mounts shared storage; run by setup

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Runs one shell command on the workers given as $1: 0 or all.
on() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" \
    --command="$2"
}

create() {
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
    --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+"$SPOT"}
}

setup() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:lmopt.tar.gz" \
    --zone="$ZONE" --worker=all
  rm "$archive"
  # The images have Python 3.10.
  on all "set -e; $MOUNT
    sudo add-apt-repository -y ppa:deadsnakes/ppa > /dev/null
    sudo apt-get install -y -qq make python3.12 python3.12-venv > /dev/null
    mkdir -p lmopt; tar -xzf lmopt.tar.gz -C lmopt; cd lmopt
    make .venv/installed PYTHON=python3.12
    .venv/bin/python -m pip install --quiet 'jax[tpu]' -r requirements.txt"
}

train() {
  local flags
  flags=$(printf '%q ' "$@")
  on all "cd lmopt && { setsid nohup .venv/bin/python -m launch.train $flags \
    > train.log 2>&1 < /dev/null & echo \$! > train.pid; }"
}

log() { on 0 'tail -n 100 -F lmopt/train.log'; }

stop() { on all 'kill -TERM "$(cat lmopt/train.pid)"'; }

delete() { gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"; }

case "${1:-}" in
  create | setup | train | log | stop | delete) "$@" ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
