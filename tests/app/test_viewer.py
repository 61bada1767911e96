import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fasthessian.app.report.viewer import head, viewer
from fasthessian.results.records import Landscape
from tests.support.browser import MISSING, browser

ALPHAS = torch.linspace(-1, 1, 11, dtype=torch.float64)
BETAS = torch.linspace(-0.5, 0.5, 9, dtype=torch.float64)
HOLE = (9, 7)


def landscape(scale=1.0):
    losses = 0.01 + scale * ((ALPHAS[:, None] + 0.6) ** 2 + 4 * (BETAS + 0.25) ** 2)
    losses[HOLE] = math.nan
    return Landscape(ALPHAS, BETAS, losses)


def page(inside):
    return f"<!DOCTYPE html>\n<html><head><meta charset='utf-8'>{head()}</head><body>{inside}"


def numbers(html):
    return [json.loads(text) for text in re.findall(r"json'[^>]*>(\{.*?\})</script>", html)]


def test_the_losses_are_inside_and_holes_are_null():
    found = numbers(viewer({(): landscape()}, "A valley"))[0]
    assert (found["alphas"], found["betas"]) == (
        [round(x, 9) for x in ALPHAS.tolist()],
        BETAS.tolist(),
    )
    losses = np.array(found["losses"], dtype=float).reshape(11, 9)
    assert np.isnan(losses[HOLE]) and np.isfinite(losses).sum() == 98
    np.testing.assert_allclose(losses, landscape().losses, rtol=5e-5)


def test_the_middle_of_a_grid_is_zero_and_no_rounding_error():
    steps = torch.linspace(-0.5, 0.5, 15, dtype=torch.float64)
    assert steps[7] != 0
    html = viewer({(): Landscape(steps, steps, steps[:, None] ** 2 + steps**2)}, "A bowl")
    assert numbers(html)[0]["alphas"][7] == 0 and "at alpha = 0 and beta = 0" in html


@pytest.mark.parametrize(("level", "height"), [(2.302585, 1e-6), (1e-30, 1e-32), (-1e5, 3e-3)])
def test_a_flat_landscape_keeps_the_digits_that_distinguish_its_losses(level, height):
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    losses = level + height * (x[:, None] ** 2 + x**2)
    found = numbers(viewer({(): Landscape(x, x, losses)}, "Flat"))[0]["losses"]
    assert np.abs(np.array(found) - losses.flatten().numpy()).max() <= 1e-3 * height


def test_a_page_with_51_by_51_points_is_small_and_loads_nothing():
    x = torch.linspace(-1, 1, 51, dtype=torch.float64)
    losses = 10 ** torch.rand(51, 51, generator=torch.Generator().manual_seed(0)).double()
    text = page(viewer({(): Landscape(x, x, losses)}, "Rough"))
    assert len(text.encode()) < 60_000
    assert not re.search(r"\b(src|href)\s*=|url\(|@import|\bimport\b|fetch|XMLHttp|https?:", text)


def test_words_are_escaped():
    html = viewer({("<b>&",): landscape(), ("'c'",): landscape()}, "<i>", choices=["which <"])
    assert "<b>" not in html and "<i>" not in html and "'c'" not in html
    assert "<option>&lt;b&gt;&amp;</option>" in html and "which &lt;" in html


def test_a_picture_is_shown_without_scripts():
    html = viewer({(): landscape()}, "A valley", picture=b"\x89PNG")
    assert "<noscript><img alt='A valley' src='data:image/png;base64,iVBORw=='></noscript>" in html
    assert "noscript" not in viewer({(): landscape()}, "A valley")


@pytest.fixture(scope="module")
def window():
    if MISSING:
        pytest.skip(MISSING)
    with browser() as opened:
        opened.resize(700, 800)
        yield opened


class Shown:
    """The first viewer of a page in the browser."""

    def __init__(self, window, folder, html):
        self.window = window
        path = Path(folder) / "page.html"
        path.write_text(page(html), encoding="utf-8")
        window.open(path)
        self.settled()

    def run(self, body):
        before = "const figure = document.querySelector('figure'), viewer = figure.viewer;"
        return self.window.run(before + body)

    def settled(self):
        """The picture, as soon as nothing is waiting to be drawn."""
        return self.run(
            "return new Promise((done) => { const look = () => viewer.moving || viewer.waiting"
            " ? setTimeout(look, 20) : done(viewer.canvas.toDataURL()); setTimeout(look, 20); })"
        )

    def place(self, i, j):
        return self.run(
            "const box = viewer.canvas.getBoundingClientRect();"
            f"const [x, y] = viewer.screen({i}, {j}); return [box.x + x, box.y + y]"
        )

    def hover(self, i, j):
        self.window.mouse([self.place(i, j)])
        hidden, text = self.run("return [viewer.output.hidden, viewer.output.textContent]")
        return None if hidden else text

    def colours(self, points):
        """Red, green, blue and opacity of the picture, at points in pixels of the canvas."""
        return self.run(
            "const { width, height } = viewer.canvas, copy = viewer.canvas.cloneNode();"
            "const pen = copy.getContext('2d', { willReadFrequently: true });"
            "pen.drawImage(viewer.canvas, 0, 0);"
            "const { data } = pen.getImageData(0, 0, width, height);"
            f"return {json.dumps(points)}.map((point) => point.map(Math.round))"
            ".map(([x, y]) => [...data.slice(4 * (y * width + x), 4 * (y * width + x) + 4)])"
        )

    def press(self, name):
        before = self.settled()
        self.run(f"figure.querySelector('[data-do={name}]').click()")
        return before, self.settled()


