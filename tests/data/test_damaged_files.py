"""Readers of files against damage: the right result or an error that names the file, and never more memory.

Whatever a reader is given, good files with flipped bits, pieces missing or added, or arbitrary bytes, it gives what the
good file holds, or raises one of the errors that it documents. The system limits the memory of the process meanwhile.
"""

import io
import json
import resource
import sys
import warnings
import zipfile

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from jsonargparse import get_loader
from PIL import Image

from lightning_acu.cli.config_files import with_bases
from lightning_acu.data import ZCAWhitening
from lightning_acu.data.image_files import read_image
from lightning_acu.data.npz import read_npz
from lightning_acu.data.whitening_cache import cached_whitening
from lightning_acu.ops.triton.tiles import read_tables

pytestmark = pytest.mark.slow

few = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", autouse=True)
def _little_memory():
    """1 GiB more than there is in use: an allocation of more fails, and no reader documents MemoryError."""
    if sys.platform != "linux":  # which alone says what is in use
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


RNG = np.random.default_rng(0)
ARRAYS = {
    "x_train": RNG.random((9, 5, 4)).astype(np.float32),
    "y_train": np.arange(9) % 2,
    "x_test": RNG.random((2, 5, 4)).astype(np.float32),
    "y_test": np.arange(2),
}


@st.composite
def damages(draw):
    """A function that damages bytes."""
    kind = draw(st.sampled_from(["flip", "flip", "overwrite", "cut", "cut off", "insert", "repeat"]))
    position, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40))
    bit, other = 1 << draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=16))

    def damage(content):
        at = int(position * len(content))
        before, after = content[:at], content[at:]
        return {
            "flip": before + bytes([after[0] ^ bit]) + after[1:],
            "overwrite": before + other + after[len(other) :],
            "cut": before + after[length:],
            "cut off": before,
            "insert": before + other + after,
            "repeat": before + after[:length] + after,
        }[kind]

    return damage


def damaged(content):
    """``content`` with one to three damages, or something else."""
    several = st.lists(damages(), min_size=1, max_size=3)

    def apply(all_of_them):
        result = content
        for damage in all_of_them:
            result = damage(result) or b"\0"
        return result

    return st.one_of(several.map(apply), several.map(apply), st.binary(max_size=300))


def outcome(read, path, errors):
    """What ``read`` gives, or None for one of the errors, which has to name the file."""
    try:
        return read(path)
    except errors as error:
        message = str(error)
    assert str(path) in message
    assert "is too large: " not in message  # for the memory: nothing here is
    return None


def archive(compress=False):
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **ARRAYS)
    return file.getvalue()


STORED, COMPRESSED = archive(), archive(compress=True)


def check_npz(path, content):
    path.write_bytes(content)
    arrays = outcome(read_npz, path, ValueError)
    if arrays is not None:
        assert all(
            torch.equal(array.squeeze(), torch.from_numpy(right))
            for array, right in zip(arrays, ARRAYS.values(), strict=True)
        )


@few
@given(content=st.one_of(damaged(STORED), damaged(COMPRESSED)))
def test_npz(tmp_path, content):
    check_npz(tmp_path / "images.npz", content)


