"""Models and tools of other libraries around active convolutions: convert, train, move the taps, fold.

Small models with random weights; nothing is downloaded. A library that is not installed is skipped:
``pip install '.[clients]'`` installs them. What was found is in docs/compatibility.md.
"""

import copy
import functools

import pytest
import torch
import torchvision
from helpers.census_model import wake
from helpers.oracle import assert_close
from torch import fx, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from lightning_acu import acu_layers, convert_to_acu, export_model, fold_acu
from lightning_acu.folded import ReshapedConv2d
from lightning_acu.surgery.convert import NoEffectWarning
from lightning_acu.surgery.outputs import difference, run, tensors_in

pytestmark = pytest.mark.slow

#: Of the largest value, in float64, which all of these models take.
ROUNDING = 1e-10


def active_layers(model):
    """The active convolutions of ``model`` and their names."""
    return list(acu_layers(model))


def move(model):
    """Move the taps of all active convolutions by up to 0.7 pixels."""
    for _, layer in acu_layers(model):
        with torch.no_grad():
            layer.offsets.add_(torch.empty_like(layer.offsets).uniform_(-0.7, 0.7))


def check_gradients(model):
    """That the last backward pass reached the positions of every active convolution."""
    layers = active_layers(model)
    without = [name for name, layer in layers if layer.offsets.grad is None or not layer.offsets.grad.any()]
    assert layers
    assert not without
    assert all(layer.offsets.grad.isfinite().all() for _, layer in layers)


def convert_and_fold(model, *args, active, before_fold=lambda model: None, form="auto", **convert):
    """Convert, differentiate, move and fold ``model``, and compare its outputs; gives those at the moved positions."""
    wake(model.double())
    args = tuple(arg.double() for arg in args)
    expected = run(model, args)
    convert_to_acu(model, **convert)
    assert len(active_layers(model)) == active
    assert difference(run(model, args), expected) < ROUNDING
    outputs = [output for output in tensors_in(model.train()(*args)) if output.requires_grad]
    sum((output * torch.randn_like(output)).mean() for output in outputs).backward()
    check_gradients(model)
    still = run(model.eval(), args)  # after batch norm has seen a batch
    move(model)
    moved = run(model, args)
    assert difference(moved, still) > 1e-4
    before_fold(model)
    fold_acu(model, args, form=form)
    assert not active_layers(model)
    assert difference(run(model, args), moved) < ROUNDING
    return moved


# ultralytics


@pytest.fixture
def ultralytics(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.getbasetemp()))  # where it writes its settings
    monkeypatch.chdir(tmp_path)  # and where it exports to
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    return pytest.importorskip("ultralytics")


def refuses_fuse(model):
    with pytest.raises(RuntimeError, match=r"merges weights of active convolutions .* call lightning_acu.fold_acu"):
        model.fuse(verbose=False)


#: Boxes, scores and three feature maps, the last outputs of YOLOv10 and YOLO26, of a branch that fuse() drops.
ONE2ONE = 5


def assert_fused(model, image, moved, dropped=0):
    """That ``model`` gives what it gave, without the last ``dropped`` tensors."""
    assert model.is_fused()
    outputs = run(model, (image,))
    assert difference(outputs, moved[: len(moved) - dropped]) < ROUNDING


#: The number of active convolutions.
YOLO = {
    "yolov8n": 39, "yolov8n-seg": 47, "yolov8n-pose": 45, "yolov8n-cls": 17, "yolov9t": 119, "yolov10n": 53,
    "yolo11n": 42, "yolo11n-seg": 50, "yolo11n-pose": 48, "yolo11n-cls": 18, "yolo26n": 59,
}  # fmt: skip


