"""Figures to play with, each beside a static one of ``figures``: data in, HTML for the notebook
out, with the data and what computes from them inside.

A script ``NAME.js`` belongs to the module ``NAME.py`` beside it. In the book the extension
``playing`` brings the library that they need, and ``embedding.js`` puts the figure into the place
of the static one that follows. Where that library is missing, the static one is what there is.
"""

from .explorer import explorer as explorer
from .explorer import turned as turned
from .plane import plane as plane
from .population import population as population
