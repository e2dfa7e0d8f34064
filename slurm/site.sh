# shellcheck shell=bash disable=SC2034
# Settings of your cluster: the one file of this folder to edit. Commands and jobs source it.
# DWM_SITE=FILE names another copy, so that one checkout serves two clusters.

# Account that pays for the jobs; none where the cluster has no accounts.
DWM_ACCOUNT=
# Partitions for training and evaluation, and for jobs that need no GPU; empty: the cluster's default.
DWM_PARTITION=
DWM_CPU_PARTITION=

# Nodes that train: GPUs and processes (ranks) on each; with GPUs, as many ranks as GPUs.
# 0 GPUs: CPU nodes, where the ranks talk over gloo.
DWM_GPUS_PER_NODE=8
DWM_RANKS_PER_NODE=8
# Cores of a rank, and of a job that needs no GPU. Preprocessing uses about eight well.
DWM_CPUS_PER_RANK=8
DWM_CPUS=8
# The GPU by its name in tools/plan.py, for `pipeline.sh --dry-run`; empty on CPU nodes.
DWM_GPU=h100-80gb

# Time limits. A training job saves and is requeued when its limit comes.
DWM_TIME=24:00:00
DWM_CPU_TIME=12:00:00

# More options of sbatch for every job (--qos=...), and of srun where it starts the ranks.
DWM_SBATCH=()
DWM_SRUN=()

# Large, fast directories that all nodes see: token files, runs, logs of jobs and ranks.
DWM_DATA="$PWD/data"
DWM_RUNS="$PWD/runs"
DWM_LOGS="$PWD/logs"
# No job starts if one of these has less free space.
DWM_MIN_FREE_GB=20

# The environment of every job: modules and variables of your site, then Python. A line that may
# fail needs `|| return`, otherwise the job goes on without it.
dwm_environment() {
    # module load cuda/12.4 || return
    # export NCCL_SOCKET_IFNAME=ib0 HF_HOME=/shared/hf HF_HUB_OFFLINE=1
    . "$DWM_REPOSITORY/.venv/bin/activate"
}
# A command that runs another one in a container, written before every python; without a .venv outside
# of it, remove the line with `activate` above:
# DWM_CONTAINER=(apptainer exec --nv /images/dwm.sif)
DWM_CONTAINER=()
