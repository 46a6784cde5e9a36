from __future__ import annotations

import ast
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import fresh
import llm_surgeon
from llm_surgeon.records import LayerRecord
from llm_surgeon.report import plots
from llm_surgeon.report.plots import kept_by_kind, kept_fraction_png
from report.test_table import perplexity, sample_report, shot


def layer(block: int, kind: str, rows: int, columns: int = 10) -> LayerRecord:
    return LayerRecord(
        name=f"{block}.{kind}",
        block=block,
        kind=kind,
        rows=rows,
        columns=columns,
        rows_dense=10,
        columns_dense=10,
        weights=rows * columns,
    )


def test_kept_by_kind_has_a_row_per_kind_and_a_column_per_block() -> None:
    kinds, kept = kept_by_kind((layer(0, "q_proj", 5), layer(0, "fc", 10, 3), layer(2, "fc", 2, 5)))
    assert kinds == ["q_proj", "fc"]
    np.testing.assert_allclose(kept, [[0.5, np.nan, np.nan], [0.3, np.nan, 0.1]])


def test_experts_of_a_block_are_taken_together() -> None:
    _, kept = kept_by_kind((layer(0, "up_proj", 2), layer(0, "up_proj", 8)))
    np.testing.assert_allclose(kept, [[0.5]])


@pytest.mark.parametrize("measured", [True, False])
def test_png_shows_something(tmp_path: Path, measured: bool) -> None:
    path = tmp_path / "kept.png"
    changes = {} if measured else {"dense_perplexity": None, "shots": (shot(1, 0.5, None),)}
    kept_fraction_png(sample_report(**changes), path)
    picture = imread(path)
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1500
    left, right = np.array_split(picture[..., :3], 2, axis=1)
    assert len(np.unique(left.reshape(-1, 3), axis=0)) > 20  # the colours of the map
    has_line = bool((np.abs(right - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=-1) < 0.01).any())
    assert has_line == measured


@pytest.mark.usefixtures("real_python")
def test_plots_leave_pyplot_alone() -> None:
    code = "import sys, llm_surgeon.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("number_of_shots", "numbers"), [(2, ["16", "17", "20"]), (40, ["16", "1616"])])
def test_numbers_stand_at_all_points_or_at_the_ends_of_a_long_run(number_of_shots: int, numbers: list[str]) -> None:
    shots = tuple(shot(number, 1 - number / 50, perplexity(16.0 + number**2)) for number in range(1, 41))
    axes = Figure().subplots()
    plots.draw_perplexity(axes, sample_report(dense_perplexity=perplexity(16), shots=shots[:number_of_shots]))
    assert [text.get_text() for text in axes.texts] == numbers
    assert axes.get_yscale() == "log"
    assert axes.xaxis_inverted()


@pytest.mark.parametrize("dense", [True, False])
def test_one_shot_is_drawn_as_bars(dense: bool) -> None:
    changes = {} if dense else {"dense_perplexity": None}
    axes = Figure().subplots()
    plots.draw_perplexity(axes, sample_report(shots=(shot(1, 0.5, perplexity(24.68)),), **changes))
    assert not axes.lines
    assert [round(bar.get_height(), 2) for bar in axes.patches] == ([15.91, 24.68] if dense else [24.68])
    assert [text.get_text() for text in axes.texts] == (["15.91", "24.68"] if dense else ["24.68"])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == (["dense", "pruned"] if dense else ["pruned"])


