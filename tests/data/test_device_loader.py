"""Batches made on the device, against single images and against what v2.RandomCrop does."""

from collections import Counter

import pytest
import torch
from torchvision.transforms import v2

from lightning_acu.data import DeviceLoader
from lightning_acu.data.device_loader import EpochSampler
from lightning_acu.data.memory import ImageTransform, TensorImages, subset

HEIGHT, WIDTH = 5, 7
STATISTICS = {"mean": [0.2, 0.5, 0.9], "std": [0.1, 0.4, 0.3]}


def dataset(count, dtype=torch.uint8, **transform):
    """Images of random pixels, none of which is 0 as the padding is; the label of an image is its number."""
    images = torch.randint(1, 256, (count, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(7))
    images = images.to(torch.uint8) if dtype == torch.uint8 else images / 100
    return TensorImages(images, torch.arange(count), ImageTransform((HEIGHT, WIDTH), **transform))


def epoch(loader):
    """(images, labels) of all batches."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def placement(image, source, padding):
    """(y, x, mirrored) at which ``image`` was cropped from ``source``: by trying them all."""
    padded = torch.nn.functional.pad(source, (padding,) * 4)
    found = []
    for y in range(2 * padding + 1):
        for x in range(2 * padding + 1):
            crop = padded[:, y : y + HEIGHT, x : x + WIDTH]
            views = {False: crop, True: crop.flip(2)}
            found += [(y, x, mirrored) for mirrored, view in views.items() if torch.equal(image, view)]
    (one,) = found  # exactly one: pixels are random
    return one


@pytest.mark.parametrize("statistics", [STATISTICS, {}], ids=["normalised", "whitened"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_values_are_those_of_single_images_to_the_last_bit(dtype, statistics):
    data = dataset(10, dtype, **statistics)
    loader = DeviceLoader(data, 4)
    images, labels = epoch(loader)
    assert [len(batch[1]) for batch in loader] == [4, 4, 2]
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == list(range(10))
    assert torch.equal(images, torch.stack([data[i][0] for i in range(10)]))


def test_a_subset_in_its_order():
    data = dataset(10, **STATISTICS)
    images, labels = epoch(DeviceLoader(subset(data, torch.tensor([7, 2, 9])), 2))
    assert labels.tolist() == [7, 2, 9]
    assert torch.equal(images, torch.stack([data[i][0] for i in (7, 2, 9)]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("padding", "flip"), [(2, True), (3, False), (0, True), (1, True)])
def test_every_image_is_a_crop_of_the_one_its_label_tells(dtype, padding, flip):
    data = dataset(60, dtype, crop_padding=padding, flip=flip)
    loader = DeviceLoader(data, 8, shuffle=True)
    images, labels = epoch(loader)
    assert labels.sort().values.tolist() == list(range(60))
    if dtype == torch.uint8:
        images = (images * 255).round()
    sources = data.images.float()
    found = [placement(image, sources[label], padding) for image, label in zip(images, labels, strict=True)]
    rows, columns, mirrored = ({values[i] for values in found} for i in range(3))
    assert rows == columns == set(range(2 * padding + 1))
    assert mirrored == ({False, True} if flip else {False})


def test_the_padding_is_normalised_like_black_pixels():
    # As v2.RandomCrop before v2.Normalize does.
    data = dataset(40, crop_padding=4, **STATISTICS)
    images, _ = epoch(DeviceLoader(data, 8))
    black = (torch.zeros(3) - torch.tensor(STATISTICS["mean"])) / torch.tensor(STATISTICS["std"])
    for channel in range(3):
        assert (images[:, channel] == black[channel]).any()
        # No pixel of the images is below 1 of 255.
        assert images[:, channel].amin() == black[channel]


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


def test_the_draw_is_what_is_done():
    data = dataset(30, torch.float32, crop_padding=2, flip=True)
    loader = DeviceLoader(data, 7, shuffle=True, seed=11)
    order, corner, mirror = loader.batch_sampler.draw(0, 5)
    images, labels = epoch(loader)
    assert torch.equal(labels, order)
    found = [placement(image, data.images[label], 2) for image, label in zip(images, labels, strict=True)]
    assert found == [(y, x, bool(m)) for (y, x), m in zip(corner.tolist(), mirror.tolist(), strict=True)]


def test_epochs_differ_and_depend_on_the_seed_alone():
    def epochs(seed, count=3):
        loader = DeviceLoader(dataset(40, crop_padding=2, flip=True), 8, shuffle=True, seed=seed)
        return [epoch(loader) for _ in range(count)]

    torch.manual_seed(1)
    first, again, other = epochs(5), epochs(5), epochs(6)
    for (images, labels), (same_images, same_labels), (_, other_labels) in zip(first, again, other, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
        assert not torch.equal(labels, other_labels)
        assert labels.sort().values.tolist() == list(range(40))
    assert not torch.equal(first[0][1], first[1][1])
    # In fixed order the crops still change.
    fixed = DeviceLoader(dataset(40, crop_padding=2), 8)
    (one, labels), (two, same_labels) = epoch(fixed), epoch(fixed)
    assert torch.equal(labels, same_labels)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("size", "drop_last", "batches"), [(16, False, 4), (17, False, 5), (17, True, 4), (3, False, 1)]
)
def test_length(size, drop_last, batches):
    loader = DeviceLoader(dataset(size), 4, shuffle=True, drop_last=drop_last)
    assert len(loader) == len(list(loader)) == batches
    assert len(epoch(loader)[1]) == (16 if drop_last else size)


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


def test_asking_for_an_iterator_begins_nothing():
    loader, other = (DeviceLoader(dataset(20), 4, shuffle=True, seed=1) for _ in range(2))
    for _ in range(3):
        iter(loader)
    assert torch.equal(epoch(loader)[1], epoch(other)[1])


@pytest.mark.parametrize("taken", range(8))
def test_resume(taken):
    """Whatever was taken before, 3 batches an epoch: what follows is what would have followed."""

    def stream(loader):
        while True:
            yield from loader

    def make(seed):
        return DeviceLoader(dataset(12, crop_padding=2, flip=True), 4, shuffle=True, seed=seed)

    loader = make(1)
    batches = stream(loader)
    for _ in range(taken):
        next(batches)
    state = loader.state_dict()
    resumed = make(2)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for (images, labels), (same_images, same_labels), _ in zip(batches, stream(resumed), range(7), strict=False):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_epoch_that_was_announced_counts():
    loader, other = (DeviceLoader(dataset(20), 4, shuffle=True, seed=1) for _ in range(2))
    epochs = [epoch(loader)[1] for _ in range(5)]
    next(iter(other))
    state = other.state_dict()
    other.load_state_dict(state)
    other.batch_sampler.sampler.set_epoch(3)  # as Lightning does; the rest of epoch 0 was given up
    assert torch.equal(epoch(other)[1], epochs[3])
    assert torch.equal(epoch(other)[1], epochs[4])


def test_resuming_with_other_batches_begins_the_epoch_again():
    loader, other = (DeviceLoader(dataset(20), size, shuffle=True, seed=1) for size in (4, 5))
    batches = iter(loader)
    _, first = next(batches)
    message = r"made with 4 images per step of all processes, and this training has 5: the epoch .* begins again"
    with pytest.warns(UserWarning, match=message):
        other.load_state_dict(loader.state_dict())
    labels = epoch(other)[1]
    assert len(labels) == 20
    assert torch.equal(labels[:4], first)


def test_nothing_is_copied_or_converted_on_the_cpu():
    data = dataset(10, **STATISTICS)
    loader = DeviceLoader(subset(data, torch.arange(5)), 2)
    assert loader.images.dtype == torch.uint8
    assert loader.images.data_ptr() == data.images.data_ptr()
    before = data.images.clone()
    epoch(loader)
    floats = dataset(10, torch.float32, **STATISTICS)
    epoch(DeviceLoader(floats, 2))
    assert torch.equal(data.images, before)
    assert torch.equal(floats.images, dataset(10, torch.float32).images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_everything_is_on_the_device(dtype):
    # A device without data, of which every machine has one: it refuses to work with tensors that are elsewhere.
    data = subset(dataset(20, dtype, crop_padding=2, flip=True, **STATISTICS), torch.arange(3, 13))
    loader = DeviceLoader(data, 4, "meta", shuffle=True)
    assert loader.images.shape == (10, 3, HEIGHT, WIDTH)  # only those of the subset
    for images, labels in loader:
        assert images.device.type == labels.device.type == "meta"
        assert (images.dtype, images.shape[1:]) == (torch.float32, (3, HEIGHT, WIDTH))
    if torch.cuda.is_available():
        on_gpu, on_cpu = (epoch(DeviceLoader(data, 4, device, shuffle=True, seed=1)) for device in ("cuda", "cpu"))
        torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0])
        assert torch.equal(on_gpu[1].cpu(), on_cpu[1])
