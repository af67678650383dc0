"""The figures to play with: their scripts compute what the programme does, their library is
verified, and only pages that have one load it."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from bokeh.model import Model
from bokeh.models import ColumnDataSource

from qpmerge_lite.bases import build
from qpmerge_lite.companion import evidence
from qpmerge_lite.companion.book import interactive
from qpmerge_lite.companion.experiments import population, statistics, synthetic
from qpmerge_lite.companion.suites import digits
from qpmerge_lite.diagnostic import captured_energy, gap, spectral_capture
from qpmerge_lite.programme import programme

ROOT = Path(__file__).parents[1]
FOLDER = Path(interactive.__file__).parent
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the scripts")


def drawn(monkeypatch, name, *arguments):
    """The ``CustomJS`` that fills in a figure, with all that it is given."""
    module = import_module(f"{interactive.__name__}.{name}")
    monkeypatch.setattr(module, "shown", lambda name, draw, controls, *parts: draw)
    return getattr(module, name)(*arguments)


def plain(value):
    """What a script sees of a model, as plain values, with room for what it writes."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if not isinstance(value, Model):
        return value
    seen = {key: getattr(value, key) for key in ("value", "start", "end") if hasattr(value, key)}
    if isinstance(value, ColumnDataSource):
        seen["data"] = {key: np.asarray(column).tolist() for key, column in value.data.items()}
        seen["selected"] = {"indices": []}
    return seen | {"title": {}, "below": [{}], "x_range": {}, "y_range": {}}


