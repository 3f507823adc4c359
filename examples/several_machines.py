"""A plain PyTorch loop in several processes: torch's DistributedDataParallel, started by torchrun or under SLURM.

torchrun --standalone --nproc_per_node 2 examples/several_machines.py    # without a GPU: gloo
"""

import argparse
import os

import torch
import torch.distributed as dist
from digits import accuracy, digits, network
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_acu import acu_layers, convert_to_acu
from lightning_acu.training import PositionTrainer

BATCH = 128  # images of a step, in all processes together


def main() -> None:
    """Train in this process; the first one prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    (images, labels), test = digits()
    images, labels = images.to(device), labels.to(device)
    steps = args.epochs * (len(images) // BATCH)

    torch.manual_seed(0)
    model = convert_to_acu(network()).to(device)  # before DDP, which registers the parameters that it finds
    parallel = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01)
    positions = PositionTrainer(
        optimizer, model, multiplier=5.0, warmup_steps=len(images) // BATCH, total_steps=steps, round_at=0.75
    )
    for epoch in range(args.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).to(device)
        for batch in order.split(BATCH):
            part = batch.tensor_split(processes)[rank]
            loss = F.cross_entropy(parallel(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}")

    offsets = torch.cat([layer.offsets.detach().flatten() for _, layer in acu_layers(model)])
    everywhere = [torch.empty_like(offsets) for _ in range(processes)]
    dist.all_gather(everywhere, offsets)
    if rank == 0:
        same = all(torch.equal(others, offsets) for others in everywhere)
        print(f"{processes} processes; positions the same in all: {same}; rounded: {positions.rounded}")
        print(f"furthest tap: {offsets.abs().max().item():.0f} pixels")
        print(f"accuracy on test images: {accuracy(model, *(part.to(device) for part in test)):.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
