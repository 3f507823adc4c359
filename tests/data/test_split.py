import pytest
import torch

from lightning_acu.data.split import resolve_size, stratified_order


def test_every_slice_of_balanced_labels_is_balanced():
    labels = torch.arange(10).repeat(30)
    order = stratified_order(labels, seed=0)
    assert order.sort().values.tolist() == list(range(300))
    for start in (0, 10, 130):
        assert labels[order[start : start + 20]].bincount(minlength=10).tolist() == [2] * 10


def test_classes_of_unequal_size_keep_their_share():
    labels = torch.tensor([0] * 700 + [1] * 250 + [2] * 49 + [3])
    first = labels[stratified_order(labels, seed=3)[:100]]
    # 70, 25, 4.9 and 0.1 images.
    assert first.bincount(minlength=4).tolist() == [70, 25, 5, 0]


def test_order_is_a_function_of_the_seed_alone():
    labels = torch.arange(100) % 7
    torch.manual_seed(1)
    order = stratified_order(labels, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(order, stratified_order(labels, seed=5))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(order, stratified_order(labels, seed=6))


@pytest.mark.parametrize(
    ("size", "total", "count"), [(250, 4000, 250), (0, 10, 0), (0.1, 55, 6), (0.1, 3, 1), (0.0, 3, 0), (0.9, 10, 9)]
)
def test_size_is_a_count_or_a_share(size, total, count):
    assert resolve_size("val_size", size, total) == count


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (9000, r"^`val_size` \(=9000\) must be smaller than the 4000 training images$"),
        (4000, r"^`val_size` \(=4000\) must be smaller than the 4000 training images$"),
        (-1, r"^`val_size` \(=-1\) must not be negative$"),
        (1.0, r"^`val_size` \(=1.0\) must be a whole number of images, or a share"),
        (-0.5, r"^`val_size` \(=-0.5\) must be a whole number"),
        (0.9999, r"^`val_size` \(=0.9999\) must be smaller than the 4000 training images$"),
    ],
)
def test_impossible_sizes(size, message):
    with pytest.raises(ValueError, match=message):
        resolve_size("val_size", size, 4000)
