"""Which tensors of base and experts are one backbone, and which of them an expert has for itself.

Names and shapes of headers and what config.json says are enough: no model is built.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from ..adapters.fitting import ties_words
from ..adapters.reading import Adapter
from ..findings import ERROR, INFO, WARNING, Finding, shortened
from ..folders import Checkpoint
from .adapted import AdapterHead, head_of, names_of_changes, without_head
from .naming import Way, name_in, newer, part_of, relative, viewed, way_of
from .tasks import class_named, has_task, labels_of

AUTO, OWN, MERGED = "auto", "own", "merged"
WISHES = (AUTO, OWN, MERGED)
OPTION = "--heads"
OPTIONAL = ("pooler", "decoder")  # parts of a backbone that a class for a task may do without
LARGEST_HEAD = 0.25  # of the backbone's numbers; what is alike in all and larger is no head
TELL = "merge their backbones from Python, and keep the heads yourself"


@dataclass
class Backbone(Checkpoint):
    """The tensors of a base that all experts have too.

    Attributes:
        prefix: what their names begin with.
    """

    prefix: str = field(default="", kw_only=True)

    def has_part(self, name: str) -> bool:
        """Whether a name is that of a tensor in the same parts of the model."""
        return part_of(name, self.prefix) in self.parts

    @cached_property
    def parts(self) -> set[str | None]:
        """First parts of its tensors' names behind the prefix."""
        return {part_of(name, self.prefix) for name in self.entries}


@dataclass
class Split:
    """Checkpoints, split into a backbone and what each has for itself.

    Attributes:
        backbone: of the base.
        experts: with the tensors of the backbone alone, under the base's names.
        heads: expert's name -> the same folder with the other tensors alone, under its own names.
    """

    backbone: Backbone
    experts: list[Checkpoint]
    heads: dict[str, Checkpoint]


def split(
    base: Checkpoint, experts: Sequence[Checkpoint], wish: str
) -> tuple[Split | None, list[Finding]]:
    """The backbone and the heads, None where heads are merged like everything else; and what is to
    be known of that.

    Args:
        base, experts: that could be read.
        wish: ``own`` for heads of their own; ``merged`` for none; ``auto`` for heads of their own
            where an expert's head has another shape than the base's, or other labels.
    """
    if wish == MERGED:
        return None, []
    adapted = {e.name: head_of(e) for e in experts if isinstance(e, Adapter)}
    having = [expert for expert in experts if has_task(expert) or adapted.get(expert.name)]
    if not (having or wish == OWN):
        return None, []
    if not having:
        names = shortened(experts[0].config.get("architectures") or [type(experts[0]).__name__])
        cure = f"leave {OPTION} out: a language model's head is merged like everything else"
        return None, [Finding(ERROR, OPTION, "experts with heads of tasks", names, cure)]
    ways = {e.name: way_of(base, _names(e, adapted.get(e.name))) for e in having}
    alike = [_is_alike(base, adapted.get(e.name) or e, ways[e.name]) for e in having]
    if wish == AUTO and all(alike):
        cure = f"heads are merged like everything else; {OPTION} own keeps every expert's as it is"
        expected = "heads of other shapes or labels, which are the experts' own"
        return None, [Finding(INFO, "heads", expected, "the base's in every expert", cure)]
    findings = _not_to_be_split(experts, having, ways)
    if findings:
        return None, findings
    known = {name: way for name, way in ways.items() if way is not None}
    made = _split(base, having, known, adapted)
    return made, _large(base, made, known) + _tied(base, made.backbone) + _told(base, made)


def _names(expert: Checkpoint, head: AdapterHead | None) -> Collection[str]:
    """Names of an expert's tensors; of an adapter, of those that it changes besides its head."""
    if head is None or not isinstance(expert, Adapter):
        return expert.entries
    return names_of_changes(expert, head)


def _is_alike(base: Checkpoint, expert: Checkpoint, way: Way | None) -> bool:
    """Whether an expert's head is the base's, by class, shapes and, where it names some, labels.

    Args:
        expert: a whole model, or the head of an adapter.
    """
    if isinstance(expert, AdapterHead):
        same = {name: base.entries.get(name) for name in expert.entries}
        return all(e is not None and e.shape == expert.entries[n].shape for n, e in same.items())
    if class_named(base.config) != class_named(expert.config):
        return False
    if labels_of(base) != labels_of(expert):
        return False
    if way is None:  # nothing is told of its names but that they are others
        return True
    return _shapes_outside(base, way.base) == _shapes_outside(expert, way.own)


def _shapes_outside(checkpoint: Checkpoint, prefix: str) -> dict[str, tuple[int, ...]]:
    entries = checkpoint.entries.items()
    return {name: entry.shape for name, entry in entries if not name.startswith(prefix)}


def _not_to_be_split(
    experts: Sequence[Checkpoint],
    having: Sequence[Checkpoint],
    ways: Mapping[str, Way | None],
) -> list[Finding]:
    """Why there is no backbone with heads: an error for each expert."""
    findings = []
    for expert in experts:
        where = str(expert.folder)
        if not any(expert is other for other in having):
            expected = f"a head of a task, as {having[0].name!r} has one"
            is_adapter = isinstance(expert, Adapter)
            kind = "an adapter without one" if is_adapter else class_named(expert.config)
            cure = "give experts that all have heads, or backbones alone"
            place = f"{where}/{expert.config_file}"
            findings.append(Finding(ERROR, place, expected, kind or "no class", cure))
        elif ways[expert.name] is None:
            others = f"{shortened(expert.entries)}, of which it has none"
            expected = "a backbone under names of the base's"
            findings.append(Finding(ERROR, where, expected, others, TELL))
        if expert.name in (".", "..") or "/" in expert.name or "\\" in expert.name:
            cure = "give one: NAME=FOLDER"
            place = f"expert {expert.name!r}"
            findings.append(Finding(ERROR, place, "a name for a folder", "none", cure))
    return findings


