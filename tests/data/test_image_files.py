"""Folders that never end, and things that are named like an image and are none."""

import os
import socket
import stat

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from lightning_acu.data import ImageFolderDataModule, Places365DataModule
from lightning_acu.data.image_files import ImageFiles, class_names, read_image


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (9, 8, 7)).save(path)


@pytest.fixture
def root(tmp_path):
    """train/ and val/ with the classes a and b, two images each."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            for i in range(2):
                picture(tmp_path / part / name / f"{i}.png")
    return tmp_path


@pytest.fixture(params=[ImageFolderDataModule, Places365DataModule])
def fails(request, root):
    """Checks that both data modules stop with an error that names the path."""

    def check(path, message, kind=ValueError):
        number = {"num_classes": len(list((root / "train").iterdir()))} if request.param is Places365DataModule else {}
        data = request.param(root, **number)
        with pytest.raises(kind, match=message) as error:
            data.setup("fit")
        assert str(path) in str(error.value)

    return check


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../..", "/", "../../val/b/../../train"])
def test_links_to_parents(root, fails, target):
    link = root / "train" / "a" / "more"
    link.symlink_to(target)
    fails(link, r"more is the same folder as /.*, by a link: images would be listed twice, or without end; remove the")


def test_links_to_each_other(root, fails):
    (root / "train" / "a" / "x").mkdir()
    (root / "train" / "a" / "x" / "y").symlink_to(root / "elsewhere")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "back").symlink_to(root / "train" / "a" / "x")
    fails(root / "train" / "a" / "x", "is the same folder as")


def test_a_class_that_is_the_folder_of_classes(root, fails):
    (root / "train" / "b2").symlink_to(".")
    (root / "val" / "b2").symlink_to(".")
    fails(root / "train" / "b2", "is the same folder as", ValueError)


def test_two_links_to_each_of_many_folders(root, fails):
    """2^30 ways through 30 folders."""
    for i in range(30):
        folder = root / "deep" / str(i)
        folder.mkdir(parents=True)
        for name in "xy":
            (folder / name).symlink_to(root / "deep" / str(i + 1))
    (root / "deep" / "30").mkdir()
    (root / "train" / "a" / "deep").symlink_to(root / "deep" / "0")
    fails(root / "train" / "a" / "deep", "is the same folder as")


def make(path, kind):
    if kind == "device":
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero: it never ends, either
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(path.with_suffix(".pipe"))
        path.symlink_to(path.with_suffix(".pipe"))
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "device"])
def test_not_a_file(root, fails, monkeypatch, kind):
    monkeypatch.chdir(root / "train" / "a")  # a socket's path may have 108 characters
    path = root / "train" / "a" / "7.JPG"
    try:
        make(path if kind != "socket" else path.relative_to(os.getcwd()), kind)
    except PermissionError:
        pytest.skip(f"a {kind} cannot be made here")
    fails(path, r"7\.JPG is not a file but a pipe, socket or device; remove it")


@pytest.mark.parametrize("place", ["train/a/7.jpg", "train/a/more", "train/c"])
@pytest.mark.parametrize("target", ["nowhere", "0.png/nowhere", None])
def test_broken_links(root, fails, place, target):
    link = root / place
    if target is None:
        link.symlink_to(link.name)  # to itself
        fails(link, "Too many levels of symbolic links", OSError)
    else:
        link.symlink_to(target)
        fails(link, rf"is a link to {target}, which does not exist; remove it")


def test_unreadable_folders(root, fails, monkeypatch):
    """By the error of the system; for an administrator, there are none."""
    scandir = os.scandir
    hidden = str(root / "train" / "a" / "sub")
    picture(root / "train" / "a" / "sub" / "0.png")

    def refusing(path):
        if str(path) == hidden:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    fails(hidden, "Permission denied", PermissionError)


def test_a_class_without_images(root, fails):
    for path in (root / "train" / "b").iterdir():
        path.rename(path.with_suffix(".txt"))
    fails(root / "train" / "b", r"the class folder .*b has no images; supported are files that end in \.jpg, ", OSError)


def test_the_same_as_torchvision(root):
    train = root / "train"
    for name in (
        "a/z.PNG",
        "a/10.png",
        "a/sub/0.png",
        "a/sub/deeper/0.jpeg",
        "a-b/0.png",
        "a/sub-2/x.webp",
        "b/.h.png",
    ):
        picture(train / name)
    (train / "a" / "notes.txt").touch()
    (train / "list.jpg").touch()  # beside the classes
    picture(root / "pool" / "p" / "0.png")
    (train / "a" / "pool").symlink_to(root / "pool")
    (train / "b" / "pool").symlink_to(root / "pool")
    (train / "b" / "one.png").symlink_to(root / "pool" / "p" / "0.png")
    (train / "c").symlink_to(root / "val" / "a")
    ours, theirs = ImageFiles(train, None), ImageFolder(train)
    assert ours.samples == theirs.samples
    assert (ours.classes, ours.class_to_idx, ours.targets) == (theirs.classes, theirs.class_to_idx, theirs.targets)
    assert class_names(train) == theirs.classes
    assert ours[3][0].tobytes() == theirs[3][0].tobytes()


def complaint_about(path):
    try:
        read_image(path)
    except OSError as error:
        return str(error)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:20] + b"\xff" * 8 + content[28:],
        lambda content: b"no image",
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff", "ppm"])
def test_damaged_images(tmp_path, suffix, damage):
    path = tmp_path / f"image.{suffix}"
    Image.radial_gradient("L").convert("RGB").save(path)
    whole = path.read_bytes()
    assert read_image(path).size == (256, 256)
    path.write_bytes(damage(whole))
    complaint = complaint_about(path)
    # A format without checksums may not notice.
    assert complaint is None or complaint.startswith(f"{path} cannot be read as an image (")
    assert complaint is not None or len(damage(whole)) == len(whole)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        read_image(path)
    os.mkfifo(path)
    with pytest.raises(OSError, match=rf"^{path} is not a file; remove it$"):
        read_image(path)


def test_a_damaged_image_is_named_in_a_batch(root):
    path = root / "val" / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    data = ImageFolderDataModule(root, image_size=(2, 2), num_workers=0)
    data.setup("validate")
    with pytest.raises(OSError, match=rf"^{path} cannot be read as an image \(.*\); replace or remove it$"):
        list(data.val_dataloader())
