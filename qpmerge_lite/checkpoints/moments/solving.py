"""Merges by files of moments: no data, no class of a model, and one group of layers in memory at a
time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...engine.layers import covers
from ...engine.norms import Norm
from ...engine.recipes import Recipe
from ...engine.views import Convolution, Dense, Table, Transposed, View
from ...errors import MergeError
from ...experts import State, check_experts, stored
from ...merge import Merge, average
from ...methods import RECIPES
from ..findings import Refused
from ..folders import Checkpoint
from ..methods import function_of
from ..tensors import Entries, read_tensors
from ..weights_only import located
from .files import Layer, MomentsFile
from .grams import Gram, added, moments_of, moments_of_table, on_tokens, read_gram, union

ONE_VERSION = "measure both again, with one version of this package and of transformers"
VIEWS: dict[str, type[View]] = {
    "Dense": Dense,
    "Transposed": Transposed,
    "Convolution": Convolution,
    "Norm": Norm,
    "Table": Table,
}


def recipe_of(
    method: str, options: Mapping[str, object], files: Mapping[str, Sequence[MomentsFile]]
) -> Recipe:
    """How a method makes a merge on the experts' own inputs: in the folds of the files, or in one,
    for which these are added up.

    Args:
        files: expert's name -> its files of moments.
    Raises: Refused for files of other folds than each other; what the method raises for its
        options.
    """
    every = [file for of_expert in files.values() for file in of_expert]
    first = every[0]
    if method == "qp":
        options = {"folds": first.folds, **options, "inputs": "expert"}
    recipe = RECIPES[function_of(method)](**options)
    for file in every if recipe.folds > 1 else ():
        if file.folds != recipe.folds:
            expected = f"{recipe.folds} folds, as --option folds or {first.path} has"
            cure = "measure all with as many, or add them up: --option folds=1 --option ridge=0.1"
            raise Refused(file.path, expected, f"{file.folds}", cure)
    return recipe


def merged_layers(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    files: Mapping[str, Sequence[MomentsFile]],
    method: str,
    options: Mapping[str, object],
) -> Iterator[Merge]:
    """One merge for every layer that is solved, and one for every other tensor, which averages it;
    together they have all tensors of the base.

    A layer is solved where every expert has sums of it; several files of an expert are added.

    Args:
        files: expert's name -> its files of moments, which fit the base.
    Raises: Refused for sums that are those of no data; what the method raises, with the files that
        tensors were read from.
    """
    recipe = recipe_of(method, options, files)
    merging = Merging([base, *experts], files, recipe)
    solved = set[str]()
    for name in merging.layers:
        merge = merging.merged(name)
        solved |= merge.state_dict.keys()
        yield merge
    for name in base.entries:
        if name not in solved:
            yield Merge(merging.averages([name]))
    reasons = merging.reasons()
    yield Merge({}, averaged={name: reasons[name] for name in reasons if name not in solved})


class Merging:
    """A merge by a recipe, layer by layer.

    Args:
        checkpoints: the base, then the experts.
        files: expert's name -> its files of moments.
    Attributes:
        layers: names of those that are solved.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        files: Mapping[str, Sequence[MomentsFile]],
        recipe: Recipe,
    ):
        self.checkpoints, self.files, self.recipe = checkpoints, files, recipe
        self._cached: tuple[list, list[Gram]] = [], []  # the last sums, and what they are of
        # layer -> expert -> the files that have sums of it
        self._holders: dict[str, dict[str, list[MomentsFile]]] = {}
        for expert, of_expert in files.items():
            for file in of_expert:
                for name in file.layers:
                    self._holders.setdefault(name, {}).setdefault(expert, []).append(file)
        self._check_alike()
        self.layers = [name for name in self._holders if self._obstacle(name) is None]
        for name in recipe.layers or ():
            if name not in self.layers:
                expected = f"layers of scope {recipe.scope!r} that all files of moments have"
                cure = f"choose from {', '.join(self._holders)}"
                raise Refused("--option layers", expected, repr(name), cure)

    def _check_alike(self) -> None:
        """Refused where files describe one layer in different ways, sums of which do not add."""
        for name, by_expert in self._holders.items():
            first = next(iter(by_expert.values()))[0]
            reference = replace(first.layers[name], sums="")
            for file in (file for files in by_expert.values() for file in files):
                layer = replace(file.layers[name], sums="")
                if layer != reference:
                    expected = f"it as {first.path} has it ({reference})"
                    raise Refused(f"{file.path}, layer {name!r}", expected, f"{layer}", ONE_VERSION)

    def _described(self, name: str) -> Layer:
        """A layer as the first file that has it describes it."""
        return next(iter(self._holders[name].values()))[0].layers[name]

    def _obstacle(self, name: str) -> str | None:
        """Why a layer is averaged; None where it is solved."""
        layer, recipe = self._described(name), self.recipe
        for expert, (first, *_) in self.files.items():
            if expert not in self._holders[name]:
                reason = first.averaged.get(layer.names[0], "it has no sums")
                return f"not measured for {expert!r}: {reason}"
        if recipe.layers is not None and name not in recipe.layers:
            return "not among the layers asked for"
        return None if covers(VIEWS[layer.kind], recipe.scope) else self._outside

    @property
    def _outside(self) -> str:
        return f"outside the scope {self.recipe.scope!r}"

    def reasons(self) -> dict[str, str]:
        """Entry of the files -> why it is averaged, if it is."""
        reasons: dict[str, str] = {}
        for of_expert in self.files.values():
            reasons |= of_expert[0].averaged
        for name in self._holders:
            names = self._described(name).names
            reasons |= dict.fromkeys(names, self._obstacle(name) or self._outside)
        return reasons

    def _states(self, names: Mapping[str, str]) -> tuple[State, Mapping[str, State]]:
        """Some tensors of the base, and of each expert in the base's dtypes.

        Args:
            names: what a tensor is to be called -> what it is called in the files.
        Raises: MergeError with the files, for tensors that are not finite.
        """
        read = []
        for checkpoint in self.checkpoints:
            tensors = read_tensors(checkpoint, names.values())
            read.append({name: tensors[of_file] for name, of_file in names.items()})
        origin, *states = read
        by_name: dict[str, State] = dict(zip(self.files, states))
        try:
            return origin, check_experts(Entries(origin), by_name, cast=True)
        except MergeError as error:
            raise located(error, self.checkpoints, [*names]) from error

    def averages(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Means over the experts of some tensors, by their names in the files."""
        origin, states = self._states({name: name for name in names})
        return average(Entries(origin), states)

    def merged(self, name: str) -> Merge:
        """One layer, solved."""
        layer, grams = self._described(name), self._grams(name)
        names = [of_files[0] for of_files in layer.parameters.values()]
        shape = self.checkpoints[0].entries[names[0]].shape
        view = view_of(layer, self.recipe.scope, shape, union([gram.ids for gram in grams]))
        origin, states = self._states(dict(zip(view.parameters, names)))
        start = view.matrix(origin)
        updates = torch.stack([view.matrix(state) - start for state in states.values()])
        update, facts = self._solved(view, grams, updates)
        entries = view.parts(start + update, average(Entries(origin), states))
        merged: dict[str, Tensor] = {}
        for parameter, value in entries.items():
            where = f"layer {name!r}, merged parameter {parameter!r}"
            value = stored(where, value, origin[parameter])
            merged |= dict.fromkeys(layer.parameters[parameter], value)
        return Merge(merged, [{"layer": name, **facts}])

    def _solved(self, view: View, grams: Sequence[Gram], updates: Tensor) -> tuple[Tensor, dict]:
        """Merged update (g, m, n) of a layer and its table row, for updates (T, g, m, n)."""
        tasks, n = list(self.files), updates.shape[-1]
        full_energy = self.recipe.keeps_full_energy
        if isinstance(view, Table):
            occurrences = torch.stack([on_tokens(gram, view.ids).C[..., 0, 0] for gram in grams])
            moments = moments_of_table(
                view.name, tasks, occurrences, updates, full_energy=full_energy
            )
        else:
            moments = moments_of(
                view.name,
                tasks,
                torch.stack([gram.C[..., :n, :n] for gram in grams]),
                torch.stack([gram.counts for gram in grams]),
                updates,
                full_energy=full_energy,
                rtol=max(gram.rtol for gram in grams),
            )
        return self.recipe.solver(moments, updates)  # type: ignore[misc]  # methods have one

    def _grams(self, name: str) -> list[Gram]:
        """What a layer reads of every expert, added up; layers that read alike follow each other,
        so that the last sums are kept."""
        holders = self._holders[name]
        key = [(file.path, file.layers[name].sums) for of in holders.values() for file in of]
        if key != self._cached[0]:
            self._cached = [], []  # let go before more is read
            grams = []
            for of_expert in holders.values():
                grams.append(added([self._read(file, name) for file in of_expert]))
            self._cached = key, grams
        return self._cached[1]

    def _read(self, file: MomentsFile, name: str) -> Gram:
        """What a layer reads, as one file has it, in as many folds as the recipe wants."""
        layer = file.layers[name]
        rows = self.checkpoints[0].entries[layer.names[0]].shape[0]
        gram = read_gram(file, layer, rows)
        if self.recipe.folds > 1:
            return gram
        return gram._replace(C=gram.C.sum(0, True), counts=gram.counts.sum(0, True))


def view_of(layer: Layer, scope: str, shape: Sequence[int], ids: Tensor | None) -> View:
    """A layer of a file as the engine has it.

    Args:
        shape: of its weight.
        ids: of a table, the tokens that occur.
    """
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(tuple(shape), device="meta"))
    bias = layer.bias and scope != "weights"
    kind = VIEWS[layer.kind]
    if kind is Norm:
        return Norm(layer.name, module, bias, layer.subtracts_mean, layer.offset)
    if kind is Table:
        return Table(layer.name, module, bias, ids)  # type: ignore[arg-type]
    return kind(layer.name, module, bias)
