"""The film of learned shapes, read back with Pillow."""
# ruff: noqa: RUF001 - × is meant

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lightning_acu import ACUConv2d
from lightning_acu.figures import animate_shapes, plot_shapes, shapes_of
from lightning_acu.figures.plot import Page
from lightning_acu.figures.shapes import common_reach


def film(model, count):
    """``count`` frames from the start to where the taps of ``model`` are."""
    shapes = shapes_of(model)
    return [
        (100 * i, [replace(s, positions=s.start + (s.positions - s.start) * (i / max(1, count - 1))) for s in shapes])
        for i in range(count)
    ]


def read(path):
    """(loop, sizes, durations in ms, frames as RGB arrays)"""
    with Image.open(path) as image:
        frames, durations, sizes = [], [], set()
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
            sizes.add(image.size)
            frames.append(np.asarray(image.convert("RGB"), dtype=float))
        return image.info.get("loop"), sizes, durations, frames


def test_frames_durations_and_what_moves(stack, tmp_path):
    path = animate_shapes(film(stack(5), 4), tmp_path / "shapes.gif", seconds=0.6, dpi=50)
    loop, sizes, durations, frames = read(path)
    assert path == tmp_path / "shapes.gif"
    assert loop == 0  # for ever
    assert len(sizes) == 1
    assert durations == [200, 200, 200, 1500]
    assert all((one != other).any() for one, other in pairwise(frames))


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_every_frame_is_the_figure_of_its_moment(groups, tmp_path):
    model = nn.Sequential(ACUConv2d(8, 8, 3, position_groups=groups), ACUConv2d(8, 8, 3, dilation=2))
    for layer in model:
        nn.init.normal_(layer.offsets, 0, 0.5)
    frames = film(model, 3)
    frames.append((900, [replace(s, positions=s.start + (s.positions - s.start).round()) for s in frames[-1][1]]))
    _, _, _, images = read(animate_shapes(frames, tmp_path / "shapes.gif", dpi=60))
    reach = max(common_reach(shapes) for _, shapes in frames)
    wholes = []
    for iteration, shapes in frames:
        # The whole film's legend and scale, but nothing else of it.
        page = Page([shapes, *(others for _, others in frames)], f"iteration {iteration:,}", reach, 60)
        page.figure.canvas.draw()
        wholes.append(np.asarray(page.figure.canvas.buffer_rgba())[..., :3].astype(float))
    for index, image in enumerate(images):
        differences = [np.abs(whole - image).max(-1) for whole in wholes]
        assert differences[index].max() < 80  # the nearest of a few colours; what an earlier frame left would be more
        assert np.argmin([difference.mean() for difference in differences]) == index
        assert all(difference.max() > 120 for other, difference in enumerate(differences) if other != index)
        assert (image[0, 0] == 255).all()  # white stays white


def test_a_frame_stores_only_what_changed(stack, tmp_path):
    """One tap of the first layer and one of the last, so that all that lies between them is in their bounding box."""
    shapes, frames = shapes_of(stack(5)), []
    for moment in range(9):
        moved = [shape.positions.clone() for shape in shapes]
        for index in (0, -1):
            moved[index][..., 0, :] += 0.1 * moment
        frames.append((7, [replace(shape, positions=at) for shape, at in zip(shapes, moved, strict=True)]))
    still, film = (len(animate_shapes(some, tmp_path / "a.gif").read_bytes()) for some in (frames[:1], frames))
    assert film < 1.5 * still


def test_text_follows_the_frame():
    layer = ACUConv2d(1, 1, 3)
    nn.init.constant_(layer.offsets, 1.0)
    frames = film(layer, 3)
    page = Page([shapes for _, shapes in frames], "iteration 0", 2.75)
    page.show(frames[1][1], "iteration 12,300")
    texts = [artist.get_text() for artist in page.moving if hasattr(artist, "get_text")]
    assert "mean move 0.71 px" in texts
    assert "iteration 12,300" in texts


def test_taps_that_meet_on_the_way_are_marked_then_only():
    layer = ACUConv2d(1, 1, 3)
    layer.offsets.data[1] = 1.0
    [shape] = shapes_of(layer)
    apart = replace(shape, positions=shape.start[None])
    page = Page([[apart], [shape], [apart]], "iteration 0", 1.75)
    marks = []
    for shapes in ([apart], [shape], [apart]):
        page.show(shapes, "iteration 1")
        marks.append([text.get_text() for text in page.figure.axes[0].texts if "×" in text.get_text()])
    assert marks == [[], ["×2"], []]


def test_a_single_frame_is_a_still(tmp_path):
    path = animate_shapes(film(ACUConv2d(1, 1, 3), 1), str(tmp_path / "shapes.GIF"), dpi=40)
    with Image.open(path) as image:
        assert image.format == "GIF"
        assert image.n_frames == 1


def test_frames_are_not_shorter_than_browsers_play_them(tmp_path):
    layer = ACUConv2d(1, 1, 3)
    nn.init.constant_(layer.offsets, 1.0)
    _, _, durations, _ = read(animate_shapes(film(layer, 4), tmp_path / "shapes.gif", seconds=0.001, dpi=30))
    assert durations == [20, 20, 20, 1500]


def test_a_film_has_the_scale_of_its_widest_frame_and_lost_taps_do_not_stop_it(tmp_path):
    layer = ACUConv2d(1, 1, 3)
    nn.init.constant_(layer.offsets, 1.0)
    frames = film(layer, 3)
    lost = frames[1][1][0].positions.clone()
    lost[0, 0], lost[0, 1] = torch.nan, torch.inf
    frames[1] = (100, [replace(frames[1][1][0], positions=lost)])
    _, sizes, _, images = read(animate_shapes(frames, tmp_path / "shapes.gif", dpi=40))
    assert len(images) == 3
    figure = plot_shapes(frames[-1][1], title="iteration 200")
    assert figure.axes[0].get_xlim() == (-2.75, 2.75)
    assert common_reach(frames[0][1]) == 1.75
    [(width, height)] = sizes
    assert width == int(figure.get_figwidth() * 40)
    assert height > 100


def test_errors(tmp_path):
    frames = film(nn.Sequential(ACUConv2d(1, 1, 3), ACUConv2d(1, 1, 3)), 2)
    path = tmp_path / "shapes.gif"
    with pytest.raises(ValueError, match=r"`frames` \(=\[\]\) must hold at least one"):
        animate_shapes([], path)
    with pytest.raises(ValueError, match="`frames` has no layers at iteration 3"):
        animate_shapes([(3, [])], path)
    with pytest.raises(ValueError, match=r"iteration 700 differs from iteration 0 in \['1'\]"):
        animate_shapes([*frames, (700, frames[0][1][:1])], path)
    with pytest.raises(ValueError, match=r"iteration 700 differs from iteration 0 in \['0', '1', 'ACUConv2d'\]"):
        animate_shapes([*frames, (700, shapes_of(ACUConv2d(1, 1, 5)))], path)
    with pytest.raises(ValueError, match="iteration 700 differs from iteration 0 in the order of the layers"):
        animate_shapes([*frames, (700, frames[0][1][::-1])], path)
    with pytest.raises(ValueError, match=r"`seconds` \(=0\) must be positive"):
        animate_shapes(frames, path, seconds=0)
    with pytest.raises(ValueError, match=r"`dpi` \(=0\) must be at least 1"):
        animate_shapes(frames, path, dpi=0)
    with pytest.raises(ValueError, match=r"`path` \(='.*shapes.mp4'\) must end in .gif"):
        animate_shapes(frames, tmp_path / "shapes.mp4")
    assert not list(tmp_path.iterdir())
