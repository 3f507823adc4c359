"""A LightningModule for image classification with any timm or torchvision model, plain or active."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from .checks import at_least, whole_number
from .choices import did_you_mean, one_of
from .models import create_model
from .surgery import ConvertConfig, report_acu

__all__ = ["ImageClassifier", "MulticlassError"]

#: Weight of an auxiliary head's loss, as in the papers of Inception v3 (0.4) and GoogLeNet (0.3).
_AUXILIARY = {"InceptionOutputs": 0.4, "GoogLeNetOutputs": 0.3}

_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def _as_config(convert: Any) -> ConvertConfig:
    """``convert`` as a ConvertConfig. A dict is for notebooks; LightningCLI makes a ConvertConfig of configurations."""
    if isinstance(convert, dict):
        valid = [field.name for field in fields(ConvertConfig)]
        for name in convert:
            if name not in valid:
                raise TypeError(f"`convert` has no field {name!r}{did_you_mean(name, valid)}")
        return ConvertConfig(**convert)
    if not isinstance(convert, ConvertConfig):
        raise TypeError(f"`convert` (={convert!r}) must be a ConvertConfig, a dict of its fields, or None")
    return convert


class MulticlassError(MulticlassAccuracy):
    """1 - accuracy, the number that papers report."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The fraction of wrong predictions."""
        return 1 - super().compute()