@few
@given(
    descr=st.one_of(
        st.sampled_from(["'<f4'", "'|O'", "'<M8[s]'", "'V0'", "('<f4', (2, 2))", "[('a', '<f4')]"]), st.text(max_size=9)
    ),
    shape=st.one_of(
        st.lists(st.integers(-3, 2**70), max_size=4).map(tuple).map(str),
        st.lists(st.sampled_from([0, 1, 2, 4, 5, 9, 10, 2**40]), max_size=4).map(tuple).map(str),
        st.text("(),0123456789L-'[]{}:", max_size=20),
    ),
    version=st.sampled_from([(1, 0), (1, 0), (2, 0), (3, 0), (9, 9)]),
    content=st.binary(max_size=200),
)
def test_headers_of_arrays(tmp_path, descr, shape, version, content):
    """With the right checksums: nothing but the reader's own checks is left."""
    path = tmp_path / "images.npz"
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    size = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    file = io.BytesIO(STORED)
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            own = b"\x93NUMPY" + bytes(version) + size + text + content
            bad.writestr(name, own if name == "x_train.npy" else good.read(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # NumPy's, about files of Python 2
        assert outcome(read_npz, path, ValueError) is None or "(9, 5, 4)" in shape


IMAGES = torch.randint(0, 256, (12, 1, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@few
@given(data=st.data())
def test_whitening(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    fitted = ZCAWhitening.fit(IMAGES, torch.arange(12), bias=0.1, contrast_scale=55.0)
    cached_whitening(IMAGES, torch.arange(12), folder)
    (path,) = folder.iterdir()
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = cached_whitening(IMAGES, torch.arange(12), folder)
    assert torch.equal(again.mean, fitted.mean)
    assert torch.equal(again.matrix, fitted.matrix)
    assert all(str(warning.message).startswith(f"{path} is damaged (") for warning in caught)


CONFIG = b"""# An ordinary one
base: below.yaml
model: &model
  class_path: lightning_acu.ImageClassifier
  init_args: {model: acu_plain, num_classes: 3, rate: 1e-3, day: 2020-01-02, flag: !!bool yes}
other: {<<: *model, list: [*model, "text", 'more', ~, .inf, 0x1f, 1:30]}
text: |
  several
  lines
"""


def check_yaml(folder, content):
    (folder / "below.yaml").write_text("x: 1\n")
    path = folder / "top.yaml"
    path.write_bytes(content)
    files = outcome(with_bases, path, (OSError, ValueError))
    if files is None:
        return
    assert files in ([path], [folder / "below.yaml", path])
    # Whatever is taken can be written out.
    yaml.dump(get_loader("yaml")(path.read_text()))


@few
@given(content=damaged(CONFIG))
def test_yaml(tmp_path, content):
    check_yaml(tmp_path, content)


TAGS = [
    "int",
    "float",
    "bool",
    "null",
    "timestamp",
    "binary",
    "set",
    "omap",
    "pairs",
    "map",
    "seq",
    "str",
    "python/name:os",
    "x",
]


@few
@given(
    parts=st.lists(
        st.one_of(
            st.sampled_from(
                ["{", "}", "[", "]", ", ", ": ", "? ", "- ", "\n", "  ", "&a ", "*a ", "&b ", "*b ", "<<", "base"]
            ),
            st.sampled_from([f"!!{tag} " for tag in TAGS]),
            st.sampled_from(["=", "'", '"', "|\n", ">\n", "---", "...", "#", "%", "@", "\t", "\x00", "\ud800"]),
            st.sampled_from(["0o8", "0b_", "1:99", "2001-99-99", "-.inf", "1e999", "_", "y", "\N{SNOWMAN}"]),
        ),
        max_size=25,
    )
)
@example(parts=["x: ", "!!int ", "''"])
@example(parts=["{base: ", "below.yaml\0", "}"])
def test_words_of_yaml(tmp_path, parts):
    check_yaml(tmp_path, "".join(parts).encode("utf-8", "surrogatepass"))


TABLE = {"sm_90": {"tiles": {"product bfloat16 64x64": [64, 64, 32, 4, 1]}, "gemm_from": {"bfloat16": 256}}}


def check_tables(path, content):
    path.write_bytes(content)
    tables = outcome(read_tables, path, RuntimeError)
    for table in (tables or {}).values():
        for name, (m, n, k, warps, *stages) in table.get("tiles", {}).items():
            assert {m, n, warps} <= {2**i for i in range(11)}
            assert k in ({0} if name.startswith("channelwise ") else {2**i for i in range(4, 11)})
            assert all(0 < stage < 17 for stage in stages)
        assert all(isinstance(channels, int) and channels >= 0 for channels in table.get("gemm_from", {}).values())


@few
@given(content=damaged(json.dumps(TABLE).encode()))
def test_tiles(tmp_path, content):
    check_tables(tmp_path / "tiles.json", content)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.sampled_from([16, 64, 4]), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(
            st.sampled_from(["tiles", "gemm_from", "sm_90", "product x", "channelwise x"]), inner, max_size=3
        ),
    ),
)


@few
@given(content=JSON)
def test_other_json_than_tiles(tmp_path, content):
    check_tables(tmp_path / "tiles.json", json.dumps(content).encode())


def image():
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


PNG = image()


@few
@given(content=damaged(PNG))
def test_images(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd but readable files
        picture = outcome(read_image, path, OSError)
    assert picture is None or picture.mode == "RGB"
