#!/usr/bin/env bash
# A run under SLURM: one process a node, which takes all the GPUs of the node.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh llmjax train --config=… --config.layout.fsdp=32 --workdir=/shared/runs/a
#   bash launch/slurm.sh --dry-run llmjax train …        prints what the job would run
#
# The processes find each other by SLURM's own variables. Five minutes before the time is up, and when the job is preempted, SIGTERM makes the run save and end; the job is then put
# back into the queue and goes on from there. --workdir must lie on a file system that all nodes share.
#SBATCH --job-name=llmjax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

dry=""
if [[ "${1:-}" == "--dry-run" ]]; then dry=1; shift; fi
if [[ $# -eq 0 ]]; then echo "usage: sbatch $0 [--dry-run] COMMAND" >&2; exit 2; fi
call=(srun --kill-on-bad-exit=1 --wait=120 "$@")
if [[ -n "$dry" ]]; then
    echo "+ $(printf '%q ' "${call[@]}")"
    echo "+ scontrol requeue \$SLURM_JOB_ID      # where the status is 75: saved and stopped before its end"
    exit
fi

export LLMJAX_STOPPED_STATUS=75            # the status of a run that SIGTERM ended before its end
# shellcheck disable=SC2329                # called by the trap
stop() {                                   # passes the news on: srun hands SIGTERM to all its tasks
    kill -TERM "$step" 2>/dev/null || true
}
"${call[@]}" &
step=$!
trap stop USR1 TERM
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do      # a signal ends `wait` before the step has ended
    status=0
    wait "$step" || status=$?
done
if (( status == 75 )); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
