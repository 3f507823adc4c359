"""Images per second that are made into batches: one at a time by a DataLoader, and whole batches on the device.

    OMP_NUM_THREADS=1 python benchmarks/data_throughput.py           # CPU, one thread
    python benchmarks/data_throughput.py --device cuda --num-workers 8

Images of random pixels in the shape of CIFAR, padded by 4, cropped and mirrored: uint8 that is normalised then
("normalize"), and float32 that is done ("whiten"). The two loaders take turns, an epoch each, so that both meet the
same machine. The DataLoader's batches are moved to the device, as Lightning does. Rows go to a CSV file.
"""

import argparse
import csv
import statistics
import time
import warnings
from pathlib import Path

import torch
from timing import device_name
from torch.utils.data import DataLoader

from lightning_acu.data import DeviceLoader
from lightning_acu.data.memory import ImageTransform, TensorImages

PADDING = 4


def dataset(preprocessing: str, count: int) -> TensorImages:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    statistics_ = {"mean": [0.5] * 3, "std": [0.25] * 3}
    if preprocessing == "whiten":
        images, statistics_ = images.float(), {}
    transform = ImageTransform((32, 32), crop_padding=PADDING, flip=True, **statistics_)
    return TensorImages(images, torch.arange(count) % 10, transform)


def speed(loader, device: str) -> float:
    """Images per second of one epoch, its beginning included."""
    count = 0
    began = time.perf_counter()
    for images, labels in loader:
        images.to(device, non_blocking=True)
        labels.to(device, non_blocking=True)
        count += len(labels)
    if device == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=0, help="of the DataLoader")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/data_throughput.csv"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than there are cores

    rows = []
    for preprocessing in ("normalize", "whiten"):
        data = dataset(preprocessing, args.images)
        workers = {
            "num_workers": args.num_workers,
            "persistent_workers": args.num_workers > 0,
            "pin_memory": args.device == "cuda",
        }
        loaders = {
            "DataLoader": DataLoader(data, args.batch_size, shuffle=True, drop_last=True, **workers),
            "on_device": DeviceLoader(data, args.batch_size, args.device, shuffle=True, drop_last=True),
        }
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for turn in range(args.rounds + 1):
            for name, loader in loaders.items():
                measured = speed(loader, args.device)
                if turn:  # the first epoch starts workers and fills caches
                    speeds[name].append(measured)
        ratios = [new / old for old, new in zip(speeds["DataLoader"], speeds["on_device"], strict=True)]
        row = {
            "device": device_name(args.device),
            "threads": torch.get_num_threads(),
            "num_workers": args.num_workers,
            "batch_size": args.batch_size,
            "preprocessing": preprocessing,
            "torch": torch.__version__,
            **{f"{name} images/s": round(statistics.median(values)) for name, values in speeds.items()},
            "ratio": round(statistics.median(ratios), 1),
            "ratio_lowest": round(min(ratios), 1),
            "ratio_highest": round(max(ratios), 1),
        }
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
