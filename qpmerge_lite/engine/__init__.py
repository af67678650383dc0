"""A pass over a model: forwards of the real model in lockstep, and what its layers read on the
way. In the order of reading:

* ``views``, ``norms``, ``layers``: modules as layers that are linear in their parameters;
* ``lockstep``, ``pauses``, ``orders``, ``effects``, ``rerun``: forwards that take turns on one
  model, and what they leave behind;
* ``survey``, ``recording``, ``probes``, ``layouts``, ``lookups``: what a model does with a batch,
  and which rows of a layer belong to which token of which sequence, by which mask;
* ``gather``, ``reading``, ``rows``, ``sums``, ``products``: what layers read, added up;
* ``processes``, ``agreement``: several processes that do so together;
* ``recipes``, ``reasons``: how one merge of a pass is made, and why an entry was averaged.

:mod:`qpmerge_lite.sequential` runs it.
"""