def batch_for(model):
    """Two images with three objects, as the models' own losses take them."""
    batch = {
        "img": torch.rand(2, 3, 96, 96),
        "batch_idx": torch.tensor([0.0, 0, 1]),
        "cls": torch.zeros(3, 1),
        "bboxes": torch.tensor([[0.5, 0.5, 0.3, 0.4], [0.3, 0.6, 0.2, 0.2], [0.5, 0.5, 0.9, 0.8]]),
    }
    if model.task == "segment":  # 1, 2: the pixels of the first and of the second object of an image
        batch["masks"] = torch.zeros(2, 24, 24)
        batch["masks"][:, 4:20, 6:18] = 1
        batch["masks"][0, 12:16, 4:9] = 2
    elif model.task == "pose":
        batch["keypoints"] = torch.cat((torch.rand(3, 17, 2), torch.full((3, 17, 1), 2.0)), -1)
    elif model.task == "classify":
        batch["cls"] = torch.tensor([1, 0])
    return batch


def train_a_step(ultralytics, model):
    """With the model's own loss; all positions get a gradient, except in heads that no object was assigned to."""
    model.args = ultralytics.cfg.get_cfg()  # with the weights of the losses
    loss, _ = model.train()(batch_for(model))
    loss.sum().backward()
    layers, head = active_layers(model), f"model.{len(model.model) - 1}."
    still = [name for name, layer in layers if layer.offsets.grad is None or not layer.offsets.grad.any()]
    assert all(name.startswith(head) for name in still), still
    torch.optim.SGD([layer.offsets for _, layer in layers], lr=0.01).step()
    assert all(layer.offsets.isfinite().all() and (layer.offsets.any() or name in still) for name, layer in layers)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", YOLO)
def test_yolo_trains_a_step_folds_and_fuses(ultralytics, name):
    model = convert_to_acu(ultralytics.YOLO(f"{name}.yaml").model)
    assert len(active_layers(model)) == YOLO[name]
    train_a_step(ultralytics, model)
    image = torch.rand(2, 3, 96, 96, dtype=torch.float64)
    wake(model.double())
    move(model)
    moved = run(model, (image,))
    refuses_fuse(model)
    fold_acu(model, image)
    assert difference(run(model, (image,)), moved) < ROUNDING
    model.fuse(verbose=False)  # RepVGGDW of YOLOv10 adds a 3x3 kernel, now 5x5, to one of 7x7; RepConv of YOLOv9 a 1x1
    assert_fused(model, image, moved, ONE2ONE if name in ("yolov10n", "yolo26n") else 0)


@pytest.fixture
def data(tmp_path):
    """Writes two images for a task; gives the arguments for its train and val."""
    pytest.importorskip("polars")  # reads the results
    from PIL import Image

    box, keypoints = "0 0.5 0.5 0.4 0.3", " 0.5 0.5 2" * 17
    labels = {"detect": box, "segment": "0 0.2 0.2 0.8 0.2 0.8 0.8", "pose": box + keypoints}

    def write(task):
        folder = tmp_path / task
        for split in ("train", "val"):
            images = folder / (f"{split}/square" if task == "classify" else f"images/{split}")
            images.mkdir(parents=True)
            for name in range(2):
                image = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()
                Image.fromarray(image).save(images / f"{name}.png")
                if task in labels:
                    (folder / f"labels/{split}").mkdir(parents=True, exist_ok=True)
                    (folder / f"labels/{split}/{name}.txt").write_text(labels[task] + "\n")
        text = f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [square]\nkpt_shape: [17, 3]\n"
        (folder / "data.yaml").write_text(text)
        return {
            "data": str(folder if task == "classify" else folder / "data.yaml"),
            "project": str(tmp_path), "imgsz": 64, "device": "cpu", "workers": 0, "plots": False, "verbose": False,
        }  # fmt: skip

    return write


@pytest.mark.filterwarnings("ignore")  # theirs, from first to last
@pytest.mark.parametrize("name", YOLO)
def test_yolo_predicts_exports_and_validates(ultralytics, data, name):
    yolo = ultralytics.YOLO(f"{name}.yaml")
    move(convert_to_acu(yolo.model))
    image = torch.rand(1, 3, 64, 64)
    fold_acu(yolo.model, image)
    expected = run(yolo.model, (image,))
    file = yolo.export(format="torchscript", imgsz=64, device="cpu", verbose=False)
    exported = list(tensors_in(torch.jit.load(file)(image)))
    assert difference(exported[:1], expected[:1]) < 1e-4
    (result,) = yolo.predict(
        torch.randint(0, 255, (70, 90, 3), dtype=torch.uint8).numpy(), imgsz=64, device="cpu", verbose=False, conf=0.0
    )
    assert result.probs is not None if name.endswith("-cls") else len(result.boxes)
    assert yolo.val(**data(yolo.task)).results_dict


