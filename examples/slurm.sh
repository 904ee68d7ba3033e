#!/usr/bin/env bash
# A run on two nodes, one process a node, on CPUs. From the checkout's root, on a file system that all nodes share:
#
#   sbatch examples/slurm.sh --recipe cnn
#
# What follows the script's name goes to jax_impl.train. OUT names another run directory, PYTHON another interpreter.
# On GPUs: as many tasks on a node as it has GPUs, `--gpus-per-node` with that number, and no --gpus-per-task and no
# --gpu-bind: JAX gives each task the GPU of its SLURM_LOCALID, and must see them all to do so.
#SBATCH --job-name=lockstep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lockstep-%j.log
# --signal: a minute before the time limit every process gets SIGTERM, at which the run saves and leaves with 143.
# --requeue: a job that loses a node, or gives way to another, is queued again by Slurm, and goes on from there.

cd "$SLURM_SUBMIT_DIR" || exit 2
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/slurm-$SLURM_JOB_ID} # a queued-again job keeps its number, and so finds its run

# JAX reads address, number and rank of the processes from what srun sets; nothing is said twice here.
# The processes tell one another why they leave, and leave with one status. So srun does not kill the rest at the first
# bad exit, which would hide that status behind 137; whoever is still there three minutes later is killed.
srun --kill-on-bad-exit=0 --wait=180 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "$python" -m jax_impl.train --distributed --connect-timeout 600 --out "$out" "$@"
status=$?

# 75 and 134: another process was lost, found by us or by JAX's heartbeat; 137: one was killed; 143: the time limit is
# near. All of them again, twenty times at most, unless the run was done before the signal came. Anything else (0: done,
# 2: a mistake) would end the same way again.
case $status in
  75 | 134 | 137 | 143)
    if [ ! -e "$out/summary.json" ] && ((${SLURM_RESTART_COUNT:-0} < 20)); then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"
