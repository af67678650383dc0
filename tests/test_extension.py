"""The book's own Sphinx extension: a record becomes text, a missing one stops the build; MathJax is
verified or replaced."""

import hashlib
import re
import shutil
import tarfile
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from sphinx.cmd.build import main as sphinx

from qpmerge_lite.companion.records import Records

EXTENSIONS = Path(__file__).parents[1] / "book" / "_ext"


@pytest.fixture
def pages(tmp_path, monkeypatch, capsys):
    """A tiny Sphinx project with one record, and a function that builds a page of it."""
    Records("01_a", "smoke", tmp_path / "_records").record(
        "a.b", 0.125, n=8, seed=0, interval=(0.1, 0.15)
    )
    Records("01_a", "standard", tmp_path / "recorded").record("a.b", 0.5)
    (tmp_path / "conf.py").write_text("extensions = ['myst_parser', 'verdicts']\n")
    monkeypatch.syspath_prepend(EXTENSIONS)
    monkeypatch.setenv("QPMERGE_TIER", "smoke")  # whatever `make` was told

    def build(text):
        (tmp_path / "index.md").write_text(f"# Page\n\n{text}\n", encoding="utf-8")
        folders = [str(tmp_path), str(tmp_path / "out")]
        status = sphinx([*"-q -W --no-color -b html -D html_theme=basic".split(), *folders])
        html = tmp_path / "out" / "index.html"
        shown = html.read_text(encoding="utf-8") if html.is_file() else ""
        return status, capsys.readouterr().err, shown

    return build


def test_a_record_becomes_text_with_its_origin(pages):
    status, problems, html = pages(
        "{res}`a.b .3f ci` and {res}`a.b|pct` and {res}`standard:a.b .2f`"
    )
    assert (status, problems) == (0, "")
    origin = "a.b · tier smoke · n = 8 · seed = 0 · interval [0.1, 0.15]"
    assert f'title="{origin}">0.125 [0.100, 0.150]</abbr>' in html
    assert ">12.5%</abbr>" in html and ">0.50</abbr>" in html


def test_a_number_of_one_seed_says_that_it_has_no_interval(pages):
    status, problems, html = pages("{res}`standard:a.b .2f ci`")
    assert (status, problems) == (0, "")
    assert 'title="a.b · tier standard">0.50 (no interval)</abbr>' in html


@pytest.mark.parametrize(("text", "problem"), [
    ("{res}`a.gone`", "no record 'a.gone'; recorded ids that look alike: a.b"),
    ("{res}`a.b .3q`", "'.3q' is no number format"),
    ("{res}`paper:a.b`", "no records of tier 'paper'"),
])  # fmt: skip
def test_what_cannot_be_shown_stops_the_build(pages, text, problem):
    status, problems, html = pages(text)
    assert status != 0 and problem in problems and html == ""


CLAIMS = """
- {id: c, source: paper, about: bases, statement: It is so., records: [a.b], chapter: x,
   predicate: a.b > 0, rule: More than nothing., why: Nothing is nothing., measured: 'b {a.b .2f}'}
- {id: d, source: ours, about: bases, statement: Not asked.}
- {id: e, source: ours, about: energy, statement: It is more., records: [a.b], chapter: y,
   predicate: a.b > 0.4, rule: Much., why: So., measured: 'b {a.b .2f}', tier: standard}
"""


@pytest.fixture
def claims(pages, tmp_path):
    """The tiny project with claims, and the two chapters that decide them."""
    (tmp_path / "claims.yml").write_text(CLAIMS)
    (tmp_path / "chapters").mkdir()
    for name in ("x", "y"):
        (tmp_path / "chapters" / f"{name}.md").write_text("---\norphan: true\n---\n# A chapter\n")
    return pages


def test_claims_are_shown_one_by_one_with_rule_and_numbers_that_say_where_they_come_from(claims):
    status, problems, html = claims("```{claims}\n:source: paper\n```")
    assert (status, problems) == (0, "")
    assert "It is so." in html and "<strong>Verdict: holds.</strong>" in html
    assert "More than nothing." in html and "Nothing is nothing." in html
    assert "a.b" in html and ' id="claim-c"' in html and 'href="chapters/x.html"' in html
    assert 'title="a.b · tier smoke · n = 8' in html and ">0.12</abbr>" in html
    assert "Not asked." not in html


def test_claims_of_a_chapter_are_judged_by_their_own_tier(claims):
    status, problems, html = claims("```{claims}\n:chapter: y\n```")
    assert (status, problems) == (0, "") and "It is so." not in html
    assert 'title="a.b · tier standard"' in html and ">0.50</abbr>" in html
    assert "(tier standard, recorded)" in html and "<strong>Verdict: holds.</strong>" in html


