#!/bin/bash
# The suite on the nodes of a Slurm job: `sbatch examples/cluster/slurm.sh` in the repository's root, which lies on a file
# system that all nodes share. The environment is that of docs/cluster.md. A job that was stopped goes on when it is
# submitted again.
#SBATCH --job-name=tfmq-bench
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8      # without this line: on CPUs
#SBATCH --time=2-00:00:00
#SBATCH --no-kill              # go on without a node that fails
set -euo pipefail

. .venv/bin/activate
export TFMQ_BENCH_ENGINE=ray
# Ray's own: only this job can use its cluster.
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# Starts Ray on every node, runs the command on the first when all are there, and stops Ray. Other commands:
#   COMMAND='nox -s bench' sbatch ...                         a part of the small suite, compared with its records
#   COMMAND='bash examples/cluster/paper.sh' sbatch ...       the paper suite, all rows of a table at once
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# shellcheck disable=SC2086
srun --no-kill --kill-on-bad-exit=0 ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  ${COMMAND:-dvc repro --keep-going}
