"""Which images, crops and mirrorings an epoch has: against what v2.RandomCrop does, and among processes."""

from collections import Counter

import pytest
import torch
from torchvision.transforms import v2

from lightning_acu.data.device_loader import EpochSampler

HEIGHT, WIDTH = 5, 7


def chi_square(counts, cells):
    """Pearson's statistic of ``counts`` against equally likely ``cells``, in standard deviations from its mean."""
    total = sum(counts.values())
    assert len(counts) <= cells
    statistic = sum((counts[key] - total / cells) ** 2 for key in counts) / (total / cells)
    statistic += (cells - len(counts)) * total / cells
    return (statistic - (cells - 1)) / (2 * (cells - 1)) ** 0.5


def test_crops_are_distributed_like_those_of_random_crop():
    # Row and column of the crop's corner, as the number that the corner pixel holds; and mirrored or not.
    padding, count = 4, 20_000
    numbers = torch.arange((HEIGHT + 8) * (WIDTH + 8)).reshape(HEIGHT + 8, WIDTH + 8)
    corners = {(y, x) for y in range(9) for x in range(9)}

    sampler = EpochSampler(count, 64, shuffle=True, seed=3)
    _, corner, mirror = sampler.draw(0, 2 * padding + 1)
    ours = Counter(zip(map(tuple, corner.tolist()), mirror.tolist(), strict=True))

    # The padded image is cropped and mirrored by torchvision itself, one at a time.
    crop = v2.Compose([v2.RandomCrop((HEIGHT, WIDTH)), v2.RandomHorizontalFlip()])
    torch.manual_seed(3)
    theirs = Counter()
    for _ in range(count):
        view = crop(numbers[None])[0]
        mirrored = int(view[0, 0] > view[0, -1])
        theirs[divmod(int(view[0].min()), WIDTH + 8), mirrored] += 1

    assert {key[0] for key in ours} == {key[0] for key in theirs} == corners
    for counts in (ours, theirs):
        assert abs(chi_square(counts, 81 * 2)) < 4
    # And each image on its own: the corner of an image says nothing about that of the next one in the batch.
    pairs = Counter(zip(corner[:-1, 0].tolist(), corner[1:, 0].tolist(), strict=True))
    assert abs(chi_square(pairs, 81)) < 4
    pairs = Counter(zip(corner[:-1, 1].tolist(), mirror[1:].tolist(), strict=True))
    assert abs(chi_square(pairs, 18)) < 4


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 11, 12, 13, 20])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shares_of_processes(size, batch_size, replicas, drop_last):
    def loaders(batch_size, replicas):
        for rank in range(replicas):
            sampler = EpochSampler(
                size, batch_size, shuffle=True, drop_last=drop_last, seed=2, rank=rank, replicas=replicas
            )
            share = [*zip(*(part.tolist() for part in sampler.draw(4, 5)), strict=True)]
            assert len(sampler) == -(-len(share) // batch_size)
            yield [share[i : i + batch_size] for i in range(0, len(share), batch_size)]

    shares = [*loaders(batch_size, replicas)]
    (one,) = loaders(batch_size * replicas, 1)
    assert {len(share) for share in shares} == {len(one)}  # equally many batches
    for k, together in enumerate(one):
        parts = [item for share in shares for item in share[k]]
        if len(together) < replicas:
            assert len(parts) == replicas  # those without an image repeat one of them
            assert {item[0] for item in parts} == {item[0] for item in together}
        else:
            assert sorted(map(repr, parts)) == sorted(map(repr, together))  # and the same crops
    seen = {item[0] for share in shares for batch in share for item in batch}
    assert len(seen) == sum(len(together) for together in one)
