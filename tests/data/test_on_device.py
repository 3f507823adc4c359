"""Trainings on images that lie on the device: Lightning accepts the loader, shares out epochs and resumes in them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_acu.data import ArrayDataModule, DeviceLoader

SCRIPT = Path(__file__).with_name("on_device_run.py")
Recorder, run = (runpy.run_path(str(SCRIPT))[name] for name in ("Recorder", "run"))


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **{"max_epochs": 3, "enable_checkpointing": False, **quiet, **options})


def module(path, **arguments):
    defaults = {"val_size": 30, "batch_size": 16, "on_device": True, "crop_padding": 2, "flip": True}
    return ArrayDataModule(path, **{**defaults, **arguments})


def fit(path, seed=1, ckpt_path=None, arguments=None, **options):
    seed_everything(seed, verbose=False)
    model = Recorder()
    trainer(**options).fit(model, datamodule=module(path, **(arguments or {})), ckpt_path=ckpt_path)
    return model.seen


def test_all_stages_without_a_warning(arrays, save):
    # Warnings are errors here. 60 images for training make 3 batches of 16, and 30 for validation 2.
    path, model = save(arrays), Recorder()
    data, single = module(path), module(path, on_device=False)
    fitted = trainer(max_epochs=2, num_sanity_val_steps=0)
    fitted.fit(model, datamodule=data)
    assert isinstance(fitted.train_dataloader, DeviceLoader)
    fitted.test(model, datamodule=data, verbose=False)
    assert [len(batch) for batch in model.seen["train"]] == [16] * 6
    single.setup()
    for part in ("val", "test"):
        expected = [
            [[float(image.double().sum()), int(label)] for image, label in zip(*batch, strict=True)]
            for batch in getattr(single, f"{part}_dataloader")()
        ]
        assert model.seen[part] == expected * (2 if part == "val" else 1)
    assert torch.cat(fitted.predict(model, datamodule=data)).tolist() == arrays["y_test"].tolist()


def test_shuffled_by_the_global_seed_and_not_by_ours(arrays, save):
    path = save(arrays)
    first = fit(path, seed=1)["train"]
    assert fit(path, seed=1)["train"] == first
    assert fit(path, seed=2)["train"] != first
    assert first[:3] != first[3:6] != first[6:]
    # The seed of the split is not that of the order: without validation images it decides nothing.
    whole = {"val_size": 0}
    orders = []
    for seed in (0, 7):
        torch.manual_seed(3)
        data = module(path, crop_padding=0, flip=False, seed=seed, **whole)
        data.setup()
        orders.append(data.train_dataloader().batch_sampler.seed)
    assert orders[0] == orders[1]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # resumed without the callback that saves
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("limit", [1.0, 2])
@pytest.mark.parametrize("preprocessing", ["normalize", "whiten"])
def test_resume_at_every_step(arrays, save, tmp_path, limit, preprocessing):
    path = save(arrays)
    arguments = {"preprocessing": preprocessing, "val_size": 0, "batch_size": 25}  # 3 batches an epoch, or 2 of them
    options = {"limit_train_batches": limit, "max_epochs": 2, "arguments": arguments, "limit_val_batches": 0}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit(path, callbacks=[saver], enable_checkpointing=True, **options)["train"]
    steps = 6 if limit == 1.0 else 4
    assert len(straight) == steps
    for step in range(1, steps):
        resumed = fit(path, seed=99, ckpt_path=tmp_path / f"step={step}.ckpt", **options)["train"]
        assert resumed == straight[step:]


def test_batches_to_overfit_stay_the_same(arrays, save):
    seen = fit(save(arrays), overfit_batches=2, arguments={"crop_padding": 0, "flip": False})["train"]
    assert seen[:2] == seen[2:4] == seen[4:]


@pytest.mark.slow
def test_two_processes_share_what_one_sees(arrays, save, tmp_path):
    """The same images in each step, with the same crops: half of them here, half of them there, none twice."""
    path, out = save(arrays), tmp_path / "seen"
    leave_out = ("MASTER_", "LOCAL_", "PL_")
    two = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), str(out), "2"],
        capture_output=True,
        text=True,
        timeout=240,
        env={k: v for k, v in os.environ.items() if not k.startswith(leave_out)} | {"OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr[-3000:]
    ranks = [json.loads(Path(f"{out}_{rank}.json").read_text()) for rank in range(2)]
    one = run(path, processes=1)[0].seen
    for part, count in (("train", 2 * 2 * 16), ("val", 25), ("test", 12)):
        steps = [*zip(*(rank[part] for rank in ranks), strict=True)]
        assert [sorted(a + b) for a, b in steps] == [sorted(step) for step in one[part]]
        assert all(abs(len(a) - len(b)) <= 1 for a, b in steps)
        assert sum(map(len, one[part])) == count
