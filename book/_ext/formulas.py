"""Formulae of docstrings, which are plain text such as ``½ tr(D C Dᵀ)``, as TeX."""

import re

LITERAL = re.compile(r"``(.+?)``", re.DOTALL)
LETTERS = {
    "Γ": r"\Gamma", "Δ": r"\Delta", "Σ": r"\sum", "Ω": r"\Omega", "α": r"\alpha", "β": r"\beta",
    "θ": r"\theta", "κ": r"\kappa", "λ": r"\lambda", "μ": r"\mu", "ρ": r"\rho", "τ": r"\tau",
    "φ": r"\varphi", "ω": r"\omega", "Ĉ": r"\hat C", "X̂": r"\hat X", "d̂": r"\hat d",
    "ρ̃": r"\tilde\rho", "½": r"\tfrac12", "·": r"\cdot", "≥": r"\ge", "≤": r"\le",
    "∞": r"\infty", "→": r"\to",
    "⌊": r"\lfloor", "⌋": r"\rfloor", "‖": r"\|", "⊂": r"\subset", "∘": r"\circ",
}  # fmt: skip
RAISED = {"ᵀ": r"\top", "⁺": "+", "⁻": "-", "¹": "1", "²": "2", "½": r"\tfrac12", "°": r"\circ"}
WORDS = {"tr", "diag", "cos", "sin", "mean"}  # operators; any other word is a word
SIGNS = re.compile("[Γ-ω½·≥≤‖ᵀ⁺⁻¹²°Ĉ]|d̂|ρ̃")
ASCII = re.compile(
    r"(?:(?<![A-Za-z])(?:[A-Z]?[A-Za-z]|W0|df)(?:_\w)?(?![A-Za-z])|(?<![A-Za-z])\d|[ ()*/+=-])+"
)
TOKEN = re.compile(
    r"(?P<raised>[ᵀ⁺⁻¹²°]+|\^-½)|(?P<number>\d+(?:\.\d+)?)|(?P<letter>d̂|X̂|ρ̃|[ĈΓ-ω½·≥≤∞→⌊⌋‖⊂∘])"
    r"|(?P<index>_[A-Za-z0-9]+|_\{[^}]*\})|(?P<word>[a-z]{2,})|(?P<name>[A-Za-z])|(?P<other>.)"
)


def is_formula(text):
    """Whether a literal is mathematics rather than code: it has a sign that no code has, or it is
    made of single letters, indices, numbers and operations."""
    if SIGNS.search(text):
        return True
    return bool(ASCII.fullmatch(text)) and bool(re.search(r"[A-Za-z]", text))


def tex(text):
    """TeX of a formula in plain text: indices after ``_``, powers and transposes as raised
    signs."""
    text = re.sub(r"\b([Wdθ])0\b", r"\1_0", " ".join(text.split()))
    parts = []
    for match in TOKEN.finditer(text):
        kind, piece = match.lastgroup, match[0]
        if kind == "raised":
            signs = "".join(RAISED[sign] for sign in piece.lstrip("^-"))
            parts.append(f"^{{{'-' if piece[0] == '^' else ''}{signs}}}")
        elif kind == "letter":
            parts.append(f"{LETTERS[piece]} ")
        elif kind == "index":
            parts.append(f"_{{{index(piece[1:].strip('{}'))}}}")
        elif kind == "word":
            parts.append(
                rf"\operatorname{{{piece}}} " if piece in WORDS else rf"\mathrm{{{piece}}}"
            )
        else:
            parts.append({"*": r"^\ast", "{": r"\{", "}": r"\}"}.get(piece, piece))
    return re.sub(r" +", " ", "".join(parts)).strip()


def index(text):
    """Letters of an index stand side by side, words upright."""
    return rf"\mathrm{{{text}}}" if text in ("in", "out", "base") else text


def typeset(text):
    """RST in which every literal that is a formula has become the role ``math``."""
    return LITERAL.sub(
        lambda match: f":math:`{tex(match[1])}`" if is_formula(match[1]) else match[0], text
    )