def test_yolo_predict_is_refused_before_the_fold(ultralytics):
    yolo = ultralytics.YOLO("yolov8n.yaml")
    move(convert_to_acu(yolo.model))
    image = torch.randint(0, 255, (70, 90, 3), dtype=torch.uint8).numpy()
    with pytest.raises(RuntimeError, match=r"call lightning_acu\.fold_acu"):
        yolo.predict(image, imgsz=64, device="cpu", verbose=False)  # it fuses
    yolo.predictor = None  # the one that failed
    fold_acu(yolo.model, torch.rand(1, 3, 64, 64))
    (result,) = yolo.predict(image, imgsz=64, device="cpu", verbose=False, conf=0.0)
    assert len(result.boxes)


@pytest.mark.filterwarnings("ignore")
def test_yolo_train_builds_a_model_of_its_own(ultralytics, data):
    yolo = ultralytics.YOLO("yolov8n.yaml")
    convert_to_acu(yolo.model)
    yolo.train(epochs=1, batch=2, amp=False, deterministic=False, **data("detect"))
    assert not active_layers(yolo.model)


@pytest.mark.filterwarnings("ignore")
def test_yolo_trains_what_get_model_converts(ultralytics, data):
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):
        def get_model(self, *args, **kwargs):
            return convert_to_acu(super().get_model(*args, **kwargs))

        def final_eval(self):  # of the best checkpoint, which is fused for it
            checkpoint = torch.load(self.best, weights_only=False)
            checkpoint["ema"] = fold_acu(checkpoint["ema"].float(), torch.rand(1, 3, 64, 64))
            self.best = self.best.with_name("folded.pt")
            torch.save(checkpoint, self.best)
            super().final_eval()

    yolo = ultralytics.YOLO("yolov8n.yaml")
    arguments = data("detect")
    yolo.train(trainer=Trainer, epochs=1, batch=2, amp=False, deterministic=False, **arguments)
    assert not active_layers(yolo.model)  # what folded.pt has
    assert yolo.val(**arguments).results_dict
    best = ultralytics.YOLO(yolo.trainer.best.with_name("best.pt")).model  # with the weights in half precision
    layers = active_layers(best)
    assert len(layers) == 39
    assert all(layer.offsets.dtype == torch.float32 for _, layer in layers)
    assert any(layer.offsets.any() for _, layer in layers)


# segmentation_models_pytorch


@pytest.mark.parametrize(
    ("architecture", "encoder", "active"),
    [
        ("Unet", "tu-resnet18", 27),
        ("Unet", "efficientnet-b0", 28),
        ("UnetPlusPlus", "tu-resnet18", 39),
        ("FPN", "tu-efficientnet_lite0", 24),
        ("DeepLabV3Plus", "tu-resnet18", 21),
        ("Linknet", "efficientnet-b0", 17),
        ("Segformer", "mit_b0", 11),
    ],
)
def test_segmentation_models(architecture, encoder, active):
    smp = pytest.importorskip("segmentation_models_pytorch")
    # At 64 pixels the feature map is 4x4: taps 12 and more apart would lie outside.
    arguments = {"decoder_atrous_rates": (1, 2, 3)} if architecture == "DeepLabV3Plus" else {}
    model = getattr(smp, architecture)(encoder, encoder_weights=None, classes=2, **arguments)
    convert_and_fold(model, torch.rand(2, 3, 64, 64), active=active)