def written(draw, **values):
    """All that a script was given, after it ran under node; ``values`` set widgets, those of
    ``choices`` too, and ``brushed`` what is selected."""
    given = {name: plain(value) for name, value in draw.args.items()}
    if "brushed" in values:
        given["merges"]["selected"]["indices"] = values.pop("brushed")
    for name, value in values.items():
        (given.get("choices", {}).get(name) or given[name])["value"] = value
    code = (
        f"const given = {json.dumps(given)};\n"
        "if (given.merges) given.merges.change = { emit() {} };\n"
        f"new Function(...Object.keys(given), {json.dumps(draw.code)})(...Object.values(given));\n"
        "console.log(JSON.stringify(given));"
    )
    done = subprocess.run(["node", "-"], input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def cells(html):
    """First cell of a table's line -> the others."""
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", html):
        first, *others = re.findall(r"<t[dh]>(.*?)</t[dh]>", row)
        found[re.sub(r"<[^>]+>|[^\w\s,.–λ=]", "", first).strip()] = others
    return found


def expected(chapter):
    """Values of the records that a build of a chapter is held to."""
    path = ROOT / "tests" / "expected" / "smoke" / f"{chapter}.json"
    return {id: entry["value"] for id, entry in json.loads(path.read_text("utf-8")).items()}


@cache
def layers():
    """Pooled moments and updates (K, m, n) of the layers of chapters 01 and 02."""
    torch.set_default_dtype(torch.float64)
    try:
        found = digits.load(), digits.load(((0, 1, 2, 3), (4, 5, 6), (7, 8, 9)))
        return [(layer.moments().pool(), layer.updates) for layer in found]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def plane(monkeypatch):
    """The script of chapter 01's figure, the moments and the updates."""
    pooled, updates = layers()[0]
    points = {"base": (0, 0), "expert 0–4": (1, 0), "soup": (0.5, 0.5)}
    axis, maps = [-0.4, 0.2, 0.8, 1.4], {}
    for title in ("loss", "accuracy"):
        maps[title] = axis, np.arange(16).reshape(4, 4) / 16, [0.25, 0.5]
    two = programme(pooled, build("layer", updates, pooled))
    draw = drawn(monkeypatch, "plane", two, maps, points, {"line": [(0, 0), (1, 1)]}, {"base": 0.5})
    return draw, pooled, updates


@needs_node
@pytest.mark.parametrize("d", [(0.5, 0.5), (0, 0), (-0.4, 1.4), (1.23, 0.07)])
def test_the_plane_tells_the_loss_and_the_certificate_of_the_programme(plane, d):
    draw, pooled, updates = plane
    found = written(draw, first=d[0], second=d[1])
    update = (torch.tensor(d, dtype=updates.dtype)[:, None, None] * updates).sum(0)[None]
    missing = gap(pooled, update, "layer", updates[:, None]) / pooled.energy
    told = f"{pooled.captured(update):.3f}", f"{missing:.3f}"
    assert tuple(re.findall(r"<b>(.*?)</b>", found["sentence"]["text"])) == told
    assert tuple(cells(found["table"]["text"])["your merge"][:2]) == told
    assert found["merge"]["data"] == {"d1": [d[0]], "d2": [d[1]]}


@needs_node
def test_the_plane_begins_with_the_records_of_its_chapter(plane):
    found, records = written(plane[0]), expected("01_programme")
    lines = cells(found["table"]["text"])
    for name, key in {"your merge": "soup", "soup": "soup", "base": "base"}.items():
        assert lines[name][0] == f"{records[f'programme.captured.{key}']:.3f}"
    assert (lines["base"][2], lines["soup"][2]) == ("0.500", "—")


@needs_node
def test_the_plane_reads_accuracy_at_the_nearest_node_and_names_the_place(plane):
    found = written(plane[0], first=0.9, second=0.1)
    assert cells(found["table"]["text"])["your merge"][2] == f"≈ {(4 * 1 + 2) / 16:.3f}"
    assert found["jump"]["value"] == "elsewhere"
    assert written(plane[0], first=1, second=0)["jump"]["value"] == "expert 0–4"


def test_a_basis_is_turned_from_rows_to_rotated_rows():
    pooled, updates = layers()[1]
    found = interactive.turned(updates, pooled)
    m = updates.shape[1]
    for kept in (1, 5, m):
        ends = {
            0: synthetic.top_rows(updates, pooled, kept),
            1: build("rotated_rows", updates, pooled, keep=kept),
        }
        for turn, basis in ends.items():
            place = int(np.flatnonzero(np.isclose(found.turns, turn))[0])
            rho = captured_energy(programme(pooled, basis))
            assert np.isclose(found.captured[place, kept - 1], rho, atol=1e-8)
            kappa = spectral_capture(pooled, basis.U)
            assert np.isclose(found.ceiling[place, kept - 1], kappa, atol=1e-8)
    assert (found.captured <= found.ceiling + 1e-9).all()


@needs_node
def test_the_explorer_begins_with_the_records_of_its_chapter(monkeypatch):
    pooled, updates = layers()[1]
    records = expected("02_bases")
    rows, turned = (f"{records[f'bases.captured.{name}']:.3f}" for name in ("rows", "rotated_rows"))
    draw = drawn(monkeypatch, "explorer", updates, pooled)
    text = written(draw)["sentence"]["text"]
    assert f"<b>{rows}</b> under a ceiling of <b>1.000</b>" in text
    assert f"rotated rows {turned} under 1.000" in text
    assert f"They capture <b>{turned}</b>" in written(draw, turn=1)["sentence"]["text"]


@needs_node
def test_the_explorer_shows_the_turn_and_the_number_that_its_sliders_say(monkeypatch):
    pooled, updates = layers()[1]
    found, draw = (
        interactive.turned(updates, pooled),
        drawn(monkeypatch, "explorer", updates, pooled),
    )
    shown = written(draw, turn=found.turns[7], keep=3)
    here = {name: values[0] for name, values in shown["here"]["data"].items()}
    assert here == {
        "turn": found.turns[7],
        "kept": 3,
        "captured": found.captured[7, 2],
        "ceiling": found.ceiling[7, 2],
    }
    assert shown["along_kept"]["data"]["captured"] == found.captured[7].tolist()
    assert shown["along_turn"]["data"]["ceiling"] == found.ceiling[:, 2].tolist()


@cache
def merges():
    """The committed merges of the trial, a table per suite."""
    found = {}
    for name in ("vision", "language"):
        part = evidence.gather(population.population, name, [0], repeat=False)
        found[name] = statistics.frame(part.rows)
    return found


@needs_node
def test_the_population_begins_with_the_records_of_its_chapter(monkeypatch):
    draw, records = (
        drawn(monkeypatch, "population", merges(), statistics.PRIMARY),
        expected("10_trial"),
    )
    lines = cells(written(draw)["table"]["text"])
    for name, table in merges().items():
        id = f"trial.{name}.{statistics.PRIMARY}"
        assert lines[name] == [
            str(len(table)),
            str(table.problem.nunique()),
            f"{records[f'{id}.within']:.2f}",
            f"{records[f'{id}.pooled']:.2f}",
        ]


@needs_node
@pytest.mark.parametrize("form", ["output.disjoint", "agreement.disjoint", "solved.in_sample"])
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"kind": "baselines"},
        {"method": "TIES"},
        {"size": "32"},
        {"suite": "vision", "kind": "programme"},
        {"between": [0.2, 0.6]},
        {"between": [-1, 0.5]},
    ],
    ids=str,
)
def test_the_population_correlates_what_is_chosen(monkeypatch, form, choice):
    """Ties, energies below what is drawn, and merges that lack a form of energy are among them."""
    tables, left = merges(), {}
    draw = drawn(monkeypatch, "population", tables, statistics.PRIMARY)
    shown = written(draw, energy=form, **choice)
    low, high = choice.get("between", (-1, 1))
    for name, table in tables.items():
        kept = table[form].notna() & ((table[form] >= low) | (low == -1))
        kept &= (table[form] <= high) | (high == 1)
        kinds = table["kind"].replace("neighbours", "baselines")
        columns = {"kind": kinds, "method": table.label, "size": table["size"].astype(str)}
        columns["suite"] = table.suite
        for column in columns.keys() & choice.keys():
            kept &= columns[column] == choice[column]
        left[name] = table[kept]
    assert sum(shown["wanted"]["booleans"]) == sum(map(len, left.values()))
    assert_correlated(cells(shown["table"]["text"]), left, form)


