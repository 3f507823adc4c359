"""Batches made on the device, against single images."""

import pytest
import torch

from lightning_acu.data import DeviceLoader
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
    message = (
        r"made with 4 images per step of all processes, and this training has 5: the interrupted epoch starts again"
    )
    with pytest.warns(UserWarning, match=message):
        other.load_state_dict(loader.state_dict())
    labels = epoch(other)[1]
    assert len(labels) == 20
    assert torch.equal(labels[:4], first)


def test_made_for_one_process_and_used_by_more(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    loader = DeviceLoader(dataset(8), 4)
    with pytest.raises(
        RuntimeError, match=r"made for one process, but there are 2, .* to the Trainer, as `datamodule`"
    ):
        next(iter(loader))
    for replicas in (1, 2):
        assert len(next(iter(DeviceLoader(dataset(8), 4, replicas=replicas)))) == 2


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
