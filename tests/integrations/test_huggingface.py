"""Hugging Face's Trainer trains positions, resumes exactly, and says what does not fit."""

import pytest
import torch
from torch import nn

from lightning_acu import acu_layers, convert_to_acu

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments

from lightning_acu.integrations.huggingface import PositionCallback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Net(nn.Module):
    """Class scores of 3 classes, as Trainer wants them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))

    def forward(self, images, labels=None):
        scores = self.net(images).mean((2, 3))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def samples():
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(24, 2, 6, 7, generator=generator), torch.arange(24) % 3
    return [{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def trainer(folder, model=None, **arguments):
    torch.manual_seed(0)
    options = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "label_names": ["labels"],
    }
    return Trainer(
        model=convert_to_acu(Net()) if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **(options | arguments)),
        train_dataset=samples(),
        eval_dataset=samples(),
    )


def with_positions(folder, positions=None, **arguments):
    made = trainer(folder, **arguments)
    made.add_callback(
        PositionCallback(made, **({"multiplier": 5.0, "warmup_steps": 3, "round_at": 0.75} | (positions or {})))
    )
    return made


def state(made):
    return {name: value.clone() for name, value in made.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    made = with_positions(folder)
    made.train()
    return folder, made


def offsets_at(folder, step):
    from safetensors.torch import load_file

    states = load_file(folder / f"checkpoint-{step}/model.safetensors")
    return {name: value for name, value in states.items() if name.endswith("offsets")}


def test_positions_are_still_then_move_then_are_rounded(whole):
    folder, made = whole
    assert not any(value.any() for value in offsets_at(folder, 2).values())
    assert all((value != value.round()).any() for value in offsets_at(folder, 8).values())
    assert all(torch.equal(value, value.round()) for value in offsets_at(folder, 10).values())
    assert same(offsets_at(folder, 10), offsets_at(folder, 12))
    assert made.callback_handler.callbacks[-1].positions.step == 12
    inner = made.callback_handler.callbacks[-1].positions.optimizer
    assert [group["weight_decay"] for group in inner.param_groups if "acu_step" in group] == [0.0]


@pytest.mark.parametrize("step", [2, 6, 10])
def test_a_resume_is_exact(whole, tmp_path, step):
    folder, made = whole
    resumed = with_positions(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert same(state(resumed), state(made))


def test_the_same_trainer_resumes(tmp_path):
    made = with_positions(tmp_path)
    made.train()
    end = state(made)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(state(made), end)


def test_an_optimizer_of_ones_own(tmp_path):
    made = with_positions(tmp_path)
    made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    made.train()
    assert all(torch.equal(layer.offsets, layer.offsets.round()) for _, layer in acu_layers(made.model))


def test_a_wrong_argument_is_an_error(tmp_path):
    made = trainer(tmp_path)
    with pytest.raises(TypeError, match="warmup_step"):
        PositionCallback(made, warmup_step=3)
    with pytest.raises(TypeError, match=r"`trainer` must be a transformers.Trainer, got Net"):
        PositionCallback(Net())


def test_a_plain_model_is_an_error(tmp_path):
    made = trainer(tmp_path, Net())
    made.add_callback(PositionCallback(made))
    with pytest.raises(ValueError, match="convert_to_acu"):
        made.train()


def test_a_callback_of_another_trainer_is_an_error(tmp_path):
    made = trainer(tmp_path)
    made.add_callback(PositionCallback(trainer(tmp_path)))
    with pytest.raises(RuntimeError, match="no positions would be trained"):
        made.train()


def test_a_checkpoint_from_before_positions_were_trained_is_an_error(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        with_positions(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_without_the_optimizer_is_mentioned(tmp_path):
    with_positions(tmp_path, save_only_model=True).train()
    with pytest.warns(UserWarning, match="checkpoint of step 6 has no state of the optimizer"):
        with_positions(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_best_checkpoint_from_before_rounding_is_mentioned(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "step"}
    made = with_positions(tmp_path, **best)
    made.compute_metrics = lambda _: {"step": float(made.state.global_step == 6)}
    with pytest.warns(UserWarning, match=r"the best checkpoint \(.*checkpoint-6\) is from before positions were"):
        made.train()
