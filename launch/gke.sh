#!/usr/bin/env bash
# A run on GKE: fills in launch/gke.yaml and applies it, or, with --xpk, hands the command to XPK, which writes a JobSet of its own.
#
#   NAME=my-run IMAGE=MY-IMAGE CLAIM=runs ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=8x8 PODS=16 CHIPS=4 \
#       launch/gke.sh llmjax train --config=… --config.layout.fsdp=64 --workdir=/runs/a
#   … launch/gke.sh --dry-run llmjax train …             prints the JobSet and the command that would apply it
#   NAME=my-run IMAGE=… CLUSTER=my-cluster TPU_TYPE=v5litepod-64 launch/gke.sh --xpk llmjax train …
#
# SLICES (1), RESTARTS (10), QUEUE (llmjax, a LocalQueue of Kueue). The JobSet and Kueue controllers must be installed in the cluster.
set -euo pipefail

dry="" xpk=""
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --dry-run) dry=1 ;;
        --xpk) xpk=1 ;;
        *) echo "$1: --dry-run or --xpk is wanted" >&2; exit 2 ;;
    esac
    shift
done
if [[ $# -eq 0 ]]; then echo "usage: NAME=… IMAGE=… $0 [--dry-run] [--xpk] COMMAND" >&2; exit 2; fi
: "${NAME:?is wanted: a name for the run}" "${IMAGE:?is wanted: an image with llmjax in it}"
export NAME IMAGE SLICES="${SLICES:-1}" RESTARTS="${RESTARTS:-10}" QUEUE="${QUEUE:-llmjax}"

if [[ -n "$xpk" ]]; then
    : "${CLUSTER:?is wanted: the XPK cluster}" "${TPU_TYPE:?is wanted, such as v5litepod-64}"
    call=(xpk workload create --workload="$NAME" --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" --max-restarts="$RESTARTS" --command="$(printf '%q ' "$@")")
    if [[ -n "$dry" ]]; then echo "+ $(printf '%q ' "${call[@]}")"; else "${call[@]}"; fi
    exit
fi

: "${ACCELERATOR:?is wanted, such as tpu-v5-lite-podslice}" "${TOPOLOGY:?is wanted, such as 8x8}" "${PODS:?is wanted: hosts in a slice}" "${CHIPS:?is wanted: chips on a host}" "${CLAIM:?is wanted: the claim of a shared volume}"
quoted="$(printf '%q ' "$@")"
quoted="${quoted//\\/\\\\}"                # the command stands in a JSON string
export ACCELERATOR TOPOLOGY PODS CHIPS CLAIM PROCESSES=$((SLICES * PODS)) COMMAND="${quoted//\"/\\\"}"
text="$(<"$(dirname "$0")/gke.yaml")"
for name in NAME IMAGE SLICES RESTARTS QUEUE ACCELERATOR TOPOLOGY PODS CHIPS CLAIM PROCESSES COMMAND; do
    text="${text//"\${$name}"/"${!name}"}"
done
if [[ -n "$dry" ]]; then
    printf '%s\n' "$text" "# + kubectl apply -f -"
else
    kubectl apply -f - <<<"$text"
fi
