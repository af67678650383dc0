"""The page of public names: all of them are there, from their docstrings, and formulae are set."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qpmerge_lite as q

BOOK = Path(__file__).parents[1] / "book"
CONF = f"""
import sys
sys.path.insert(0, {str(BOOK / "_ext")!r})
extensions = ["myst_parser", "api"]
myst_enable_extensions = ["dollarmath"]
html_theme, root_doc = "basic", "api"
nitpick_ignore_regex = [("py:class", ".*")]
"""
NEW = '''
import qpmerge_lite
def fresh(a):
    """A name that nobody has listed, |a| and b* or ``|c|``.

    Args:
        a: ``λ ≥ 0`` of :func:`qp`, see :func:`nowhere.secret`.
    Returns: ``a``, or ``code_of`` it.
    Raises: MergeError for none.
    """
qpmerge_lite.fresh = fresh
qpmerge_lite.__all__.append("fresh")
'''


@pytest.fixture
def page(tmp_path):
    """Build the book's own page beside stand-ins for the pages it links to; its HTML."""

    def build(more=""):
        (tmp_path / "conf.py").write_text(CONF + more, encoding="utf-8")
        for name in ("api", "glossary"):
            shutil.copy(BOOK / f"{name}.md", tmp_path)
        formulas = {"notation": "$$x$$ (eq-programme)", "claims": "", "engine": "$$y$$ (eq-blend)"}
        for name, formula in formulas.items():
            (tmp_path / f"{name}.md").write_text(f"---\norphan: true\n---\n# {name}\n\n{formula}\n")
        toc = "\n```{toctree}\nglossary\n```\n"
        (tmp_path / "api.md").write_text((BOOK / "api.md").read_text(encoding="utf-8") + toc)
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", str(tmp_path), "out"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return (tmp_path / "out" / "api.html").read_text(encoding="utf-8")

    return build


def test_every_public_name_is_on_the_page_and_a_new_one_comes_by_itself(page):
    html = page(NEW)
    assert "~torch" not in html and "factory" not in html
    found = re.findall(r'id="qpmerge_lite\.(\w+)"', html)
    assert sorted(found) == sorted([*q.__all__, "fresh"])
    rest = html[html.index("Everything else") :]
    assert "fresh" in rest and not set(re.findall(r'id="qpmerge_lite\.(\w+)"', rest)) - {"fresh"}
    assert r"\(\lambda \ge 0\)" in rest and "code_of</span>" in rest
    assert "|a| and b* or" in rest and "|c|</span>" in rest
    assert 'href="#qpmerge_lite.qp"' in rest and "nowhere.secret" in rest
    fields = re.findall(r"<dt class=\"field-\w+\">(\w+)", rest)
    assert fields == ["Arguments", "Returns", "Raises"]


@pytest.fixture
def formulas(monkeypatch):
    monkeypatch.syspath_prepend(str(BOOK / "_ext"))
    import formulas

    return formulas


@pytest.mark.parametrize(("plain", "tex"), [
    ("½ tr(D C Dᵀ)", r"\tfrac12 \operatorname{tr} (D C D^{\top})"),
    ("(L(W) - L(W*))/E ≥ 0", r"(L(W) - L(W^\ast))/E \ge 0"),
    ("τ_kᵀ τ_k / ‖τ_k‖²", r"\tau _{k}^{\top} \tau _{k} / \| \tau _{k}\| ^{2}"),
    ("Γ^-½ H Γ^-½", r"\Gamma ^{-\tfrac12} H \Gamma ^{-\tfrac12}"),
    ("(L_f - L)(d̂_{-f})", r"(L_{f} - L)(\hat d _{-f})"),
    ("Σ‖h_base\n    - h‖", r"\sum \| h_{\mathrm{base}} - h\|"),
    ("prior · Σ_k Δ_k", r"\mathrm{prior} \cdot \sum _{k} \Delta _{k}"),
    ("W - W0", r"W - W_{0}"),
    ("C", "C"),
])  # fmt: skip
def test_plain_formulae_become_tex(formulas, plain, tex):
    assert formulas.typeset(f"so ``{plain}`` is") == f"so :math:`{tex}` is"


@pytest.mark.parametrize("code", [
    "base", "l1", "qp", "FAMILIES", "1 - drop", "full_energy", "a.b", "(ridge, average)",
    "start:stop", "+", "0",
])  # fmt: skip
def test_code_stays_code(formulas, code):
    assert formulas.typeset(f"``{code}``") == f"``{code}``"


def docstrings():
    for name in q.__all__:
        value = getattr(q, name)
        members = [m for _, m in inspect.getmembers(value)] if inspect.isclass(value) else []
        for part in (value, *members):
            part = getattr(part, "fget", None) or getattr(part, "func", None) or part
            if str(getattr(part, "__module__", "")).startswith("qpmerge_lite"):
                yield name, inspect.getdoc(part) or ""


def test_no_sign_of_a_docstring_is_unknown(formulas):
    """TeX has no plain signs left; one that is missing belongs into ``formulas.LETTERS``."""
    set_ = [
        (n, m)
        for n, text in docstrings()
        for m in re.findall(r":math:`(.*?)`", formulas.typeset(text))
    ]
    assert len(set_) > 40
    assert [(name, tex) for name, tex in set_ if not tex.isascii()] == []
