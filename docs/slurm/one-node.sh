#!/bin/bash
# Trains on one node with 8 GPUs: sbatch docs/slurm/one-node.sh
#SBATCH --job-name=dpar
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --output=%x-%j.log

# On SIGUSR1, three minutes before the limit, training saves a checkpoint and exits with 75; the job then waits in the
# queue again, and the same command resumes. exec, so that the signal reaches the launcher.
srun --kill-on-bad-exit=1 bash -c '
  exec dpar-torchrun --nproc-per-node 8 -m dpar train patches run \
    --model dpar-xl --batch 256 --epochs 300 --validation patches-holdout --checkpoint-every 1000
'
[ $? -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
