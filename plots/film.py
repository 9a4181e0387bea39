"""Films: all epochs of a split, with the same axes in every frame."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils
from plots.looks import new_figure, rgb
from plots.points import Scatter, add_legend, limits
from plots.saved import read_epoch


def draw_film(part: Path, directory: Path) -> None:
    """Draws all epochs of `directory` as a GIF."""
    from PIL import Image

    sources = [path for _, path in utils.epoch_files(directory, ["epoch_*.npz"])]
    corners = []
    for source in sources:  # one by one: all together may not fit into memory
        shown = read_epoch(source)
        corners.append(limits([shown]).T)
    axis_limits = np.stack([np.min(corners, axis=(0, 1)), np.max(corners, axis=(0, 1))], axis=1)
    figure, ((axes,),) = new_figure(6.4, 5.2, layout="compressed")
    figure.set_dpi(80)
    add_legend(axes, shown)
    scatter = Scatter(axes, shown, axis_limits)
    scatter.show(shown, str(shown["title"]))
    figure.draw_without_rendering()  # computes the layout, which is then frozen for all frames
    figure.set_layout_engine("none")
    colors = Image.new("P", (1, 1))
    colors.putpalette(film_palette(scatter.looks.colors).tobytes())

    def frame(source: Path) -> Image.Image:
        shown = read_epoch(source)
        scatter.show(shown, str(shown["title"]))
        figure.canvas.draw()
        drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        return drawn.quantize(palette=colors, dither=Image.Dither.NONE)

    frames = map(frame, sources)  # drawn one by one as Pillow asks for them
    milliseconds = min(max(12000 // len(sources), 100), 400)
    durations = [milliseconds] * (len(sources) - 1) + [3000]
    options = {"save_all": True, "append_images": frames, "duration": durations, "loop": 0}
    next(frames).save(part, format="GIF", **options)


def film_palette(colors: Sequence[str]) -> np.ndarray:
    """256 colours, uint8 (256, 3), for all frames of a film: greys, and tints of the colours."""
    values = rgb(colors)  # (C, 3)
    count = np.clip(240 // len(values), 1, 4)
    tints = np.linspace(1, 0.25, count)  # 1: the colour itself, 0: white
    mixed = 1 - tints[:, None, None] * (1 - values)
    greys = np.linspace(0, 1, 16).repeat(3).reshape(16, 3)
    shades = np.concatenate([greys, mixed.reshape(-1, 3)])[:256]
    return np.pad((255 * shades).round().astype(np.uint8), ((0, 256 - len(shades)), (0, 0)))
