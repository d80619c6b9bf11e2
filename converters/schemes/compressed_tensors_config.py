"""The part of config.json on compressed-tensors: which layers are stored how."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aq_jax.converters.schemes.entry import Config, Tensors
from aq_jax.errors import FormatError
from aq_jax.store.patterns import names_matching

_READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision")
_DENSE = (0, 18)
"""The first release whose codes cross words."""
_MOST_PATTERNS = 100


@dataclass(frozen=True, slots=True)
class Args:
    """What config.json says of a group of layers.

    Args:
        bits: The bits of a code.
        floating: Whether codes are floats.
        symmetric: Whether there are no zero points.
        strategy: What has a scale: "tensor", "channel", "group" or "block".
        group: The inputs of a group.
        block: The rows and columns of a block.
        crosses: Whether codes cross words, where words hold no whole number of them.
        notes: How inputs and outputs are quantized while the model runs, which no table says.
    """

    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int]
    crosses: bool
    notes: tuple[str, ...] = field(compare=False)


class Groups:
    """The config's groups of layers, by the most specific target: a name, then a pattern, then a class.

    Args:
        tensors: The tensors of the checkpoint.
        config: The entry of config.json.

    Raises:
        FormatError: for groups, targets and formats that are not known, and for weights that were transformed.
    """

    def __init__(self, tensors: Tensors, config: Config) -> None:
        self._tensors = tensors
        self._modules = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors.source.shapes))
        version = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.get("version")))
        self._crosses = version is None or (int(version[1]), int(version[2])) >= _DENSE
        transforms = config.get("transform_config") or {}
        if not isinstance(transforms, Mapping) or transforms.get("config_groups", transforms):
            raise tensors.error(
                "config.json has a transform_config: the weights are rotated, and their inputs must be rotated too, "
                "for which a table has no place; dequantize it with compressed-tensors first"
            )
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise tensors.error("config.json has config_groups, of one group or more; fetch it again")
        self._patterns = 0
        self._ignored = frozenset().union(*(found for _, found in self._targets("ignore", config.get("ignore"))))
        self._named: dict[str, Args] = {}
        self._matched: dict[str, Args] = {}
        self._classes: set[Args] = set()
        cache = _rounded("keys and values", config.get("kv_cache_scheme"))
        for name, group in groups.items():
            if not isinstance(group, Mapping):
                raise tensors.error(
                    f"{name} in config_groups is {str(group)[:80]}; wanted its `weights` and `targets`: "
                    "those of a preset are not known here; write them out"
                )
            weights, inside = group.get("weights"), group.get("input_activations")
            if weights is None:  # a group of activations alone
                continue
            if not isinstance(weights, Mapping):
                raise tensors.error(f"the weights of {name} are {str(weights)[:80]}; wanted how they are stored")
            notes = *_rounded("inputs", inside), *_rounded("outputs", group.get("output_activations")), *cache
            args = self._args(name, weights, group.get("format") or config.get("format"), notes)
            for target, found in self._targets(name, group.get("targets")):
                if target.startswith("re:"):
                    self._matched |= {module: args for module in found if module not in self._matched}
                elif target.isidentifier() and target[:1].isupper():
                    self._classes.add(args)
                else:
                    self._named.setdefault(target, args)

    def _targets(self, what: str, targets: object) -> Iterator[tuple[str, frozenset[str]]]:
        """List targets, and the modules that each of them is or matches."""
        if not isinstance(targets, list | None) or not all(isinstance(target, str) for target in targets or ()):
            raise self._tensors.error(f"{what} in config.json lists names; wanted texts, found {str(targets)[:80]}")
        for target in targets or ():
            if not target.startswith("re:"):
                yield target, frozenset({target})
                continue
            self._patterns += 1
            if self._patterns > _MOST_PATTERNS:
                raise self._tensors.error(f"config.json has more than {_MOST_PATTERNS} patterns; wanted fewer")
            try:
                yield target, names_matching(target.removeprefix("re:"), self._modules)
            except FormatError as error:
                raise self._tensors.error(str(error)) from None

    def _args(self, name: str, weights: Mapping[str, Any], form: object, notes: tuple[str, ...]) -> Args:
        tensors = self._tensors
        if form not in (None, *_READ):
            raise tensors.error(
                f"the weights of {name} are {form}, which no table holds; wanted one of {', '.join(_READ[:3])}: "
                "dequantize them first"
            )
        bits = tensors.integer(f"num_bits of {name}", weights.get("num_bits", 8))
        group = tensors.integer(f"group_size of {name}", weights.get("group_size") or 0)
        strategy = weights.get("strategy") or ("tensor" if not group else "group" if group > 0 else "channel")
        floating = weights.get("type", "int") == "float"
        if bits not in ((8,) if floating else (2, 3, 4, 5, 6, 8)):
            raise tensors.error(f"the weights of {name} have {bits} bits; wanted 2, 3, 4, 5, 6 or 8, or floats of 8")
        known = ("tensor", "channel", "group", *(("block",) if floating else ()))
        if strategy not in known or (strategy == "group" and group < 1):
            raise tensors.error(
                f"the weights of {name} have a scale a {strategy}, of {group}; wanted one a {', '.join(known)}"
            )
        if weights.get("actorder") in (True, "group", "dynamic"):
            raise tensors.error(
                f"the inputs of {name} are ordered by activation (actorder), for which a table has no place; quantize "
                'it with actorder = "weight" or none'
            )
        block = (0, 0)
        if strategy == "block":
            found = re.fullmatch(r"\[?(\d{1,9})[x,] ?(\d{1,9})\]?", str(weights.get("block_structure")))
            if found is None:
                raise tensors.error(f"{name} has block_structure {weights.get('block_structure')}; wanted two numbers")
            block = int(found[1]), int(found[2])
        symmetric = weights.get("symmetric", True) is True
        return Args(bits, floating, symmetric, strategy, group, block, self._crosses, notes)

    def ignores(self, module: str) -> bool:
        """Tell whether a module, a name with its last dot, is left as it is."""
        return module[:-1] in self._ignored

    def of(self, module: str, leaf: str) -> Args:
        """Find how a module's weights are stored, which has this leaf.

        Raises:
            FormatError: for a module that is ignored, or in no group.
        """
        name = module[:-1]
        if name in self._ignored:
            raise self._tensors.error(f"config.json ignores {name}, which has {leaf}; wanted a plain weight")
        found = self._named.get(name) or self._matched.get(name)
        if found is None and len(self._classes) == 1:
            (found,) = self._classes
        if found is None:
            groups = "several groups of classes" if self._classes else "no group"
            raise self._tensors.error(f"{module}{leaf} belongs to {groups} of config.json; wanted a target of its name")
        return found


def _rounded(what: str, args: object) -> tuple[str, ...]:
    """Say how something is rounded while the model runs."""
    if not isinstance(args, Mapping):
        return ()
    said = f"{args.get('num_bits', 8)} bits, {args.get('type', 'int')}, {args.get('strategy', 'tensor')}"[:80]
    return (f"config.json says that {what} are quantized while the model runs ({said}); a table does not say so",)
