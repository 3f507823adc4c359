"""A LightningModule that makes photographs sharp again: a few 3x3 convolutions that predict what is missing."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

__all__ = ["Deblurring"]


class Deblurring(pl.LightningModule):
    """3x3 convolutions of ``width`` channels, one for each of ``dilations``; the output is added to the input.

    Nothing here knows of active convolutions: the callback ConvertToACU makes them so.
    """

    def __init__(self, width: int = 12, dilations: tuple[int, ...] = (1, 1, 1, 1), lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        channels = (1, *[width] * (len(dilations) - 1), 1)
        layers: list[nn.Module] = []
        for inputs, outputs, dilation in zip(channels, channels[1:], dilations, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.psnr, self.ssim = MeanMetric(), MeanMetric()

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, H, W), values around 0 ... 1, to the same size."""
        return image + self.net(image)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error; ``batch``: (degraded, sharp)."""
        degraded, sharp = batch
        loss = F.mse_loss(self(degraded), sharp)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """PSNR and SSIM of each photograph; the test reports their means."""
        degraded, sharp = batch
        restored = self(degraded).clamp(0, 1)
        self.psnr(peak_signal_noise_ratio(restored, sharp, data_range=1.0))
        self.ssim(structural_similarity_index_measure(restored, sharp, data_range=1.0))
        self.log_dict({"psnr": self.psnr, "ssim": self.ssim})

    def configure_optimizers(self) -> dict[str, object]:
        """Adam, whose learning rate falls to zero along half a cosine."""
        optimizer = torch.optim.Adam(self.parameters(), self.hparams["lr"])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
