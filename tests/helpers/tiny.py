"""A small LightningModule with two active convolutions and no batch norm, and data for it."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_acu import convert_to_acu

STEPS_PER_EPOCH = 6


class TinyModule(pl.LightningModule):
    """3x3 conv (2 -> 4), 3x3 conv (4 -> 3), mean: class scores of 3 classes."""

    def __init__(self, optimizer=None, scheduler=None, convert=True):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))
        if convert:
            convert_to_acu(self.net)
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        self.make_scheduler = scheduler

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images).mean((2, 3)), labels)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]

    @property
    def offsets(self):
        """All positions' offsets in one detached copy."""
        return torch.cat([self.net[0].offsets.detach(), self.net[2].offsets.detach()])

    @property
    def weights(self):
        """All other parameters in one detached copy."""
        return torch.cat([p.detach().flatten() for name, p in self.named_parameters() if "offsets" not in name])


class ManualModule(TinyModule):
    """The same under manual optimisation."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Spy(pl.Callback):
    """Notes the offsets and the learning rates before each step."""

    def __init__(self):
        self.offsets, self.rates, self.weights = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.offsets.append(pl_module.offsets)
        self.weights.append(pl_module.weights)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def loader(batch_size=4, batches=STEPS_PER_EPOCH, dtype=torch.float32):
    """The same images each time, in the same order."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batches * batch_size, 2, 7, 6, generator=generator, dtype=dtype)
    labels = torch.randint(0, 3, (batches * batch_size,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size)


def fit(module, callbacks, tmp_path, data=None, ckpt_path=None, **arguments):
    """A quiet CPU training; returns the trainer."""
    defaults = {"max_epochs": 2, "enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, callbacks=callbacks,
        **(defaults | arguments),
    )  # fmt: skip
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
    return trainer


def validate(module, tmp_path):
    """The metrics of a quiet validation, by the module's own loader."""
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    (result,) = trainer.validate(module, verbose=False)
    return result