class ImageClassifier(pl.LightningModule):
    """Trains a model to classify images into ``num_classes`` classes. Logs loss, accuracy and error (1 - accuracy).

    Batches are (images, labels): float (N, in_chans, H, W) and int (N,). ``predict`` returns class probabilities.

    Args:
        model: a timm name ("resnet18"), or "torchvision/" followed by a torchvision name.
        num_classes: number of classes.
        in_chans: number of image channels.
        pretrained: start from published weights.
        convert: how to convert the convolutions into active ones: a :class:`lightning_acu.ConvertConfig` or a dict of
            its fields, the arguments of :func:`lightning_acu.convert_to_acu`. None does not convert any.
        optimizer: a function from parameters to an optimizer; in a configuration, ``class_path`` and ``init_args``.
            None: AdamW with torch's defaults. Checkpoints of a module made in Python do not contain it: to train
            further, pass it to ``load_from_checkpoint`` again.
        lr_scheduler: a function from an optimizer to a scheduler, or None.
        lr_scheduler_interval: "epoch" or "step": how often the scheduler steps.
        label_smoothing: fraction of the target probability that is spread over all classes, in training.
        model_kwargs: further arguments of the model, such as ``drop_path_rate``.
        channels_last: keep weights and images in torch's channels_last memory format.
        compile_mode: compile the model when training or evaluation starts, with this mode of ``torch.compile``:
            "default", "reduce-overhead" (CUDA graphs), "max-autotune" or "max-autotune-no-cudagraphs". None: do not
            compile.

    Raises:
        ValueError: an unknown model, ``lr_scheduler_interval`` or ``compile_mode``, with the nearest valid names; or
            ``num_classes`` or ``label_smoothing`` out of range.
        TypeError: ``convert`` has the wrong type; in a forward pass, the model's output is not class scores.
    """

    def __init__(
        self,
        model: str,
        num_classes: int = 10,
        in_chans: int = 3,
        pretrained: bool = False,
        convert: ConvertConfig | None = None,
        # None: jsonargparse would pass arguments of a default class, such as its weight decay, to the chosen class.
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: str = "epoch",
        label_smoothing: float = 0.0,
        model_kwargs: dict[str, Any] | None = None,
        channels_last: bool = False,
        compile_mode: str | None = None,
    ) -> None:
        super().__init__()
        whole_number("num_classes", num_classes, 1)
        if not 0 <= at_least("label_smoothing", label_smoothing) <= 1:
            raise ValueError(f"`label_smoothing` (={label_smoothing}) must be a share of the probability, 0 to 1")
        one_of("compile_mode", compile_mode, _COMPILE_MODES, or_none=True)
        one_of("lr_scheduler_interval", lr_scheduler_interval, ("epoch", "step"))
        # Not the callables: they may be lambdas, and a restored model that only predicts does not need them.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.model = create_model(
            model, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **(model_kwargs or {})
        )
        self.hparams["pretrained"] = False  # a checkpoint has its own weights: restoring it must not download others
        if convert is not None:
            _as_config(convert).apply(self.model)
            report = report_acu(self.model)
            rank_zero_info(f"{model}: {len(report.converted)} of {len(report.rows)} convolutions are active")
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.compile_mode = compile_mode
        self._compiled = False
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.label_smoothing = label_smoothing
        metrics = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "error": MulticlassError(num_classes, average="micro"),
        }
        if num_classes > 5:
            metrics["top5_accuracy"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        collection = MetricCollection(metrics)  # type: ignore[arg-type]
        self.train_metrics = collection.clone(prefix="train/")
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")

    def setup(self, stage: str) -> None:
        """Compare with ``num_classes`` and ``in_chans`` of the data module, if it has them; compile the model.

        Its ``image_size`` gives the summary of the model an image to count FLOPs with.

        Raises:
            ValueError: the data have more classes than ``num_classes``, or not ``in_chans`` channels.
        """
        data = getattr(self.trainer, "datamodule", None)
        classes, channels = (getattr(data, name, None) for name in ("num_classes", "in_chans"))
        if isinstance(classes, int) and classes > self.hparams["num_classes"]:
            raise ValueError(
                f"`num_classes` (={self.hparams['num_classes']}) is too small: the data have {classes} classes"
            )
        if isinstance(channels, int) and channels != self.hparams["in_chans"]:
            raise ValueError(
                f"`in_chans` (={self.hparams['in_chans']}) does not match the data: images have {channels} channels"
            )
        size = getattr(data, "image_size", None)
        if self.example_input_array is None and size is not None and self.compile_mode is None:
            # For the FLOPs in Lightning's summary. (Compiling for a single image would only take time.)
            shape = (1, self.hparams["in_chans"], *size)
            self.example_input_array = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if self.compile_mode is not None and not self._compiled:
            # In place, so that names and checkpoints stay the same; only now, as a callback may have converted it.
            self.model.compile(mode=self.compile_mode)
            self._compiled = True

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_chans, H, W) to class scores (N, num_classes)."""
        return self._scores(images)[0]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy, plus that of the auxiliary heads of models that have some."""
        images, labels = batch
        scores, auxiliary, weight = self._scores(images)
        loss = F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)
        for extra in auxiliary:
            loss = loss + weight * F.cross_entropy(extra, labels, label_smoothing=self.label_smoothing)
        self.train_metrics.update(scores.detach(), labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss, accuracy and error of the validation images."""
        self._evaluate(batch, self.val_metrics, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss, accuracy and error of the test images."""
        self._evaluate(batch, self.test_metrics, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The class probabilities (N, num_classes) of a batch, with or without labels."""
        images = batch[0] if isinstance(batch, list | tuple) else batch
        return self(images).softmax(-1)

    def configure_optimizers(self) -> Any:
        """The optimizer that ``optimizer`` makes, and the scheduler that ``lr_scheduler`` makes, if any."""
        optimizer = (self.optimizer or torch.optim.AdamW)(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": self.lr_scheduler_interval}
        if isinstance(scheduler["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler["monitor"] = getattr(scheduler["scheduler"], "monitor", "val/loss")
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, stage: str) -> None:
        images, labels = batch
        scores = self(images)
        metrics.update(scores, labels)
        loss = F.cross_entropy(scores, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=stage == "val")

    def _scores(self, images: Tensor) -> tuple[Tensor, list[Tensor], float]:
        """Class scores, those of auxiliary heads (Inception and GoogLeNet have them in training), and their weight."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        output = self.model(images)
        weight = _AUXILIARY.get(type(output).__name__, 0.4)
        scores, *auxiliary = output if isinstance(output, tuple | list) else (output,)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            kind = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(
                f"{type(self.model).__name__} returned {kind} instead of class scores (N, num_classes); "
                "ImageClassifier supports classification models only"
            )
        return scores, [extra for extra in auxiliary if extra is not None], weight