@pytest.fixture
def shown(window, tmp_path):
    found = Shown(window, tmp_path, viewer({(): landscape()}, "A valley"))
    yield found
    assert window.log() == []
    assert window.run("return performance.getEntriesByType('resource').length") == 0


def test_the_mouse_turns_the_landscape(shown):
    before, (x, y) = shown.settled(), shown.place(5, 4)
    shown.window.mouse([(x, y), (x + 60, y + 10), (x + 120, y + 20)], pressed=True)
    assert shown.settled() != before
    yaw, pitch = shown.run("return [viewer.yaw, viewer.pitch]")
    assert (yaw, pitch) == pytest.approx((-0.6 + 1.2, 0.78 + 0.2))
    turned, again = shown.press("reset")
    assert again == before != turned


def test_the_pointer_shows_the_computed_loss_of_the_nearest_point(shown):
    for i, j in ((0, 0), (8, 6), (5, 7), (2, 5)):
        alpha, beta = round(float(ALPHAS[i]), 9) + 0.0, float(BETAS[j])
        loss = 0.01 + (alpha + 0.6) ** 2 + 4 * (beta + 0.25) ** 2
        assert shown.hover(i, j) == f"α = {alpha:.5g}\nβ = {beta:.5g}\nloss = {loss:.5g}"  # noqa: RUF001
    before = shown.settled()
    shown.window.mouse([(2, 2)])
    assert shown.run("return viewer.output.hidden") and shown.settled() != before


@pytest.mark.parametrize(("yaw", "j"), [(-0.6, 3), (math.pi - 0.6, 1)])
def test_what_is_in_front_hides_what_is_behind(shown, yaw, j):
    shown.run(f"Object.assign(viewer, {{ yaw: {yaw}, pitch: 0.1 }}); viewer.draw()")
    shown.settled()
    beta = float(BETAS[j])
    assert not shown.hover(2, j).startswith(f"α = -0.6\nβ = {beta}\n")  # noqa: RUF001


def test_a_loss_that_is_not_finite_is_a_hole(shown):
    shown.press("above")
    i, j = HOLE
    (x, y), (right, _) = (shown.run(f"return viewer.screen({k}, {j})") for k in (i - 1, i + 1))
    assert [colour[3] for colour in shown.colours([((x + right) / 2, y), (x - 20, y)])] == [0, 255]
    (x, y), (right, _) = shown.place(i - 1, j), shown.place(i + 1, j)
    shown.window.mouse([((x + right) / 2, y)])
    assert shown.run("return viewer.output.hidden")
    assert shown.hover(i - 3, j) is not None
    shown.run("Object.assign(viewer, { pitch: 0.2, zoom: 1 }); viewer.draw()")
    shown.settled()  # now its map is visible below the surface
    floor = "return viewer.projection()([...viewer.surface.position({}, {}), -0.85]).slice(0, 2)"
    points = [shown.run(floor.format(i - step, j)) for step in (0, 3)]
    assert [colour[3] for colour in shown.colours(points)] == [0, 255]
    assert "1 of 99 losses are not finite" in shown.run("return figure.innerText")


def test_from_above_the_colours_are_those_of_the_losses(shown):
    from matplotlib import colormaps

    shown.press("above")
    corners = [shown.run(f"return viewer.screen({i}, {j})") for i, j in ((0, 0), (10, 8))]
    assert corners[0][0] < corners[1][0] and corners[0][1] > corners[1][1]  # right and up
    losses = landscape().losses.log10()
    low, high = losses.nan_to_num(9).min(), losses.nan_to_num(-9).max()
    heights = ((losses - low) / (high - low)).numpy()
    inside = [(i, j) for i in range(1, 10) for j in range(1, 6) if (i, j) not in ((2, 2), (5, 4))]
    middles = [at for at in inside if 0.25 < heights[at] * 20 % 1 < 0.75]  # between two lines
    assert len(middles) > 10
    found = shown.colours([shown.run(f"return viewer.screen({i}, {j})") for i, j in middles])
    for at, colour in zip(middles, found, strict=True):
        wanted = colormaps["viridis"]((np.floor(heights[at] * 20) + 0.5) / 20)
        assert np.abs(np.array(colour) / 255 - wanted).max() < 0.03, at


