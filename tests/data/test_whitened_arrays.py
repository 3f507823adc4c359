import numpy as np
import pytest
import torch

from lightning_acu.data import ArrayDataModule, ZCAWhitening


def whitened(path, **arguments):
    data = ArrayDataModule(path, preprocessing="whiten", **arguments)
    data.setup()
    return data


def all_images(dataset):
    return torch.stack([image for image, _ in dataset])


def test_whitening(arrays, save):
    path = save(arrays)
    data = whitened(path, val_size=30)
    train, val = data.train_set.indices, data.val_set.indices
    images = torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2)
    fitted = ZCAWhitening.fit(images, torch.tensor(train), bias=0.1, contrast_scale=55.0)
    expected = fitted(images)
    torch.testing.assert_close(all_images(data.train_set), expected[train], atol=1e-5, rtol=0)
    torch.testing.assert_close(all_images(data.val_set), expected[val], atol=1e-5, rtol=0)
    tests = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(all_images(data.test_set), fitted(tests), atol=1e-5, rtol=0)
    # A file beside the archive, unless another folder is asked for.
    (file,) = path.parent.glob("whitening-*.safetensors")
    whitened(path, val_size=30, whitening_cache=path.parent / "cache")
    assert [file.name] == [other.name for other in (path.parent / "cache").iterdir()]


def test_images_that_cannot_be_whitened(arrays, save):
    with pytest.raises(ValueError, match=r"^`images` \(shape \(90, 3, 5, 7\), 1 of them to fit on\) must be"):
        whitened(save(arrays), val_size=89)
    for part in ("train", "test"):
        arrays[f"x_{part}"] = np.zeros((len(arrays[f"y_{part}"]), 65, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"^images of shape \(3, 65, 64\) are too large to whiten"):
        whitened(save(arrays))
