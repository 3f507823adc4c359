"""The HTML page of learned shapes: its data are the model's, it stands alone, and in a browser it does what it says."""

import base64
import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_acu import ACUConv2d, acu_layers
from lightning_acu.figures import shapes_of
from lightning_acu.figures.page import Note, TableOf, shapes_page
from lightning_acu.view import view_model, view_run


class Reader(html.parser.HTMLParser):
    """Collects the tags with their attributes, and the text of the script that holds the data."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.data, self._inside = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id") == "data"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, text):
        if self._inside:
            self.data += text


def data_of(page):
    return json.loads(Reader(page).data)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        ACUConv2d(1, 4, 3, padding=1, position_groups=2),
        nn.ReLU(),
        ACUConv2d(4, 4, (3, 5), padding=(2, 4), dilation=2, position_groups=2),
    )
    with torch.no_grad():
        for _, layer in acu_layers(model):
            layer.offsets.uniform_(-1.5, 1.5)
    return model


def test_the_data_are_the_models_positions():
    model = network()
    first = {name: layer.starting_offsets().detach() for name, layer in acu_layers(model)}
    start = {name: layer.positions - layer.displacement for name, layer in acu_layers(model)}
    now = {name: layer.positions for name, layer in acu_layers(model)}
    data = data_of(view_model(model, title="a <title>", frames=[(0, start), (7, now)], input_size=(1, 16, 12)))
    assert (data["title"], data["steps"]) == ("a <title>", [0, 7])
    for shown, (name, layer) in zip(data["layers"], acu_layers(model), strict=True):
        assert (shown["name"], shown["groups"], shown["unit"]) == (name, 2, max(layer.dilation))
        assert shown["movable"] == layer.movable.tolist()
        taps = torch.tensor(shown["frames"], dtype=torch.float32).view(2, 2, -1, 2)
        torch.testing.assert_close(taps[0], start[name], rtol=0, atol=6e-4)
        torch.testing.assert_close(taps[1], now[name], rtol=0, atol=6e-4)
        distance = layer.displacement.norm(dim=-1)[:, layer.movable].mean().item()
        assert shown["moves"] == pytest.approx([0, distance], abs=6e-4)
        assert shown["reach"] > taps.abs().max()
        assert first[name].abs().max() == 0
    kinds = {part["title"]: part["kind"] for part in data["parts"]}
    assert kinds == {
        "How far taps moved": "curves", "Accuracy by stage": "note", "Effective receptive field": "fields",
        "Price of the fold": "table",
    }  # fmt: skip


def test_it_needs_nothing_outside_it_and_no_name_can_break_it():
    model = nn.ModuleDict({"</script><b>": nn.Sequential(ACUConv2d(1, 1, 3, padding=1))})
    page = shapes_page([(0, shapes_of(model))], title="</title> & more", parts=[Note("a", "<i>")])
    reader = Reader(page)
    assert not [tag for tag, attributes in reader.tags if attributes.keys() & {"src", "href"}]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert json.loads(reader.data)["layers"][0]["name"] == "</script><b>.0"
    assert [tag for tag, _ in reader.tags].count("script") == 2
    assert "<title>&lt;/title&gt; &amp; more</title>" in page
    assert "refresh" not in page
    assert '<meta http-equiv="refresh" content="10">' in shapes_page([(0, shapes_of(model))], title="a", refresh=10)


def test_large_films_are_thinned_and_many_groups_drawn_in_part():
    model = nn.Sequential(ACUConv2d(96, 96, 5, padding=2, groups=96, position_groups=96))
    (shape,) = shapes_of(model)
    frames = [(step, [replace(shape, positions=shape.positions + step / 1000)]) for step in range(201)]
    page = shapes_page(frames, title="many")
    data = data_of(page)
    assert len(page) < 5e6
    assert (data["layers"][0]["groups"], data["layers"][0]["allGroups"]) == (64, 96)
    assert (data["steps"][0], data["steps"][-1]) == (0, 200)
    assert len(data["steps"]) < 201
    assert f"{len(data['steps'])} of 201 moments are shown." in data["subtitle"]
    assert data["layers"][0]["frames"][-1][0] == pytest.approx([-1.8, -1.8])


def test_positions_that_are_not_finite_are_left_out():
    model = nn.Sequential(ACUConv2d(1, 1, 3, padding=1))
    with torch.no_grad():
        model[0].offsets[2] = torch.nan
    data = data_of(view_model(model, input_size=(1, 8, 8)))
    assert data["layers"][0]["frames"][0][1] is None
    assert None not in data["layers"][0]["frames"][0][2:]
    texts = {part["title"]: part["text"] for part in data["parts"]}
    assert texts["Effective receptive field"].startswith("Not known")


def test_errors():
    with pytest.raises(ValueError, match="has no active convolution"):
        view_model(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="there are no frames"):
        shapes_page([], title="a")


def test_what_is_not_known_says_what_would_give_it(tmp_path):
    texts = {part["title"]: part["text"] for part in data_of(view_model(network(), input_size=(1, 8, 8)))["parts"]}
    assert "OffsetLogger records" in texts["How far taps moved"]
    assert "--test_after_fit true" in texts["Accuracy by stage"]
    wrong = {part["title"]: part["text"] for part in data_of(view_model(network(), input_size=(5, 8, 8)))["parts"]}
    assert wrong["Price of the fold"].startswith("Not known")
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        view_run(tmp_path)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_the_slider_moves_the_taps_and_the_pointer_gets_numbers(tmp_path):
    model = network()
    start = {name: layer.positions - layer.displacement for name, layer in acu_layers(model)}
    now = {name: layer.positions for name, layer in acu_layers(model)}
    stages = {"final": {"accuracy": 0.75}}
    page = view_model(model, frames=[(0, start), (7, now)], stages=stages, input_size=(1, 16, 12))
    probe = """
      const found = {}, dot = document.querySelector("#shapes svg circle:not([fill=none])");
      const place = () => [+dot.getAttribute("cy"), +dot.getAttribute("cx"), byId("at").textContent];
      found.end = place();
      byId("step").value = 0; byId("step").dispatchEvent(new Event("input"));
      found.begin = place();
      dot.dispatchEvent(new PointerEvent("pointermove", { clientX: 300, clientY: 300 }));
      found.note = [byId("note").textContent, byId("note").style.display];
      found.panels = document.querySelectorAll("#shapes figure").length;
      found.curves = document.querySelectorAll("#more svg polyline[fill=none]").length;
      found.maps = document.querySelectorAll("#more canvas").length;
      found.cells = [...document.querySelectorAll("#more td")].slice(0, 2).map(cell => cell.textContent);
      found.wide = document.documentElement.scrollWidth <= innerWidth;
      document.body.innerHTML = btoa(JSON.stringify(found).replace(/[^\\x00-\\x7f]/g, "-"));
    """
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"<script>{probe}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(base64.b64decode(re.search(r"<body>(\S+?)\s*</body>", done.stdout)[1]))
    first = next(iter(now))
    assert found["end"] == [*(pytest.approx(x, abs=6e-4) for x in now[first][0, 0].tolist()), "step 7"]
    assert found["begin"] == [-1, -1, "step 0"]
    assert found["note"] == ["tap 0, position group 0\ny -1.00, x -1.00 px\nmoved 0.00 px", "block"]
    assert (found["panels"], found["curves"], found["maps"]) == (2, 4, 2)
    assert found["cells"] == ["final", "0.7500"]
    assert found["wide"]  # nothing is cut off on a phone


def test_a_table_keeps_its_cells():
    part = TableOf("t", "x", ["a", "b"], [["1", "2"]])
    shown = data_of(shapes_page([(0, shapes_of(network()))], title="a", parts=[part]))["parts"][-1]
    assert (shown["head"], shown["rows"]) == (["a", "b"], [["1", "2"]])
