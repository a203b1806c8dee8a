#!/bin/bash
# Trains on four nodes with 8 GPUs each: sbatch docs/slurm/four-nodes.sh. The folders are on a file system all nodes see.
#SBATCH --job-name=dpar
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --output=%x-%j.log

export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# As in one-node.sh. XXL also needs --fsdp.
srun --kill-on-bad-exit=1 bash -c '
  exec dpar-torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m dpar train patches run \
    --model dpar-xl --batch 256 --epochs 300 --validation patches-holdout --checkpoint-every 1000
'
[ $? -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