CURVES = {
    "rising": [16.2, 17.1, 18.9, 22.4, 30.1],
    "better than dense": [15.1, 14.7, 14.4, 14.9, 15.8],
    "close to dense": [15.91, 15.9, 15.92, 15.9, 15.91],
    "ten shots": [16 + number**1.5 for number in range(10)],
    "back and forth": [40, 900, 20, 1e5, 300],
    "falling": [15.5, 15.0, 14.0, 13.0, 12.0],
    "close together": [15.92 + number / 100 for number in range(10)],
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("width", [5.0, 3.5])
def test_numbers_cover_neither_each_other_nor_markers_nor_the_legend(name: str, width: float) -> None:
    values = CURVES[name]
    shots = tuple(
        shot(number, 1 - 0.3 * number / len(values), perplexity(value)) for number, value in enumerate(values, 1)
    )
    with plots.own_style():
        figure = Figure(figsize=(width, 4.2), layout="constrained")
        canvas = plots.FigureCanvasAgg(figure)
        axes = figure.subplots()
        plots.draw_perplexity(axes, sample_report(shots=shots))
        canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert {"15.91", f"{values[-1]:.4g}"} <= {text.get_text() for text in axes.texts}
    assert len(boxes) > len(values) / 3
    assert not [1 for one, other in combinations(boxes, 2) if one.overlaps(other)]
    markers = axes.transData.transform(axes.lines[0].get_xydata())
    assert not [1 for box in boxes for x, y in markers if box.padded(3).contains(x, y)]
    legend = axes.get_legend().get_window_extent()
    frame = axes.get_window_extent()
    assert not legend.overlaps(frame)
    assert all(frame.contains(*corner) for box in boxes for corner in box.corners())


def test_a_nearly_flat_curve_does_not_fill_the_axis() -> None:
    axes = Figure().subplots()
    shots = (shot(1, 0.9, perplexity(15.92)), shot(2, 0.8, perplexity(15.9)))
    plots.draw_perplexity(axes, sample_report(shots=shots))
    low, high = axes.get_ylim()
    assert high / low > 1.15


DRAW = """
import os, sys
from llm_surgeon.report.plots import Figure, FigureCanvasAgg, own_style, mpl
with own_style():
    figure = Figure()
    FigureCanvasAgg(figure)
    figure.subplots().set_title("words")
    figure.savefig(sys.argv[1])
print(os.environ.get("MPLBACKEND"), mpl.rcParams["text.usetex"], mpl.rcParams.get("backend"))
"""


def drawn(tmp_path: Path, **environment: str) -> list[str]:
    """Draw in a fresh process, without a word on standard error; what matplotlib is set to afterwards."""
    path = tmp_path / "drawn.png"
    # A real one: settings are read when matplotlib is imported.
    command = [fresh.REAL, "-W", "error", "-c", DRAW, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert path.exists()
    return done.stdout.split()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", ""])
def test_a_backend_that_is_not_there_does_not_matter(tmp_path: Path, backend: str) -> None:
    assert drawn(tmp_path, MPLBACKEND=backend)[:-2] == backend.split()


def test_a_backend_stays_what_others_in_the_process_draw_with(tmp_path: Path) -> None:
    assert drawn(tmp_path, MPLBACKEND="svg") == ["svg", "False", "svg"]


@pytest.mark.parametrize("name", ["MPLCONFIGDIR", "HOME"])
def test_a_place_for_settings_that_cannot_be_made_does_not_matter(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    drawn(
        tmp_path, **{"XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": "", "MPLCONFIGDIR": ""} | {name: str(tmp_path / "file")}
    )


@pytest.mark.parametrize("settings", [b"\xff\xfe", b"no colon\nbackend: nonsense\naxes.titlesize: nonsense\n"])
@pytest.mark.parametrize("place", ["working directory", "MATPLOTLIBRC", "MPLCONFIGDIR"])
def test_broken_settings_do_not_matter(tmp_path: Path, settings: bytes, place: str) -> None:
    directory = tmp_path if place == "working directory" else tmp_path / "settings"
    directory.mkdir(exist_ok=True)
    (directory / "matplotlibrc").write_bytes(settings)
    drawn(tmp_path, **({} if place == "working directory" else {place: str(directory)}))


def test_settings_of_the_user_hold_for_the_user_only(tmp_path: Path) -> None:
    """There is no LaTeX where nothing but text is drawn."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: There is none\n")
    assert drawn(tmp_path, PATH="")[1] == "True"


def test_nothing_else_imports_matplotlib() -> None:
    source = Path(llm_surgeon.__file__).parent
    for path in source.rglob("*.py"):
        if path != source / "report" / "plots.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.split(".")[0] == "matplotlib" for name in names), path