@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize(
    "build",
    [
        lambda: pytest.importorskip("segmentation_models_pytorch").DeepLabV3Plus("tu-xception41", encoder_weights=None),
        lambda: hugging("MobileNetV1", depth_multiplier=0.25),
        lambda: hugging("MobileNetV2", depth_multiplier=0.35),
    ],
    ids=["DeepLabV3Plus on Xception", "MobileNetV1", "MobileNetV2"],
)
def test_padding_by_image_size_survives_fold_and_export(build, tmp_path):
    """They pad as TensorFlow does, by the size of the image, or take their padding from the kernel's size."""
    torch.manual_seed(0)
    model = convert_to_acu(build().eval())
    for _, layer in active_layers(model):
        nn.init.uniform_(layer.offsets, -1.2, 1.2)
    assert export_model(model, tmp_path / "model.onnx", input_size=(3, 64, 96)) < 1e-4
    for size in ((64, 96), (65, 80)) if "MobileNet" in type(model).__name__ else ((64, 96), (128, 64)):
        image = torch.rand(2, 3, *size)
        with torch.no_grad():
            expected = [*tensors_in(model(image))]
            found = [*tensors_in(fold_acu(copy.deepcopy(model), example_input=image)(image))]
        assert difference(found, expected) < 1e-5


def hugging(name, **config):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")(**config))


# transformers


def resnet_config(transformers, **arguments):
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **arguments
    )


def detr(transformers):
    size = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
            (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    backbone = resnet_config(transformers, out_features=["stage2"])
    config = transformers.DetrConfig(backbone_config=backbone, d_model=32, num_queries=5, **size)
    return transformers.DetrForObjectDetection(config).requires_grad_(True)  # it freezes the first stages


def segformer(transformers):
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 16, 16, 32], decoder_hidden_size=16)
    )


def efficientnet(transformers):
    config = transformers.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320)
    model = transformers.EfficientNetForImageClassification(config)
    for module in model.modules():  # weights of 0.02 leave nothing of the image after eight blocks in eval mode
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def regnet(transformers):
    return transformers.RegNetForImageClassification(
        transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)
    )


def bit(transformers, **arguments):
    config = transformers.BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=8, **arguments)
    return transformers.BitForImageClassification(config)


