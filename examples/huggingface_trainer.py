"""Hugging Face's Trainer, with PositionCallback.

python examples/huggingface_trainer.py --output runs/hf                  # and with --resume: from its last checkpoint
"""

import argparse
from collections.abc import Sequence

import torch
from digits import digits
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from lightning_acu import convert_to_acu
from lightning_acu.integrations.huggingface import PositionCallback


class Images(Dataset):
    """Digits as Trainer takes them."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main(argv: Sequence[str] | None = None) -> Trainer:
    """Train, and return the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/huggingface")
    parser.add_argument("--resume", nargs="?", const=True, default=None, help="a checkpoint; alone: the last one")
    args = parser.parse_args(argv)

    set_seed(0)
    train, test = digits(size=16)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    trainer = Trainer(
        model=convert_to_acu(ResNetForImageClassification(config)),
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=48,
            per_device_train_batch_size=64,
            learning_rate=0.005,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            logging_steps=12,
            save_steps=12,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Images(*train),
        eval_dataset=Images(*test),
    )
    trainer.add_callback(PositionCallback(trainer, multiplier=100.0, warmup_steps=12, round_at=0.75))
    trainer.train(resume_from_checkpoint=args.resume)
    print(trainer.evaluate())
    return trainer


if __name__ == "__main__":
    main()