def test_height_is_the_loss_or_its_logarithm(shown):
    assert shown.run("return viewer.unit") == "loss (log scale)"  # more than two decades
    losses = landscape().losses

    def heights(values):
        low, high = values.nan_to_num(9).min(), values.nan_to_num(-9).max()
        part = (values - low) / (high - low)
        return pytest.approx(part.flatten()[:60].tolist(), abs=1e-4)

    assert shown.run("return viewer.surface.t.slice(0, 60)") == heights(losses.log10())
    before, after = shown.press("log")
    assert before != after and shown.run("return viewer.unit") == "loss"
    assert shown.run("return viewer.surface.t.slice(0, 60)") == heights(losses)
    assert shown.press("log")[1] == before


def test_the_wheel_zooms_after_a_click_and_else_the_page_scrolls(shown):
    before, point = shown.settled(), shown.place(5, 4)
    shown.window.wheel(point, -300)
    assert shown.settled() == before
    shown.window.mouse([point, point], pressed=True)
    shown.window.wheel(point, -300)
    assert shown.run("return viewer.zoom") > 1.2
    assert shown.place(5, 4) == pytest.approx(point, abs=2)  # it stays below the pointer
    assert shown.press("reset")[1] == before


def test_the_keyboard_turns_and_zooms(shown):
    assert shown.run("viewer.canvas.focus(); return viewer.canvas.getAttribute('role')") == "img"
    assert "loss from 0.01" in shown.run("return viewer.canvas.getAttribute('aria-label')")
    for key in "\ue014\ue014\ue015+la":  # right, right, down
        shown.window.press(key)
    state = shown.run("return [viewer.yaw, viewer.pitch, viewer.zoom, viewer.log]")
    assert state == [0, math.pi / 2, 1.35, False]
    shown.window.press("r")
    shown.window.press("\ue012")  # left
    assert shown.run("return viewer.yaw") == pytest.approx(-0.68)


def test_the_canvas_follows_the_width_of_the_page(shown):
    shown.settled()
    assert shown.run("return viewer.canvas.width") > 600
    shown.run("document.body.style.width = '400px'")
    shown.settled()
    assert shown.run("return viewer.canvas.width") == 400
    assert shown.hover(2, 2).startswith("α")  # noqa: RUF001


def test_one_of_several_landscapes_is_chosen(window, tmp_path):
    keys = {("a", "2"): 2.0, ("b", "2"): 50.0, ("a", "1"): 1.0}
    parts = {key: landscape(scale) for key, scale in keys.items()}
    shown = Shown(window, tmp_path, viewer(parts, "Valleys", choices=["net", "epoch"]))

    def choose(which, word):
        shown.run(
            f"const list = figure.querySelectorAll('select')[{which}]; list.value = '{word}';"
            "list.dispatchEvent(new Event('change'))"
        )
        chosen = shown.run("return [...figure.querySelectorAll('select')].map((s) => s.value)")
        return tuple(chosen), shown.run("return viewer.surface.high")

    highest = {key: np.nanmax(part.losses.numpy()) for key, part in parts.items()}
    assert choose(0, "b") == (("b", "2"), pytest.approx(highest["b", "2"], rel=1e-4))
    # there is no ("b", "1"): what was changed decides
    assert choose(1, "1") == (("a", "1"), pytest.approx(highest["a", "1"], rel=1e-4))
    assert shown.run("return Math.max(...viewer.surface.t.filter(Number.isFinite))") == 1
    shown.press("common")
    assert shown.run("return Math.max(...viewer.surface.t.filter(Number.isFinite))") < 0.7
    assert window.log() == []


def test_a_trajectory_lies_on_the_surface(window, tmp_path):
    path = torch.tensor([[-0.8, -0.4, 0.0], [0.4, 0.0, 0.0]], dtype=torch.float64)
    parts = landscape(), dataclasses.replace(landscape(), trajectory=path)
    html = [viewer({(): part}, "A valley") for part in parts]
    assert numbers(html[1])[0]["trajectory"] == path.T.tolist()
    pictures = [Shown(window, tmp_path, text).settled() for text in html]
    assert pictures[0] != pictures[1] and window.log() == []
    height = window.run("return document.querySelector('figure').viewer.surface.at(-0.4, 0.0)[2]")
    assert 0 < height < 0.7


@pytest.mark.parametrize("losses", [0.5, -1.0, math.nan])
def test_a_landscape_without_heights_or_logarithm_is_shown(window, tmp_path, losses):
    made = Landscape(ALPHAS, BETAS, torch.full((11, 9), losses, dtype=torch.float64))
    shown = Shown(window, tmp_path, viewer({(): made}, "Flat"))
    assert shown.settled().startswith("data:image/png") and window.log() == []
    disabled = shown.run("return figure.querySelector('[data-do=log]').disabled")
    assert disabled == (not losses > 0)
