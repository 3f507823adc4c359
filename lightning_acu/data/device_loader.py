"""Batches made on the training device from images stored there: no work for each image, and no transfers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset

from .memory import ImageTransform, TensorImages

__all__ = ["DeviceLoader", "EpochSampler"]


class EpochSampler:
    """Which images the batches of an epoch hold: a function of the seed and the number of the epoch alone.

    With several processes, batch k of all of them together is what batch k of one process with that many times the
    batch size would be; no image is in two shares. All processes have the same number of batches.

    Args:
        size: images in the data set.
        batch_size: images per batch and process.
        shuffle: another order in each epoch.
        drop_last: leave an incomplete last batch out.
        seed: of order and augmentation; the same in all processes.
        rank: of this process.
        replicas: processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        replicas: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.replicas = replicas
        #: Number of the epoch that begins next.
        self.epoch = 0

    @property
    def sampler(self) -> EpochSampler:
        """Itself: Lightning announces the epoch to ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of each process in an epoch."""
        whole, rest = divmod(self.size, self.batch_size * self.replicas)
        return whole + (rest > 0 and not self.drop_last)

    def draw(self, epoch: int, offsets: int) -> tuple[Tensor, Tensor, Tensor]:
        """The share of this process in an epoch: which images it loads, and how each is cropped and mirrored.

        Args:
            epoch: its number.
            offsets: crops that are possible along each axis.

        Returns:
            (n,) int64 numbers of images, (n, 2) int64 corners (y, x) uniform in 0 ... offsets - 1, and (n,) int64
            zeros and ones with probability 1/2. On the CPU, whatever the device of the images: the same everywhere.
        """
        generator = torch.Generator().manual_seed((self.seed + epoch) % 2**63)
        order = _numbers(self.size)
        if self.shuffle:
            order = torch.randperm(self.size, generator=generator, dtype=torch.int64, device="cpu")
        corner = torch.randint(offsets, (self.size, 2), generator=generator, dtype=torch.int64, device="cpu")
        mirror = torch.randint(2, (self.size,), generator=generator, dtype=torch.int64, device="cpu")
        kept = min(self.size, len(self) * self.batch_size * self.replicas)
        place = _numbers(kept)
        if last := kept % (self.batch_size * self.replicas):
            # Where the last batch has fewer images than there are processes, some would go without: they repeat one.
            place = torch.cat([place, place[-1:].expand(max(0, self.replicas - last))])
        place = place[self.rank :: self.replicas]
        return order[place], corner[place], mirror[place]


