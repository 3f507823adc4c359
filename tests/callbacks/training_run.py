"""Trainings in processes of their own: ``python training_run.py CONFIGURATION.json ...``, one after the other.

Each writes what it came to, ``{"offsets": [per step], "weights": ..., "optimizer": ..., "rates": [per step]}``, to the
configuration's "out"; its exit status is printed. With "kill_at", SIGKILL strikes in the middle of that step.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from helpers.processes import run_forked
from helpers.tiny import TinyModule, loader
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_acu.callbacks import OffsetLogger, PositionLRSchedule, RoundThenFinetune
from lightning_acu.sharded import whole

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
}


class Module(TinyModule):
    """Notes positions and learning rates at each step; shards itself where the strategy is FSDP2."""

    def __init__(self, config):
        super().__init__(
            OPTIMIZERS[config.get("optimizer", "sgd")],
            lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=60),
        )
        self.seen, self.rates, self.kill_at = {}, {}, config.get("kill_at")

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        self.seen[self.trainer.global_step] = torch.cat(
            [whole(layer.offsets.detach()).clone() for layer in (self.net[0], self.net[2])]
        )
        self.rates[self.trainer.global_step] = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


class LoaderWithAPlace:
    """A loader that says where it is, so that a resumed training goes on with the next batch."""

    def __init__(self, dataloader):
        self.batches, self.place = list(dataloader), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        if self.place == len(self.batches):  # the trainer stops asking after the last one
            self.place = 0
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def count_processes(config):
    return 1 if config["strategy"] == "one" else 2


def main(config):
    strategies = {
        "one": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "ddp_find_unused": DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
        "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
    }
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype = torch.float64 if config.get("double") else torch.float32
    module = Module(config).to(dtype)
    data = loader(config["batch_size"], 24 // config["batch_size"], dtype)
    processes = count_processes(config)
    if processes == 2:  # each takes every second image, so that a batch of both is a batch of one process
        mine = DistributedSampler(data.dataset, 2, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
        data = DataLoader(data.dataset, config["batch_size"], sampler=mine)
    arguments = {"enable_checkpointing": False}
    callbacks = [
        LearningRateMonitor(),
        PositionLRSchedule(2.0, warmup_steps=3, schedule="cosine"),
        RoundThenFinetune(at_step=14),
        OffsetLogger(5),
    ]
    if "checkpoints" in config:
        data = LoaderWithAPlace(data)
        callbacks.append(
            ModelCheckpoint(config["checkpoints"], every_n_train_steps=1, save_top_k=1, filename="last", monitor=None)
        )
        arguments = {}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        use_distributed_sampler=False,
        strategy=strategies[config["strategy"]],
        precision=config.get("precision", "32-true"),
        max_epochs=-1,
        max_steps=20,
        accumulate_grad_batches=config.get("accumulate", 1),
        gradient_clip_val=config.get("clip"),
        logger=CSVLogger(Path(config["out"]).parent, name=Path(config["out"]).stem),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, data, ckpt_path=config.get("ckpt_path"))
    weights = [whole(p.detach()).flatten() for name, p in module.named_parameters() if "offsets" not in name]
    offsets = torch.cat([whole(layer.offsets.detach()) for layer in (module.net[0], module.net[2])])
    if trainer.is_global_zero:
        result = {"seen": module.seen, "rates": module.rates, "weights": torch.cat(weights), "offsets": offsets}
        if config["strategy"] != "fsdp2":
            result["optimizer"] = trainer.optimizers[0].state_dict()
        torch.save(result, config["out"])
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        config = json.loads(Path(path).read_text())
        print(run_forked(main, config, processes=count_processes(config)), flush=True)
