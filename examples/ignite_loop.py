"""Training with PyTorch-Ignite: its supervised trainer with accumulated gradients, and its checkpoints."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from digits import digits, network
from ignite.engine import Events, create_supervised_trainer
from ignite.engine.deterministic import DeterministicEngine
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_acu import convert_to_acu
from lightning_acu.training import PositionTrainer


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train, and return the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--stop-after", type=int, help="end after so many epochs, as a training that was killed")
    parser.add_argument("--folder", type=Path, help="saves after each epoch")
    parser.add_argument("--resume", type=Path, help="a checkpoint")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*digits()[0]), batch_size=64, shuffle=True)
    steps = args.epochs * len(loader) // 2
    model = convert_to_acu(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    positions = PositionTrainer(
        optimizer, model, multiplier=5.0, warmup_steps=steps // 4, total_steps=steps, round_at=0.75
    )
    trainer = create_supervised_trainer(
        model, optimizer, nn.CrossEntropyLoss(), gradient_accumulation_steps=2, deterministic=True
    )
    assert isinstance(trainer, DeterministicEngine)  # whose epochs can be repeated after a resume

    @trainer.on(Events.EPOCH_COMPLETED)
    def _print() -> None:
        print(f"epoch {trainer.state.epoch}: loss {trainer.state.output:.3f}; rounded: {positions.rounded}")
        if trainer.state.epoch == args.stop_after:
            trainer.terminate()

    parts = {"model": model, "optimizer": optimizer, "trainer": trainer}
    if args.folder:
        saver = DiskSaver(str(args.folder), create_dir=True, require_empty=False)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(parts, saver, n_saved=None))
    if args.resume:
        # Your own file: the trainer's state has Python's and NumPy's random numbers, which weights_only refuses.
        Checkpoint.load_objects(parts, torch.load(args.resume, weights_only=False))
    trainer.run(loader, max_epochs=args.epochs)
    return model


if __name__ == "__main__":
    main()