class DeviceLoader:
    """Batches of images (N, C, H, W) in float32 and labels (N,) in int64, both on ``device``; a loader for Lightning.

    It crops, mirrors and normalises whole batches as the dataset's
    :class:`~lightning_acu.data.memory.ImageTransform` does single images: offsets and mirroring are independent for
    each image, and every value is the same to the last bit. Images that are uint8 stay so on the device.

    Lightning saves its state in checkpoints; a training resumed within an epoch continues with the next batch.

    Args:
        dataset: images in memory whose transform is an ``ImageTransform``, or a subset of them.
        batch_size: images per batch and process.
        device: where the images are put, once.
        shuffle: another order in each epoch; in fixed order the augmentation still changes.
        drop_last: leave an incomplete last batch out.
        seed: of order and augmentation; the same in all processes.
        rank: of this process.
        replicas: processes, which get disjoint shares of each epoch. None: this is the only one.

    Raises:
        RuntimeError: batches are requested with ``replicas=None`` although there are several processes.
    """

    def __init__(
        self,
        dataset: TensorImages | Subset[Any],
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        replicas: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        source, chosen = _resolve(dataset)
        images, labels = source.images, source.labels
        if self.device.type != "cpu":  # no images there that this loader does not need
            images, labels, chosen = images[chosen], labels[chosen], _numbers(len(chosen))
        self.images, self.labels, self._chosen = (t.to(self.device) for t in (images, labels, chosen))
        self.batch_sampler = EpochSampler(
            len(chosen), batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed, rank=rank, replicas=replicas or 1
        )
        self._alone = replicas is None
        #: The epoch begun last, and the batches that were taken from it.
        self._epoch, self._batches = 0, 0
        self._resuming = False
        self._prepare(cast(ImageTransform, source.transform))

    def _prepare(self, transform: ImageTransform) -> None:
        """Constants of the augmentation, on the device, so that no batch waits for a transfer."""
        height, width = self.images.shape[2:]
        self._padding = transform.crop_padding
        self._augments = bool(transform.crop_padding or transform.flip)
        self._flip = transform.flip
        self._stride = width + 2 * self._padding
        row, column = _numbers(height)[:, None] * self._stride, _numbers(width)
        # Where the pixels of the first crop are in a padded image, and in mirrored order.
        crops = torch.stack([row + column, row + column.flip(0)])
        self._crops = crops.flatten(1).to(self.device)
        self._statistics = None
        if transform.mean is not None and transform.std is not None:
            mean, std = (
                torch.tensor(list(v), dtype=torch.float32, device=self.device)[:, None, None]
                for v in (transform.mean, transform.std)
            )
            self._statistics = mean, std

    def __len__(self) -> int:
        """Batches of each process in an epoch."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Nothing here happens before the first batch is taken: Lightning calls iter() just to see whether it can.
        if self._alone:
            _check_alone()
        sampler, first = self.batch_sampler, 0
        if self._resuming:
            self._resuming = False
            if self._batches >= len(self):
                sampler.epoch = max(sampler.epoch, self._epoch + 1)
            elif sampler.epoch == self._epoch:
                first = self._batches
        self._epoch, sampler.epoch = sampler.epoch, sampler.epoch + 1
        order, corner, mirror = sampler.draw(self._epoch, 2 * self._padding + 1)
        chosen = self._chosen[order.to(self.device)]
        start = (corner[:, 0] * self._stride + corner[:, 1]).to(self.device)
        mirror = mirror.to(self.device) * self._flip
        for batch in range(first, len(self)):
            self._batches = batch + 1
            part = slice(batch * sampler.batch_size, (batch + 1) * sampler.batch_size)
            index = chosen[part]
            images = self.images[index]
            if self._augments:
                images = self._augment(images, start[part], mirror[part])
            yield self._normalise(images), self.labels[index]

    def _augment(self, images: Tensor, start: Tensor, mirror: Tensor) -> Tensor:
        """Images (n, C, H, W), each cropped from its padded self at ``start`` and mirrored, all in one gather."""
        n, channels, height, width = images.shape
        padded = F.pad(images, (self._padding,) * 4).flatten(2)
        pixels = self._crops[mirror] + start[:, None]
        return padded.gather(2, pixels[:, None].expand(n, channels, -1)).reshape(n, channels, height, width)

    def _normalise(self, images: Tensor) -> Tensor:
        batch = images.float().mul_(1 / 255) if images.dtype == torch.uint8 else images
        if self._statistics is None:
            return batch
        mean, std = self._statistics
        return batch.sub_(mean).div_(std)  # of a copy made above

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch: enough to continue from there."""
        sampler = self.batch_sampler
        step = sampler.batch_size * sampler.replicas
        return {"seed": sampler.seed, "epoch": self._epoch, "batches": self._batches, "images_per_step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where ``state`` was saved: with the next batch of its epoch, in its order."""
        sampler = self.batch_sampler
        sampler.seed, sampler.epoch = state["seed"], state["epoch"]
        self._epoch, self._batches, self._resuming = state["epoch"], state["batches"], True
        step = sampler.batch_size * sampler.replicas
        if step != state["images_per_step"]:
            warnings.warn(
                f"the checkpoint was made with {state['images_per_step']} images per step of all processes, and this "
                f"training has {step}: the interrupted epoch starts again from its first images",
                stacklevel=2,
            )
            self._resuming = False


def _check_alone() -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and (processes := torch.distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"this loader was made for one process, but there are {processes}, which would all see the same images; "
            "pass the data module itself to the Trainer, as `datamodule`, or `rank` and `replicas` to DeviceLoader"
        )


def _resolve(dataset: TensorImages | Subset[Any]) -> tuple[TensorImages, Tensor]:
    """The images and which of them, (n,) int64."""
    if isinstance(dataset, Subset):
        return cast(TensorImages, dataset.dataset), torch.tensor(dataset.indices, dtype=torch.int64, device="cpu")
    return dataset, _numbers(len(dataset))


def _numbers(count: int) -> Tensor:
    """0 ... count - 1, int64 on the CPU."""
    return torch.arange(count, dtype=torch.int64, device="cpu")