TRANSFORMERS = {
    "ResNet": (4, lambda t: t.ResNetForImageClassification(resnet_config(t))),
    "MobileNetV1": (14, lambda t: t.MobileNetV1ForImageClassification(t.MobileNetV1Config(depth_multiplier=0.25))),
    "MobileNetV2": (18, lambda t: t.MobileNetV2ForImageClassification(t.MobileNetV2Config(depth_multiplier=0.35))),
    "EfficientNet": (8, efficientnet),
    "SegFormer": (7, segformer),
    "DETR": (4, detr),
    "RegNet": (3, regnet),
    "BiT": (2, bit),
    "BiT, bottleneck, same": (2, functools.partial(bit, layer_type="bottleneck", global_padding="SAME")),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    active, make = TRANSFORMERS[name]
    convert_and_fold(make(pytest.importorskip("transformers")), torch.rand(2, 3, 70, 64), active=active)


def test_transformers_convnext_has_nothing_to_convert():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    with pytest.warns(NoEffectWarning, match=r"kernel size 7x7 not among kernel_sizes=\[3, 5\]"):
        assert not active_layers(convert_to_acu(transformers.ConvNextForImageClassification(config)))


# monai, kornia


MONAI = {
    "BasicUNet": (18, {"features": (8,) * 6, "dropout": 0.0}),
    "UNet": (7, {"channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 1}),
    "SegResNet": (13, {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}),
    "DynUNet": (
        10,
        {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2] * 2, "filters": [8] * 3},
    ),
    "AttentionUnet": (8, {"channels": (4, 8, 16), "strides": (2, 2)}),
}


@pytest.mark.parametrize("name", MONAI)
def test_monai(name):
    nets = pytest.importorskip("monai.networks.nets")
    active, arguments = MONAI[name]
    model = getattr(nets, name)(spatial_dims=2, in_channels=1, out_channels=2, **arguments)
    convert_and_fold(model, torch.rand(2, 1, 32, 48), active=active)


def test_monai_flexible_unet():
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.FlexibleUNet(in_channels=3, out_channels=2, backbone="resnet18", pretrained=False)
    convert_and_fold(model, torch.rand(2, 3, 64, 32), active=27)


@pytest.mark.parametrize("name", ["HardNet", "HyNet", "SOSNet"])
def test_kornia_descriptors(name):
    feature = pytest.importorskip("kornia.feature")
    convert_and_fold(getattr(feature, name)(pretrained=False), torch.rand(3, 1, 32, 32), active=6)


def test_kornia_dexined():
    dexined = pytest.importorskip("kornia.models.dexined")
    convert_and_fold(dexined.DexiNed(pretrained=False), torch.rand(1, 3, 32, 48), active=26)


# peft, accelerate


def test_lora_of_a_linear_layer_leaves_the_positions():
    peft = pytest.importorskip("peft")
    model, image = convert_to_acu(torchvision.models.resnet18(num_classes=5)), torch.rand(2, 3, 64, 64)
    model, image = model.double(), image.double()
    move(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False))
    assert not any(layer.offsets.requires_grad for _, layer in acu_layers(adapted))  # frozen as all that is not LoRA
    expected = run(adapted, (image,))
    merged = adapted.merge_and_unload()
    assert len(active_layers(merged)) == 16
    assert difference(run(merged, (image,)), expected) < ROUNDING


def test_lora_of_a_folded_model():
    peft = pytest.importorskip("peft")
    model, image = torchvision.models.resnet18(num_classes=5), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    convert_and_fold(model, image, active=16, form="single")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, ReshapedConv2d):
            model.set_submodule(name, layer.plain())
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False)
    before = run(model, (image,))
    adapted = peft.get_peft_model(model, config)
    expected = run(adapted, (image,))
    assert difference(expected, before) > 1e-4
    assert difference(run(adapted.merge_and_unload(), (image,)), expected) < ROUNDING


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = convert_to_acu(torchvision.models.squeezenet1_1(num_classes=3))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.rand(2, 3, 64, 64)).square().sum())
    check_gradients(model)
    optimizer.step()
    assert all(layer.offsets.any() for _, layer in acu_layers(model))
    accelerator.save_model(model, tmp_path)
    again = convert_to_acu(torchvision.models.squeezenet1_1(num_classes=3))
    accelerate.load_checkpoint_in_model(again, tmp_path)
    for (_, layer), (_, trained) in zip(acu_layers(again), acu_layers(model), strict=True):
        assert_close(layer.offsets, trained.offsets, 0)


# torchvision and torch


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 19),
        ("retinanet_resnet50_fpn", 31),
        ("ssdlite320_mobilenet_v3_large", 32),
        ("maskrcnn_resnet50_fpn", 25),
        ("keypointrcnn_resnet50_fpn", 29),
        ("fcos_resnet50_fpn", 32),
    ],
)
def test_torchvision_detection_in_training_mode(name, active):
    arguments = {} if "ssd" in name else {"min_size": 96, "max_size": 96}
    if "rcnn" in name:
        arguments["box_batch_size_per_image"] = 16
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **arguments)
    wake(model.double())
    images = [torch.rand(3, 96, 96, dtype=torch.float64), torch.rand(3, 96, 80, dtype=torch.float64)]
    boxes = torch.tensor([[3.0, 5, 70, 60], [10, 2, 55, 40], [30, 50, 48, 70]], dtype=torch.float64)
    target = {"boxes": boxes, "labels": torch.ones(3, dtype=torch.int64)}
    target["masks"] = torch.ones(3, 96, 80, dtype=torch.uint8)
    target["keypoints"] = torch.cat((boxes.view(3, 2, 2), torch.ones(3, 2, 1)), -1).repeat(1, 9, 1)[:, :17].float()
    plain = copy.deepcopy(model).train()
    convert_to_acu(model.train())
    assert len(active_layers(model)) == active
    losses = []
    for each in (plain, model):
        torch.manual_seed(0)  # it samples boxes
        losses.append(each(images, [target, target]))
    for name, loss in losses[1].items():
        assert_close(loss, losses[0][name], ROUNDING)
    sum(losses[1].values()).backward()
    check_gradients(model)
    move(model.eval())
    backbone = model.backbone(torch.stack([images[0]]))
    fold_acu(model)
    for name, feature in model.backbone(torch.stack([images[0]])).items():
        assert difference([feature], [backbone[name]]) < ROUNDING


