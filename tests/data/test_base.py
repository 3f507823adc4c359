from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

from lightning_acu.data import ArrayDataModule, ImageDataModule, ImageFolderDataModule
from lightning_acu.data.memory import TensorImages


class Numbered(ImageDataModule):
    """1 x 1 images, each holding its own number."""

    num_classes, in_chans, image_size = 2, 1, (1, 1)

    def __init__(self, images=10, **loader):
        super().__init__(**loader)
        self.images = images

    def setup(self, stage=None):
        numbers = torch.arange(self.images, dtype=torch.float32).reshape(-1, 1, 1, 1)
        dataset = TensorImages(numbers, torch.zeros(self.images, dtype=torch.int64), lambda image: image)
        self.train_set = self.val_set = self.test_set = dataset


class Tiny(LightningModule):
    """Counts the batches that it sees."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.LazyLinear(3)
        self.seen = {"train": 0, "val": 0, "test": 0}

    def forward(self, images):
        return self.layer(images.flatten(1))

    def training_step(self, batch):
        self.seen["train"] += 1
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self.seen["val"] += 1

    def test_step(self, batch):
        self.seen["test"] += 1

    def predict_step(self, batch):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer():
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def numbers(loader):
    return torch.cat([images.flatten() for images, _ in loader]).int().tolist()


def module(**loader):
    data = Numbered(**loader)
    data.setup()
    return data


def test_evaluation_is_in_order_and_complete():
    data = module(batch_size=4)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert numbers(loader) == list(range(10))
        assert len(loader) == 3


def test_training_is_shuffled_by_the_global_seed_and_not_by_ours():
    seed_everything(1)
    first = numbers(module(batch_size=5, seed=0).train_dataloader())
    seed_everything(1)
    assert numbers(module(batch_size=5, seed=7).train_dataloader()) == first
    seed_everything(2)
    assert numbers(module(batch_size=5, seed=0).train_dataloader()) != first
    assert sorted(first) == list(range(10)) != first


def test_a_training_that_goes_on_sees_other_orders(monkeypatch):
    """Seeded as the first time, it would begin with the first epoch's again."""
    seed_everything(1)
    data = module(batch_size=5)
    first = numbers(data.train_dataloader())

    def resumed(step, seed=1):
        seed_everything(seed)
        data.trainer = SimpleNamespace(global_step=step, world_size=1, num_devices=1)
        return numbers(data.train_dataloader())

    assert resumed(0) == first
    assert resumed(7) == resumed(7)
    assert sorted(resumed(7)) == sorted(first)
    assert len({tuple(resumed(step, seed)) for step in (0, 7, 8) for seed in (1, 2)}) == 6
    assert numbers(data.val_dataloader()) == list(range(10))


@pytest.mark.parametrize(("batch_size", "seen"), [(4, 8), (5, 10), (9, 9), (10, 10), (11, 10), (64, 10)])
def test_incomplete_training_batch_is_dropped_unless_it_is_the_only_one(batch_size, seen):
    assert len(numbers(module(batch_size=batch_size).train_dataloader())) == seen


@pytest.mark.parametrize(("images", "dropped"), [(20, False), (21, True)])
def test_incomplete_batch_among_two_devices(images, dropped):
    # Each of two processes gets half of the images.
    data = module(images=images, batch_size=10, num_workers=0)
    data.trainer = SimpleNamespace(world_size=2, num_devices=2, global_step=0)
    assert data.train_dataloader().drop_last is dropped


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with fewer cores
def test_workers(monkeypatch):
    for cores, workers in ((1, 1), (5, 5), (100, 8)):
        monkeypatch.setattr("lightning_acu.data.base.suggested_max_num_workers", lambda devices, cores=cores: cores)
        assert module().train_dataloader().num_workers == workers
    assert module(num_workers=0).train_dataloader().num_workers == 0
    assert ImageFolderDataModule.needs_workers
    assert not ArrayDataModule.needs_workers


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_persist():
    data = module(num_workers=2, batch_size=5)
    loader = data.train_dataloader()
    assert loader.persistent_workers
    assert sorted(numbers(loader)) == sorted(numbers(loader)) == list(range(10))
    assert not module(num_workers=0).train_dataloader().persistent_workers


@pytest.mark.parametrize(
    ("asked", "cuda", "pinned"),
    [(None, True, True), (True, True, True), (False, True, False), (None, False, False), (True, False, False)],
)
def test_memory_is_pinned_only_with_cuda(monkeypatch, asked, cuda, pinned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert module(pin_memory=asked, num_workers=0).train_dataloader().pin_memory is pinned


def test_pinning_without_cuda_does_not_warn():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    # A warning would be an error here.
    assert numbers(module(pin_memory=True, num_workers=0).val_dataloader()) == list(range(10))


@pytest.mark.parametrize("loader", ["train", "val", "test", "predict"])
def test_loader_before_setup(loader):
    with pytest.raises(RuntimeError, match=r"^Numbered has no `\w+_set` yet: call setup\(\)"):
        getattr(Numbered(), f"{loader}_dataloader")()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^`batch_size` \(=0\) must be at least 1$"):
        Numbered(batch_size=0)
    with pytest.raises(ValueError, match=r"^`num_workers` \(=-1\) must not be negative"):
        Numbered(num_workers=-1)
    with pytest.raises(TypeError, match="abstract"):
        ImageDataModule()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own use of torch
def test_trainer_on_a_machine_with_many_cores(monkeypatch, arrays, save):
    # There Lightning advises more workers; of our own code a warning would be an error here.
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.data_connector.suggested_max_num_workers", lambda _: 16)
    data, model = ArrayDataModule(save(arrays), val_size=30, batch_size=10), Tiny()
    model(torch.zeros(1, 3, 5, 7))
    fitted = trainer()
    fitted.fit(model, datamodule=data)
    fitted.test(model, datamodule=data, verbose=False)
    predictions = fitted.predict(model, datamodule=data)
    sanity_checks = 2
    assert model.seen == {"train": 6, "val": 3 + sanity_checks, "test": 2}
    assert torch.cat(predictions).shape == (12, 3)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_trainer_without_validation_images(arrays, save):
    data, model = ArrayDataModule(save(arrays), val_size=0, batch_size=10), Tiny()
    model(torch.zeros(1, 3, 5, 7))
    with pytest.warns(UserWarning, match="Total length of `DataLoader` across ranks is zero"):
        trainer().fit(model, datamodule=data)
    assert model.seen == {"train": 9, "val": 0, "test": 0}