def _split(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    ways: Mapping[str, Way],
    adapted: Mapping[str, AdapterHead | None],
) -> Split:
    prefix = next(iter(ways.values())).base
    there = {}
    for expert in experts:
        is_whole = not isinstance(expert, Adapter)
        own = ways[expert.name].own if is_whole else prefix  # whose entries are the base's
        there[expert.name] = _parts(expert, own)
    shared = _shared_parts(_parts(base, prefix), there.values(), bool(prefix))
    wanted = [name for name in base.entries if part_of(name, prefix) in shared]
    headers = viewed(base, {name: name for name in wanted}).headers
    backbone = Backbone(base.name, base.folder, base.config, headers, prefix=prefix)
    backbone.digests = base.digests
    made = Split(backbone, [], {})
    for expert in experts:
        layers = adapted.get(expert.name)
        if isinstance(expert, Adapter) and layers is not None:
            made.experts.append(without_head(expert, layers, backbone))
            made.heads[expert.name] = layers
            continue
        way, body, head = ways[expert.name], {}, {}
        for name in expert.entries:
            part = part_of(name, way.own)
            if part is None or part in OPTIONAL and part not in shared:
                head[name] = newer(name)
            else:
                meant = prefix + name.removeprefix(way.own)
                body[name] = name_in(base, meant) or meant
        made.experts.append(viewed(expert, body))
        made.heads[expert.name] = viewed(expert, head)
    return made


def _parts(checkpoint: Checkpoint, prefix: str) -> set[str]:
    return {name.partition(".")[0] for name in relative(checkpoint.entries, prefix)}


def _shared_parts(
    of_base: set[str], of_experts: Collection[set[str]], has_prefix: bool
) -> set[str]:
    """Parts of the base that are the backbone's: all but those that experts may lack.

    An expert may lack a pooler, or a decoder; and where the base's names have no prefix, its own
    head is a part among others, which no expert has.
    """
    shared = set()
    for part in of_base:
        count = sum(part in parts for parts in of_experts)
        is_own_head = count == 0 and not has_prefix
        if count == len(of_experts) or not (is_own_head or part in OPTIONAL):
            shared.add(part)
    return shared


def _large(base: Checkpoint, made: Split, ways: Mapping[str, Way]) -> list[Finding]:
    """An error where what seems to be a head is a part of the model that all have: its names have
    no prefix then."""
    alike = {}
    for name, entry in base.entries.items():
        same = [head.entries.get(name) for head in made.heads.values()]
        if all(other is not None and other.shape == entry.shape for other in same):
            alike[name] = prod(entry.shape)
    body = sum(prod(entry.shape) for entry in made.backbone.entries.values())
    if sum(alike.values()) <= LARGEST_HEAD * body:
        return []
    prefix = next(iter(ways.values())).own
    expected = f"a backbone whose names all begin with {prefix!r}"
    much = f"much beside it that base and experts share: {shortened(alike)}"
    return [Finding(ERROR, str(base.folder), expected, much, TELL)]


def _tied(base: Checkpoint, backbone: Checkpoint) -> list[Finding]:
    """An error for tensors that the merge would keep, and that are tied to some that it changes."""
    if not ties_words(base.config):
        return []
    tables = {e.shape for e in backbone.entries.values() if _has_words(e.shape, base.config)}
    others = [name for name in base.entries if name not in backbone.entries]
    tied = [name for name in others if base.entries[name].shape in tables]
    if not tied:
        return []
    expected = "a base that files a tied tensor once"
    cure = "load the base with transformers and save it again, or name its backbone alone"
    twice = f"{shortened(tied)} beside the embeddings that it is tied to"
    return [Finding(ERROR, str(base.folder), expected, twice, cure)]


def _has_words(shape: tuple[int, ...], config: Mapping) -> bool:
    return len(shape) == 2 and shape[0] == config.get("vocab_size")


def _told(base: Checkpoint, made: Split) -> list[Finding]:
    """What is to be known of tensors that are not merged."""
    findings = []
    for name, head in made.heads.items():
        own = f"{shortened(head.entries)} of its own, of {class_named(head.config)}"
        cure = f"they are kept as they are, in heads/{name} of the merge"
        expected = "the backbone's tensors"
        findings.append(Finding(INFO, str(head.folder), expected, own, cure))
    backbone, heads = made.backbone, made.heads
    beside = [name for name in base.entries if name not in backbone.entries]
    optional = [name for name in beside if part_of(name, backbone.prefix) in OPTIONAL]
    others = [name for name in beside if name not in optional]
    cure = "the merge has the base's, as they are"
    expected = "tensors that every expert's backbone has"
    for level, names in ((WARNING, optional), (INFO, others)):
        if names:
            lacking = f"{shortened(names)}, which not all of {', '.join(heads)} have"
            findings.append(Finding(level, str(base.folder), expected, lacking, cure))
    return findings
