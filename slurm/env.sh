#!/bin/bash
# The environment of a job on GPU nodes with InfiniBand. Whatever is set already is left as it is, so that a cluster's
# own settings, or yours before `sbatch`, win. Sourced by job.sh on the first node; srun hands it to all tasks.

# ---- directories of the node -----------------------------------------------------------------------------------------
# A disk of the node itself: many ranks on many nodes compiling into one home directory over NFS are slow, and their
# locks get stuck. It stays there from job to job, so that things are built once.
export FDSCALE_LOCAL=${FDSCALE_LOCAL:-/tmp/fdscale-$(id -un)}
version=$(echo "$FDSCALE_PYTHON" | cksum | cut -d' ' -f1) # each environment has its own torch
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$FDSCALE_LOCAL/torch_extensions-$version} # DeepSpeed's ops
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$FDSCALE_LOCAL/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$FDSCALE_LOCAL/inductor}

# ---- CPUs ------------------------------------------------------------------------------------------------------------
# Since Slurm 22.05 srun no longer takes --cpus-per-task from the job; each rank would share one core with its workers.
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}
# Without it every rank starts as many threads as the node has cores. Data workers are processes and need none.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# ---- NCCL ------------------------------------------------------------------------------------------------------------
# NCCL finds InfiniBand and NVLink by itself. Set only what it gets wrong on your cluster, and look at what it chose
# with NCCL_DEBUG=INFO (lines "NET/IB" name the adapters; "NET/Socket" means that it runs over TCP, 10 times slower).
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The interface for meeting each other (not for the data), where it picks a wrong one, such as a container bridge.
# gloo, over which ranks agree on flags, needs the same.
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# The adapters for the data, where some are for storage or Ethernet only (see `ibstat`).
#export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# How long an adapter waits for an answer, 4.096 us x 2^N, and how often it tries again. The default of 20 (4 s) gives
# up on a large fabric in trouble that would have passed; 22 is 17 s.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# RoCE instead of InfiniBand: the entry of the adapter's table that speaks RoCE v2 (see `show_gids`).
#export NCCL_IB_GID_INDEX=3

# ---- when a collective hangs -----------------------------------------------------------------------------------------
# PyTorch's flight recorder, which fdscale turns on: each rank keeps its last collectives, and writes them down when one
# times out; the watchdog writes them too. With `torchfrtrace` they name the rank that is missing.
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$job/collectives-} # and the rank

# ---- Python ----------------------------------------------------------------------------------------------------------
export PYTHONUNBUFFERED=1     # the last words of a rank that is killed
export PYTHONFAULTHANDLER=1   # and its stack, where it dies of a signal
