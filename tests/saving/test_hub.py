"""Models as folders and on a hub: a server that answers as the Hugging Face Hub does stands in for it."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers.own_models import Net, build
from torch import nn

from lightning_acu import acu_layers, convert_to_acu, create_model, from_pretrained, push_to_hub, save_pretrained

IMAGE = torch.linspace(-1, 1, 2 * 3 * 12 * 17).view(2, 3, 12, 17)
KWARGS = {"width": 12, "classes": 4}


@pytest.fixture
def model():
    model = convert_to_acu(Net(**KWARGS), position_groups=2).eval()
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1, 1)
    return model


def same(model, loaded):
    state = loaded.state_dict()
    equal = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return equal and torch.equal(model(IMAGE), loaded(IMAGE))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


FILES = ["README.md", "config.json", "model.safetensors", "shapes.png"]


def test_a_folder_has_a_card_a_record_and_the_weights(model, tmp_path):
    folder = tmp_path / "deep" / "my-net"
    save_pretrained(model, folder, builder=build, kwargs=KWARGS)
    assert names(folder) == FILES
    assert names(folder.parent) == ["my-net"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "lightning_acu"
    assert config["lightning_acu"]["architecture"] == {"builder": "helpers.own_models:build", "kwargs": KWARGS}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lightning_acu\n")
    assert "\n# my-net\n\nNet with 2 of 3 convolutions active" in card  # one of 3x5 is plain
    assert "from helpers.own_models import build\n\nmodel = from_pretrained('my-net', builder=build)" in card
    assert "![Where the taps of each active layer are](shapes.png)" in card
    assert "cross" in card.partition("```text")[2]
    assert (folder / "shapes.png").read_bytes().startswith(b"\x89PNG")
    for arguments in ({"builder": Net}, {"trust_builder": True}, {"model": Net(**KWARGS).eval()}):
        for where in (folder, str(folder)):
            assert same(model, from_pretrained(where, **arguments))
    with pytest.raises(ValueError, match=r"'helpers.own_models:build' builds"):
        from_pretrained(folder)


@pytest.mark.slow
def test_a_named_architecture_needs_no_arguments(tmp_path):
    model = convert_to_acu(create_model("test_resnet", num_classes=3)).eval()
    save_pretrained(model, tmp_path / "net")
    card = (tmp_path / "net" / "README.md").read_text()
    assert "from_pretrained('net')" in card
    assert "builder" not in card
    assert same(model, from_pretrained(tmp_path / "net"))


def test_an_edited_card_and_other_files_are_kept(model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "data.csv").write_text("1")
    (tmp_path / "config.json").write_text("old")
    save_pretrained(model, tmp_path, builder=build, kwargs=KWARGS)
    assert names(tmp_path) == sorted([*FILES, "data.csv"])
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "lightning_acu" in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_is_written_whole_or_not_at_all(exists, model, tmp_path, monkeypatch):
    folder = tmp_path / "net"
    if exists:
        save_pretrained(model, folder, builder=build, kwargs=KWARGS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if exists else None

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("lightning_acu.saving.hub.write_card", full)
    model.cross.weight.data.zero_()
    with pytest.raises(OSError, match=r"disk full"):
        save_pretrained(model, folder, builder=build, kwargs=KWARGS)
    assert names(tmp_path) == (["net"] if exists else [])
    assert before == ({path.name: path.read_bytes() for path in folder.iterdir()} if exists else None)


def test_what_is_not_such_a_folder(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`repo_id_or_folder` .* is not a folder or .* a file model"):
        from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is not a folder or repository"):
        from_pretrained(tmp_path / "absent")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is damaged or was not written by save_acu"):
        from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"):
        save_pretrained(model, tmp_path / "file", builder=build, kwargs=KWARGS)


def test_a_record_nested_too_deeply_is_damage(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is damaged: maximum recursion depth"):
        from_pretrained(tmp_path)


HOSTILE = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"


@pytest.mark.parametrize("name", ["modeling.py", "model.py", "their_hub_module.py", "__init__.py"])
def test_nothing_in_a_hostile_folder_is_run(name, model, tmp_path, monkeypatch):
    save_pretrained(model, tmp_path, builder=build, kwargs=KWARGS)
    (tmp_path / name).write_text(HOSTILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    auto_map = {"AutoModel": f"{name.removesuffix('.py')}.Net"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "lightning_acu", "auto_map": auto_map, "lightning_acu": auto_map})
    )
    assert same(model, from_pretrained(tmp_path, builder=Net))
    with pytest.raises(ValueError, match=r"is code that would have to be imported. Nothing was"):
        from_pretrained(tmp_path)
    assert not (tmp_path / "imported").exists()


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that is used: create a repository, commit files, download them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files, self.commits, self.tokens = {}, [], set()
        self.address = f"http://127.0.0.1:{self.server_port}"


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            owner, name, kind, *_ = self.path.removeprefix("/api/models/").split("/")
            files = self.server.files.get(f"{owner}/{name}")
            if files is None:
                return self.answer(b"", 404, X_Error_Code="RepoNotFound")
            if kind == "tree":
                oid = "b" * 40
                return self.answer([{"type": "file", "path": k, "size": len(v), "oid": oid} for k, v in files.items()])
            return self.answer({"id": f"{owner}/{name}", "sha": "a" * 40})
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        files = self.server.files.get(repository)
        if files is None or name not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            return self.answer(b"", 404, X_Error_Code=code, X_Repo_Commit="a" * 40)
        etag = hashlib.sha256(files[name]).hexdigest()
        return self.answer(files[name], ETag=f'"{etag}"', X_Repo_Commit="a" * 40)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            name = "somebody/" + json.loads(body)["name"]
            self.server.files.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}"})
        if path == "/api/validate-yaml":  # of the model card
            return self.answer({"errors": [], "warnings": []})
        repository, _, rest = path.removeprefix("/api/models/").rpartition("/commit/")
        if not repository:  # how to upload each file: all of them inside the commit
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.commits.append((repository, rest, lines[0]["value"]["summary"]))
        for line in lines[1:]:
            self.server.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(
            {"commitUrl": f"{self.server.address}/{repository}/commit/{'a' * 40}", "commitOid": "a" * 40}
        )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_goes_to_a_hub_and_comes_back(hub, model, tmp_path):
    where = {"endpoint": hub.address, "token": "hf_mine"}
    url = push_to_hub(model, "my-net", builder=build, kwargs=KWARGS, commit_message="First", **where)
    assert url.startswith(f"{hub.address}/somebody/my-net/commit/")
    assert hub.commits == [("somebody/my-net", "main", "First")]
    assert hub.tokens == {"Bearer hf_mine"}
    assert sorted(hub.files["somebody/my-net"]) == FILES
    where["cache_dir"] = tmp_path
    loaded = from_pretrained("somebody/my-net", builder=build, **where)
    assert same(model, loaded)
    hub.files["somebody/my-net"]["README.md"] = b"edited"
    model.head.bias.data += 1
    push_to_hub(model, "my-net", builder=build, kwargs=KWARGS, endpoint=hub.address, token="hf_mine")
    assert hub.files["somebody/my-net"]["README.md"] == b"edited"
    again = from_pretrained(
        "somebody/my-net", model=Net(**KWARGS).eval(), endpoint=hub.address, cache_dir=tmp_path / "2"
    )
    assert same(model, again)
    with pytest.raises(ValueError, match=r"is code that would have to be imported. Nothing was"):
        from_pretrained("somebody/my-net", **where)


def test_errors_of_a_hub(hub, model, tmp_path):
    errors = pytest.importorskip("huggingface_hub.errors")
    with pytest.raises(errors.RepositoryNotFoundError):
        from_pretrained("somebody/absent", endpoint=hub.address, cache_dir=tmp_path)
    hub.files["somebody/other"] = {"config.json": b"{}"}
    with pytest.raises(FileNotFoundError, match=r"is not a folder or repository with a file model\.safetensors"):
        from_pretrained("somebody/other", endpoint=hub.address, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"builds: the out_channels of stem is 8 there"):
        push_to_hub(model, "my-net", builder=build, endpoint=hub.address, token="hf_mine")
    assert "somebody/my-net" not in hub.files
