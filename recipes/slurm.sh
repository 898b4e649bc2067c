#!/bin/bash
# A recipe on one or several machines:
#   sbatch recipes/slurm.sh recipes/qwen2.5-7b.toml
#   sbatch --nodes 4 recipes/slurm.sh recipes/qwen2.5-7b.toml folder=/shared/runs/q7b train.epochs=1
# Every machine starts its own sampling servers and samples its part of the prompts; all train
# together (torchrun or accelerate); machine 0 evaluates and reports. `folder` must be on a file
# system that all of them see. Ended by the time limit, the job is queued again and continues.
#SBATCH --job-name=lenvm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=lenvm-%j.log
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: sbatch [--nodes N] recipes/slurm.sh RECIPE.toml [key=value ...]" >&2
  exit 2
fi

# module load cuda; source .venv/bin/activate       # whatever makes `lenvm` and `vllm` run here

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # reads all: `head` would end it
port=$((20000 + SLURM_JOB_ID % 20000))
export HEAD_NODE=$head MEETING_PORT=$port

requeue() {
  echo "time is nearly up: ending the stages and queueing the job again"
  kill -TERM "$steps" 2>/dev/null || true # srun passes it on; lenvm ends servers and stages
  wait "$steps" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue TERM

# One task a machine; where one fails, --kill-on-bad-exit ends the others, which would wait for it.
srun --kill-on-bad-exit=1 bash -c \
  'exec lenvm run "$@" --machine "$SLURM_NODEID/$SLURM_NNODES" --head "$HEAD_NODE" \
     --port "$MEETING_PORT"' lenvm "$@" &
steps=$!
wait "$steps"
