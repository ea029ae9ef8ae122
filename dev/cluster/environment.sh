# What a run of several ranks wants of its environment; sourced by mpirun.sh, slurm.sbatch and local.sh. Everything already set stays.

# NCCL: which networks it may use. Empty: it looks for itself. With several Ethernet interfaces name the one between the nodes, for its start as well as the
# lifeline's; with InfiniBand or RoCE the ports that belong to the GPUs, so that the storage's port is left alone.
#   export NCCL_SOCKET_IFNAME=eth0
#   export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# RoCE alone: the index of the RoCE v2 address in `show_gids`, and the traffic class that the switches keep free of loss.
#   export NCCL_IB_GID_INDEX=3 NCCL_IB_TC=106

# WARN prints what goes wrong; INFO what was found and chosen, once: interfaces, rings, GPUDirect (see README.md).
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Threads of a rank on the host: it reads data and writes checkpoints. The CPU trainer computes on them: give it its cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-4}}"
