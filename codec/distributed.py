"""The few collective operations that training needs; each is a no-op in a single process."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def setup() -> torch.device:
    """Join the process group that `torchrun` describes, if any, and pick this rank's device.

    Raises:
        ValueError: more processes than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"torchrun: local rank {local_rank}, but there are {torch.cuda.device_count()} GPUs; "
                             "lower --nproc_per_node")  # fmt: skip
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return device


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's values on every rank, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean over ranks, as a new tensor."""
    return all_reduce_sum(tensor.clone()) / world_size()


def all_gather_cat(tensor: Tensor) -> Tensor:
    """Concatenation over ranks along the first axis, in rank order; shapes must be equal."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
