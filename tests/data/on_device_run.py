"""A training in one process or two, for test_on_device.py: keeps what images and labels each process saw.

python on_device_run.py images.npz out 2     # writes out_0.json and out_1.json
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_acu.data import ArrayDataModule


class Recorder(LightningModule):
    """Keeps [sum of the image, label] of all images of each batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(105, 3)
        self.seen = {"train": [], "val": [], "test": []}

    def record(self, part, batch):
        images, labels = batch
        sums = images.double().sum((1, 2, 3)).tolist()
        self.seen[part].append([list(pair) for pair in zip(sums, labels.tolist(), strict=True)])
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def training_step(self, batch):
        return self.record("train", batch)

    def validation_step(self, batch):
        self.record("val", batch)

    def test_step(self, batch):
        self.record("test", batch)

    def predict_step(self, batch):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(path, processes):
    """16 images a step; 2 epochs of 2 steps, validation after them, and a test."""
    batch_size = 16 // processes
    data = ArrayDataModule(path, val_size=25, batch_size=batch_size, on_device=True, crop_padding=2, flip=True)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=2,
        limit_train_batches=2,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Another state in each process: they agree on one order all the same.
    torch.manual_seed(5 + 10 * trainer.global_rank)
    model = Recorder()
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    return model, trainer.global_rank


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    model, rank = run(sys.argv[1], int(sys.argv[3]))
    Path(f"{sys.argv[2]}_{rank}.json").write_text(json.dumps(model.seen))