@pytest.mark.parametrize(("name", "active"), [("lraspp_mobilenet_v3_large", 16), ("fcn_resnet50", 17)])
def test_torchvision_segmentation_in_training_mode(name, active):
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    convert_and_fold(model, torch.rand(2, 3, 64, 64), active=active)


def test_torchvision_deeplab_in_training_mode():
    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None, num_classes=3)
    for module in model.classifier.modules():  # at 64 pixels the feature map is 4x4: taps 12 and more apart lie outside
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            module.dilation = module.padding = (module.dilation[0] // 12, module.dilation[0] // 12)
    convert_and_fold(model, torch.rand(2, 3, 64, 64), active=20)


@pytest.fixture
def moved():
    model = convert_to_acu(torchvision.models.resnet18(num_classes=5)).double().eval()
    move(model)
    return model


@pytest.fixture
def image():
    return torch.rand(2, 3, 64, 64, dtype=torch.float64)


def test_fx(moved, image):
    traced = fx.symbolic_trace(moved)
    assert difference(run(traced, (image,)), run(moved, (image,))) < ROUNDING
    traced.train()(image).square().sum().backward()
    check_gradients(moved)  # the same parameters
    fold_acu(moved.eval(), image)
    assert difference(run(fx.symbolic_trace(moved), (image,)), run(moved, (image,))) < ROUNDING


def test_functional_call(moved, image):
    state = {name: value.detach() for name, value in moved.state_dict().items()}
    shifted = {name: value + 0.25 if name.endswith("offsets") else value for name, value in state.items()}
    expected = functional_call(moved, shifted, (image,))
    gradients = torch.func.grad(lambda s: functional_call(moved, state | s, (image,)).square().sum())(
        {name: value for name, value in shifted.items() if name.endswith("offsets")}
    )
    assert len(gradients) == 16
    assert all(gradient.any() for gradient in gradients.values())
    moved.load_state_dict(shifted)
    assert difference([moved(image)], [expected]) < ROUNDING


@pytest.mark.filterwarnings(  # torch's, of its own quantisation
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:Please use quant_min and quant_max",
    "ignore:torch.quantize_per_tensor",
)
def test_quantization_of_a_folded_model(moved, image):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    moved, image = moved.float(), image.float()
    fold_acu(moved, image, form="single")  # one nn.Conv2d for each layer
    expected = moved(image)
    for name, layer in list(moved.named_modules()):
        if isinstance(layer, ReshapedConv2d):  # quantisation looks for nn.Conv2d itself
            moved.set_submodule(name, layer.plain())
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    prepared = quantize_fx.prepare_fx(moved, mapping, (image,))
    prepared(image)
    quantized = quantize_fx.convert_fx(prepared)
    convs = [m for m in quantized.modules() if isinstance(m, torch.ao.nn.quantized.Conv2d)]
    assert len(convs) == 20
    assert difference([quantized(image)], [expected]) < 0.15  # of 8 bits


@pytest.mark.parametrize("arguments", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.75)}], ids=["mean", "ema"])
def test_averages_of_torch(moved, image, arguments):
    first = {name: layer.offsets.clone() for name, layer in acu_layers(moved)}
    average = AveragedModel(moved, **arguments)
    average.update_parameters(moved)
    move(moved)
    average.update_parameters(moved)
    share = 0.75 if arguments else 0.5
    for name, layer in acu_layers(average.module):
        assert_close(layer.offsets, share * first[name] + (1 - share) * moved.get_submodule(name).offsets, 1e-6)
    update_bn([image], average)
    expected = run(average, (image,))
    fold_acu(average.module)
    assert difference(run(average, (image,)), expected) < ROUNDING