def assert_correlated(lines, tables, form):
    """Lines of the figure's table say what ``statistics`` does of the merges left by suite."""
    for name, table in tables.items():
        inside = statistics.inside(table, form) if len(table) else pd.Series(dtype=float)
        assert lines[name][:2] == [str(len(table)), str(len(inside))]
        overall = statistics.spearman(table[form], table.accuracy) if len(table) > 2 else np.nan
        for said, value in zip(
            lines[name][2:], (inside.mean() if len(inside) else np.nan, overall)
        ):
            assert said == "—" if np.isnan(value) else abs(float(said) - value) <= 0.005 + 1e-9


@needs_node
def test_the_population_correlates_what_is_brushed(monkeypatch):
    tables = merges()
    draw = drawn(monkeypatch, "population", tables, statistics.PRIMARY)
    lines = cells(written(draw, brushed=list(range(40, 120)))["table"]["text"])
    left = {"vision": tables["vision"].iloc[40:120], "language": tables["language"].iloc[:0]}
    assert_correlated(lines, left, statistics.PRIMARY)


def test_a_figure_is_hidden_without_its_library_and_asks_for_nothing():
    pooled, updates = layers()[1]
    html = interactive.explorer(updates, pooled).data
    assert re.match(r'<div id="play-explorer" class="play" style="[^"]*" hidden></div>', html)
    assert html.count("</script>") == 1 and html.endswith("</script>")
    assert not re.search(r"\b(?:src|href)=|https?://|@import|url\(", html)
    assert len(html) < 1_500_000


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.js")))
def test_a_script_stands_beside_its_module(name):
    """So that a change of it remakes the chapters that reach the module."""
    assert (FOLDER / f"{name}.py").is_file()


@pytest.fixture
def playing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))
    import playing

    return playing


def test_the_library_is_verified_and_put_beside_the_pages(playing, tmp_path):
    config = SimpleNamespace(html_static_path=["_static"])
    playing.install_scripts(SimpleNamespace(srcdir=tmp_path), config)
    assert config.html_static_path == ["_static", "_scripts"]
    folder = tmp_path / "_scripts" / "bokeh"
    assert {path.name for path in folder.iterdir()} == set(playing.SCRIPTS)
    for name in playing.SCRIPTS:
        assert (folder / name).read_bytes() == playing.packaged(name)


def test_a_library_with_another_hash_is_refused(playing, tmp_path, monkeypatch):
    monkeypatch.setattr(playing, "packaged", lambda name: b"something else")
    error = playing.offline.ExtensionError
    with pytest.raises(error, match="bokeh.min.js of bokeh: expected sha256"):
        playing.install_scripts(SimpleNamespace(srcdir=tmp_path), None)
    assert not (tmp_path / "_scripts").exists()


def test_only_a_page_with_a_figure_loads_the_library(playing, tmp_path):
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(playing.__file__).parent)!r})\n"
        "extensions = ['myst_parser', 'playing']\nhtml_theme = 'basic'\n"
    )
    figure = f"```{{raw}} html\n<div {playing.FIGURE} hidden></div>\n```\n"
    (tmp_path / "index.md").write_text(f"# Page\n\n```{{toctree}}\nother\n```\n\n{figure}")
    (tmp_path / "other.md").write_text('# Other\n\nIt says `class="play"` in words.\n')
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(tmp_path)]
    subprocess.run([*command, str(tmp_path / "out")], check=True, cwd=ROOT)
    pages = {name: (tmp_path / "out" / f"{name}.html").read_text() for name in ("index", "other")}
    for name in playing.SCRIPTS:
        assert re.search(rf'<script defer="defer" src="_static/bokeh/{name}', pages["index"])
        assert (tmp_path / "out" / "_static" / "bokeh" / name).is_file()
    assert "_static/bokeh" not in pages["other"]


@pytest.mark.book
def test_of_the_built_pages_those_with_a_figure_load_the_library_once(playing):
    pages = ROOT / "book" / "_build" / "html"
    with_figure = []
    for path in pages.rglob("*.html"):
        html = path.read_text(encoding="utf-8")
        has_figure = playing.FIGURE in html
        for name in playing.SCRIPTS:
            assert html.count(f"_static/bokeh/{name}") == has_figure, (path.name, name)
        with_figure += [path.stem] if has_figure else []
    assert sorted(with_figure) == ["01_programme", "02_bases", "10_trial"]
