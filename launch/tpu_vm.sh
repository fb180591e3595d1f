#!/usr/bin/env bash
# A run on Cloud TPU VMs: asks for a slice through queued resources, starts the same command on all its workers, and asks again when a spot slice was taken away.
#
#   NAME=my-run ZONE=us-east5-a ACCELERATOR=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite launch/tpu_vm.sh llmjax train --config=… --config.layout.fsdp=64 --workdir=/mnt/runs/a
#   … launch/tpu_vm.sh --dry-run llmjax train …          prints the commands
#
# SLICES=2 asks for several slices (the processes of all of them are one run). SPOT=1: cheaper, may be taken away. SETUP: a command run on each worker first, such as the one that
# installs llmjax and mounts the shared folder that --workdir lies in. RETRIES: how often a command that fails on a slice that is still there is started again (3).
# Who is process 0 the workers learn from the metadata server; a run that was cut off goes on from its last checkpoint.
set -euo pipefail

dry=""
if [[ "${1:-}" == "--dry-run" ]]; then dry=1; shift; fi
if [[ $# -eq 0 ]]; then echo "usage: NAME=… ZONE=… ACCELERATOR=… RUNTIME=… $0 [--dry-run] COMMAND" >&2; exit 2; fi
: "${NAME:?is wanted: a name for the slice}" "${ZONE:?is wanted, such as us-east5-a}" "${ACCELERATOR:?is wanted, such as v5litepod-64}" "${RUNTIME:?is wanted, such as v2-alpha-tpuv5-lite}"
slices="${SLICES:-1}" retries="${RETRIES:-3}"
command="LLMJAX_STOPPED_STATUS=75 $(printf '%q ' "$@")"      # a run that SIGTERM ended before its end has not succeeded

run() {                                    # a command, or its text in a dry run
    if [[ -n "$dry" ]]; then echo "+ $(printf '%q ' "$@")"; else "$@"; fi
}

state() {
    if [[ -n "$dry" ]]; then echo ACTIVE; return; fi
    gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' 2>/dev/null || echo ABSENT
}

create() {
    local nodes=(--node-id="$NAME")
    if (( slices > 1 )); then nodes=(--node-count="$slices" --node-prefix="$NAME"); fi
    run gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${nodes[@]}" ${SPOT:+--spot}
}

delete() {
    run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

on_all_workers() {                         # of every slice at once; the status of the first that failed
    local pids=() status=0 i node
    for (( i = 0; i < slices; i++ )); do
        node="$NAME"
        if (( slices > 1 )); then node="$NAME-$i"; fi
        run gcloud compute tpus tpu-vm ssh "$node" --zone="$ZONE" --worker=all --command="$1" &
        pids+=($!)
    done
    for i in "${pids[@]}"; do wait "$i" || status=$?; done
    return "$status"
}

failures=0
[[ -z "$dry" ]] || create
while true; do
    case "$(state)" in
        ACTIVE) ;;
        ABSENT) create; continue ;;
        FAILED | SUSPENDED) delete; continue ;;      # taken away: ask again
        *) sleep 30; continue ;;
    esac
    if [[ -z "${SETUP:-}" ]] || on_all_workers "$SETUP"; then
        status=0
        on_all_workers "$command" || status=$?
    else
        status=1
    fi
    [[ -n "$dry" ]] && break
    sleep 20                               # a slice that is being taken away says so a little later
    if [[ "$(state)" != ACTIVE ]]; then continue; fi
    if (( status == 0 )); then break; fi
    failures=$((failures + 1))
    if (( failures > retries )); then echo "failed $failures times on a slice that is there (status $status); it is left as it is" >&2; exit "$status"; fi
done
delete