def test_a_claim_about_one_seed_is_judged_by_its_value(claims, tmp_path):
    shown = CLAIMS.replace("'b {a.b .2f}', tier", "'b {a.b .2f ci}', tier")
    (tmp_path / "claims.yml").write_text(shown)
    status, problems, html = claims("```{claims}\n:chapter: y\n```")
    assert (status, problems) == (0, "") and "<strong>Verdict: holds.</strong>" in html
    assert ">0.50 (no interval)</abbr>" in html


def test_claims_in_short_as_counts_and_as_rules(claims):
    status, problems, html = claims("```{claims}\n:short:\n:about: bases\n```")
    assert (status, problems) == (0, "")
    assert "<strong>holds</strong>" in html and "<strong>not run</strong>" in html
    assert "abbr" not in html and "It is more." not in html
    status, problems, html = claims("```{claims}\n:counts:\n```")
    assert (status, problems) == (0, "") and "this book" in html and "It is so." not in html
    status, problems, html = claims("```{claims}\n:rules:\n:chapter: x\n```")
    assert (status, problems) == (0, "") and "More than nothing." in html
    assert "holds" not in html and "abbr" not in html


def test_the_table_can_be_narrowed_down_and_leads_to_the_rules(claims):
    """Every line has the classes that a choice in the form names; without a script the form is
    hidden and the table whole."""
    status, problems, html = claims("```{claims}\n:short:\n```\n\n```{claims}\n```")
    assert (status, problems) == (0, "")
    lines = re.findall(r"<tr class=\"(by-\w+ is-[\w-]+) row-\w+\"", html)
    assert lines == ["by-paper is-holds", "by-ours is-not-run", "by-ours is-holds"]
    values = re.findall(r"<option value=\"([^\"]+)\"", html)
    assert {name for line in lines for name in line.split()} <= set(values)
    assert '<form class="claims-filter" hidden>' in html and 'aria-live="polite"' in html
    assert html.count("<label>") == html.count("<select>") == 2
    for id in ("claim-c", "claim-d", "claim-e"):
        assert f'href="#{id}"' in html and f'id="{id}"' in html


def test_a_verdict_is_a_word_of_its_claim(claims):
    """Of several claims each word stands once."""
    status, problems, html = claims("A {verdict}`c`. B {verdict}`c d e`.")
    assert (status, problems) == (0, "")
    text = " ".join(re.sub(r"<[^>]+>", "", html).split())
    assert "A holds. B holds and not run." in text
    assert '<abbr class="verdict is-holds" title="More than nothing.">holds</abbr>' in html


def test_a_verdict_of_no_claim_stops_the_build(claims):
    status, problems, html = claims("{verdict}`c gone`")
    assert status != 0 and "claims.yml has no gone" in problems and html == ""


def test_the_picture_leads_to_the_claims_and_tells_where_their_numbers_come_from(claims):
    status, problems, html = claims("```{claims-picture}\n```")
    assert (status, problems) == (0, "")
    assert 'href="claims.html#claim-c"' in html and "claim-d" not in html
    assert "a.b · tier smoke · n = 8 · seed = 0 · interval [0.1, 0.15]" in html


def test_questions_are_printed_whole(pages, tmp_path):
    shutil.copy(EXTENSIONS.parent / "questions.yml", tmp_path)
    status, problems, html = pages("```{questions}\n```")
    assert (status, problems) == (0, "")
    shown = unescape(re.sub(r"<[^>]+>", " ", html)).replace("’", "'")
    text = " ".join(shown.split())
    content = yaml.safe_load((tmp_path / "questions.yml").read_text("utf-8"))
    for question in content["questions"]:
        assert question["question"] in text
        assert " ".join(question["predicate"].split()) in text


def test_a_record_of_an_earlier_state_names_that_state(pages, tmp_path):
    """It was run at tier standard, but is not what that tier says now."""
    shutil.copytree(tmp_path / "recorded" / "standard", tmp_path / "recorded" / "standard-0a1b2c")
    status, problems, html = pages("{res}`standard-0a1b2c:a.b .2f`")
    assert (status, problems) == (0, "") and 'title="a.b · tier standard-0a1b2c"' in html


def test_tiers_stand_side_by_side_and_a_missing_one_is_said_to_be(pages, tmp_path):
    status, problems, html = pages(
        "```{tiers} *.b\n```\n\n```{tiers} a.*\n:beside: paper standard\n:format: .2f\n```"
    )
    assert (status, problems) == (0, "")
    text = re.sub(r"<[^>]+>|\s+", " ", html)
    assert re.search(r"smoke +standard +a +0\.125 \[0\.100, 0\.150\] +0\.500 ", text), text
    assert re.search(r"standard +: cpu, \d{4}-\d\d-\d\d, torch ", text)
    assert re.search(
        r"smoke +paper +standard +b +0\.12 +not recorded +0\.50 +paper +: not recorded; +standard "
        r"+: cpu,",
        text,
    )


