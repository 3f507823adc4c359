"""The documentation site: every public name is in the API reference, and faulty links are found."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[1]

#: All that `import lightning_acu` offers, and its rooms.
PUBLIC = [
    "lightning_acu", "lightning_acu.callbacks", "lightning_acu.callbacks.schedules", "lightning_acu.checkpoint",
    "lightning_acu.data", "lightning_acu.export", "lightning_acu.figures", "lightning_acu.functional",
    "lightning_acu.integrations", "lightning_acu.metrics", "lightning_acu.models", "lightning_acu.models.cifar",
    "lightning_acu.saving", "lightning_acu.saving.checkpoint", "lightning_acu.surgery", "lightning_acu.timm_convs",
    "lightning_acu.training",
]  # fmt: skip


def load(path, monkeypatch):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def api_pages(monkeypatch):
    return load(REPOSITORY / "docs" / "api_pages.py", monkeypatch)


@pytest.fixture
def check_links(monkeypatch):
    return load(REPOSITORY / "scripts" / "check_links.py", monkeypatch)


def pages_without_transformers(api_pages):
    return [page for page in api_pages.PAGES if page.file != "integrations"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference_once(api_pages, name):
    documented = [entry for page in pages_without_transformers(api_pages) for entry in api_pages.entries(page)]
    text = "".join(api_pages.text_of(page) for page in pages_without_transformers(api_pages))
    module = importlib.import_module(name)
    for public in module.__all__:
        value = getattr(module, public)
        if isinstance(value, ModuleType) or public == "__version__":
            continue
        paths = [path for path, other in documented if other is value]
        assert len(paths) == 1, f"{name}.{public} is in the API reference {len(paths)} times"
        directives = [f".. {kind}:: {paths[0]}\n" for kind in ("autoclass", "autofunction", "py:data")]
        assert sum(text.count(directive) for directive in directives) == 1


def test_each_public_module_is_on_a_page(api_pages):
    on_pages = {name for page in api_pages.PAGES for name, names in page.modules if names is None}
    assert set(PUBLIC) - {"lightning_acu"} <= on_pages


def test_pages_are_written_once(api_pages, tmp_path, monkeypatch):
    monkeypatch.setattr(api_pages, "PAGES", pages_without_transformers(api_pages))
    api_pages.write(tmp_path / "api")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "api").iterdir()}
    assert {"index.rst", "surgery.rst"} <= set(times)
    (tmp_path / "api" / "surgery.rst").write_text("changed")
    api_pages.write(tmp_path / "api")
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "api").iterdir()}
    assert {name for name in times if again[name] != times[name]} == {"surgery.rst"}


def test_hooks_of_callbacks_are_left_out(api_pages):
    (page,) = [page for page in api_pages.PAGES if page.file == "callbacks"]
    text = api_pages.text_of(page)
    logger = text[text.index(".. autoclass:: lightning_acu.callbacks.OffsetLogger") :]
    assert "on_train_batch_end" in logger.split(".. autoclass")[1].split(":exclude-members:")[1]


@pytest.mark.slow
def test_a_picture_of_the_gallery(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))  # it adds examples/
    load(REPOSITORY / "scripts" / "gallery.py", monkeypatch).main(
        ["--out", str(tmp_path), "--epochs", "2", "--only", "cross"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["cross.png"]
    assert "of the test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tag", "fault"),
    [
        ('<a href="other.html#there">', None),
        ('<a href="other.html">', None),
        ('<a href="#here">', None),
        ('<a href="https://example.org/x">', None),
        ('<img src="data:image/png;base64,AA">', None),
        ('<a href="other%20page.html">', "other%20page.html does not exist"),
        ('<a href="none.html">', "none.html does not exist"),
        ('<a href="other.html#gone">', "other.html#gone has no such anchor"),
        ('<a href="#gone">', "#gone has no such anchor"),
        ('<a href="../outside.html">', "../outside.html leads out of the site"),
        ('<script src="https://cdn.example.org/x.js"></script>', "is loaded from another host"),
        ('<link href="//fonts.example.org/x.css">', "is loaded from another host"),
        ('<img src="none.png">', "none.png does not exist"),
    ],
)
def test_faulty_links(check_links, tmp_path, capsys, tag, fault):
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "outside.html").write_text("")
    (site / "index.html").write_text(f'<h1 id="here">Here</h1>{tag}')
    (site / "other.html").write_text('<h1 id="there">There</h1>')
    found = check_links.faults(site)
    assert (found == []) if fault is None else (len(found) == 1 and fault in found[0])
    assert check_links.main([str(site)]) == len(found)


def test_a_folder_without_pages_is_a_fault(check_links, tmp_path):
    assert check_links.main([str(tmp_path)]) == 1