def test_the_tier_that_decides_may_come_first(pages, tmp_path):
    status, problems, html = pages("```{tiers} a.*\n:before: standard\n:format: .2f\n```")
    assert (status, problems) == (0, "")
    assert re.search(r"standard +smoke +b +0\.50 +0\.12 ", re.sub(r"<[^>]+>|\s+", " ", html))


def test_ids_are_read_in_the_words_of_the_book(monkeypatch):
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    import results

    assert results.called("best_neighbour") == "best baseline"
    assert results.called("qp_rotated_rows") == "QP rotated rows"


def test_tiers_need_the_built_one(pages, tmp_path):
    (tmp_path / "_records" / "smoke" / "01_a.json").unlink()
    status, problems, _ = pages("```{tiers} *.b\n```")
    assert status != 0 and "no records of tier 'smoke'" in problems


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    import offline

    return offline


def test_no_page_asks_for_a_style_sheet_that_is_not_there(offline):
    styles = [("sphinx-thebe.css", {}), ("book.css", {"priority": 500})]
    registry, events = SimpleNamespace(css_files=styles), SimpleNamespace(listeners={})
    offline.disconnect_thebe(SimpleNamespace(registry=registry, events=events))
    assert styles == [("book.css", {"priority": 500})]


def test_without_npm_the_pages_point_at_the_cdn(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(offline.shutil, "which", lambda name: None)
    config = SimpleNamespace(html_static_path=[])
    offline.install_scripts(SimpleNamespace(srcdir=tmp_path), config)
    addresses = [config.mathjax_path, *config.tippy_js]
    assert len(addresses) == len(offline.PACKAGES)
    for address, package in zip(addresses, offline.PACKAGES):
        assert address == f"https://cdn.jsdelivr.net/npm/{package.name}/{package.parts[0]}"


def test_icons_that_no_page_shows_are_left_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    import icons

    script = icons.WHOLE.joinpath("scripts", "fontawesome.js").read_text(encoding="utf-8")
    (tmp_path / "a.html").write_text('<i class="fas fa-sun"></i><i class="fa-solid fa-search"></i>')
    (tmp_path / "b.js").write_text('icon.className = "fa-solid fa-angle-left"')
    (tmp_path / "c.css").write_text(".fa-yelp {}")
    smaller = icons.without_others(script, icons.shown(tmp_path))
    left = {icon[1] or icon[2] for icon in icons.ICON.finditer(smaller)}
    assert left == {"sun", "magnifying-glass", "angle-left"}  # the second by its other name
    assert len(smaller) < 0.1 * len(script) and smaller.endswith(script[-2000:])


def test_licences_of_what_the_pages_carry_go_with_them(offline, tmp_path):
    offline.keep_licences(tmp_path)
    for name in offline.CARRIED:
        texts = [path.read_text(encoding="utf-8") for path in (tmp_path / name).iterdir()]
        assert any("Copyright" in text or "copyright" in text for text in texts), name


def test_what_npm_gave_is_loaded_from_the_book(offline, tmp_path, monkeypatch):
    """Folder and file, each in its place and nothing else."""
    packed = tmp_path / "package"
    for name in ("a/script.js", "a/more/one.js", "a/more/two.js", "left_out.js"):
        (packed / name).parent.mkdir(parents=True, exist_ok=True)
        (packed / name).write_text(name)
    archive = tmp_path / "given.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(packed, "package")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    package = offline.Package("given@1", found, "given", ("a/script.js", "a/more"))
    monkeypatch.setattr(offline, "_pack", lambda package, folder: archive)
    scripts = tmp_path / "_scripts"
    assert offline.address(package, scripts) == "given/a/script.js"
    kept = sorted(p.relative_to(scripts).as_posix() for p in scripts.rglob("*") if p.is_file())
    assert kept == ["given/a/more/one.js", "given/a/more/two.js", "given/a/script.js"]


def test_a_page_loads_no_script_because_it_lies_there(offline):
    """What was asked for stays, and is asked for once."""
    asked = [["reading.js", {"defer": "defer"}], ["bokeh/bokeh.min.js", {"defer": "defer"}]]
    found = ["reading.js", "claims.js", "mathjax/tex-svg.js", "mathjax/input/tex/extensions/ams.js"]
    config = SimpleNamespace(html_js_files=[*asked, *found])
    offline.load_what_is_asked_for(SimpleNamespace(), config)
    assert config.html_js_files == [*asked, "claims.js"]


def test_an_archive_with_another_hash_is_refused(offline, tmp_path, monkeypatch):
    archive = tmp_path / "mathjax-3.2.2.tgz"
    archive.write_bytes(b"something else")
    monkeypatch.setattr(offline, "_pack", lambda package, folder: archive)
    with pytest.raises(offline.ExtensionError, match="expected sha256"):
        offline.install_scripts(SimpleNamespace(srcdir=tmp_path), SimpleNamespace())
    assert not (tmp_path / "_scripts").exists()
