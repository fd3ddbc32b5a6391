"""What is quantized of a model, what stays dense and why.

A model is inspected once, before anything in it changes; whoever loads, quantizes or plans asks the
`Selection` that comes of it.

Shapes: A = out_features (rows), N = in_features (columns).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from watersic_hf.calibration import check_rows, zero_rows
from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.examination import kind_of, on_meta, weights_used_elsewhere
from watersic_hf.integration.experts import find_experts, has_biases, matrix_shapes
from watersic_hf.integration.linear_layers import (
    as_linear,
    like,
    linear_layers,
    shape_of,
)
from watersic_hf.integration.patterns import require_effect
from watersic_hf.integration.reasons import (
    BIASES,
    NAMED,
    NEW,
    SMALL,
    USED,
    Reasons,
    skipped_patterns,
    too_small,
)
from watersic_hf.integration.vocabulary import VocabularyMatrix, find_vocabulary_matrices
from watersic_hf.nn import (
    FusedExperts,
    PackedMatrix,
    SeparateExperts,
    WaterSICTiedHead,
    fuse,
    module_matches,
    replace_module,
    separate_dense,
    separate_experts,
)

#: Layers that an error names at most.
_EXAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The parts of one model by what happens to them.  Names are full names of modules."""

    model_class: str
    linear: Mapping[str, tuple[int, int]]
    """(A, N) of every linear layer, in the order of the model."""
    fused: Mapping[str, FusedExperts]
    """Layout of every module that holds fused experts."""
    shapes: Mapping[str, tuple[int, int]]
    """(A, N) of every matrix to quantize, those of experts included, without the vocabulary."""
    experts: Mapping[str, FusedExperts]
    """Those of `fused` whose matrices are to be quantized."""
    vocabulary: Mapping[str, VocabularyMatrix]
    """Input embedding and output head, as far as they can be quantized."""
    obstacles: Mapping[str, str]
    """Why an embedding or a head that was to be quantized stays dense."""
    skipped: Mapping[str, str]
    """Why layers stay dense, by pattern."""
    excluded: Mapping[str, str]
    """Why further linear layers and modules of experts stay dense, by name."""
    modules: tuple[str, ...] = field(repr=False)
    """Names of all modules."""
    towers: tuple[str, ...]
    """The largest modules that text does not run through."""
    zero_rows: Mapping[str, list[int]]
    """Rows that are set to zero before a layer is quantized."""
    originals: Mapping[str, nn.Module] = field(repr=False)
    """Modules of a class of their own, on meta, for `dequantize` to put back."""
    reasons: Mapping[str, str] = field(repr=False)
    """Why a module that holds a matrix would stay dense, for all of them."""
    biased: frozenset[str]
    """Modules of experts that have biases."""
    prefix: str
    """How names of modules begin in a model with a head, with a dot."""

    @classmethod
    def of(cls, model: nn.Module, config: WaterSICConfig, *, saved: bool = False) -> "Selection":
        """Inspect a model before it is changed; its parameters may be on meta.

        Args:
            model: the model.
            config: how it is to be quantized.
            saved: whether `config` is that of a quantized model, whose files show what is quantized
                of it.

        Raises:
            ValueError: different bits are asked for an embedding and the head tied to it.
        """
        linear = linear_layers(model)
        fused = find_experts(model)
        towers = tuple(towers_without_text(model))
        vocabulary, obstacles = find_vocabulary_matrices(
            model, linear, head_bits=config.head_bits, embedding_bits=config.embedding_bits
        )
        user = config.modules_to_not_convert or ()
        for matrix in vocabulary:
            if matrix.bits is not None and module_matches(matrix.name, user) is not None:
                obstacles[matrix.name] = NAMED
        skipped = skipped_patterns(model, config, fused, towers)
        experts = {n: e for n, e in fused.items() if module_matches(n, skipped) is None}
        shapes = {name: shape_of(module) for name, module in linear.items()}
        selected = {n: shape for n, shape in shapes.items() if module_matches(n, skipped) is None}
        excluded: dict[str, str] = {}
        if not saved:
            heads = {
                m.head: m.name for m in vocabulary if m.head is not None and m.bits is not None
            }
            used = weights_used_elsewhere(model, [*selected, *heads], bypassed=fused)
            obstacles |= {heads[name]: USED for name in heads.keys() & used}
            excluded = too_small(selected, experts)
            excluded |= {name: USED for name in selected if name in used}
        experts = {name: e for name, e in experts.items() if name not in excluded}
        selected = {name: shape for name, shape in selected.items() if name not in excluded}
        selected |= matrix_shapes(experts)
        reasons = Reasons(model, shapes, fused, skipped, excluded, towers, obstacles)
        originals = {n: module for n, module in linear.items() if type(module) is not nn.Linear}
        originals |= {m.name: model.get_submodule(m.name) for m in vocabulary if m.embedding}
        return cls(
            model_class=type(model).__name__,
            linear=shapes,
            fused=fused,
            shapes=selected,
            experts=experts,
            vocabulary={
                m.name: m if m.name not in obstacles else replace(m, bits=None) for m in vocabulary
            },
            obstacles=obstacles,
            skipped=skipped,
            excluded=excluded,
            modules=tuple(name for name, _ in model.named_modules()),
            towers=towers,
            zero_rows=_zero_rows(config, selected),
            originals={name: on_meta(module) for name, module in originals.items()},
            reasons=reasons.all(),
            biased=frozenset(n for n in experts if has_biases(model.get_submodule(n))),
            prefix=f"{model.base_model_prefix}.",
        )

    @property
    def quantized_vocabulary(self) -> list[VocabularyMatrix]:
        """The embedding and the head that are to be quantized."""
        return [matrix for matrix in self.vocabulary.values() if matrix.bits is not None]

    def check(self, config: WaterSICConfig) -> None:
        """Refuse a selection that cannot be quantized, and settings that have no effect on it.

        Args:
            config: that the selection was made with.

        Raises:
            ValueError: there is nothing to quantize, a pattern selects nothing, or a layer has no
                such row to zero.
        """
        require_effect(
            "modules_to_not_convert",
            config.modules_to_not_convert or (),
            selectable=self.modules,
            modules=(),
            dense={},
        )
        if not self.shapes:
            found = [f"{name} ({reason})" for name, reason in self.excluded.items()]
            raise ValueError(
                f"{self.model_class} has no linear layer to quantize: {len(self.linear)} were "
                f"found, and `modules_to_not_convert` = {sorted(self.skipped)} leaves all of them "
                f"dense{', but for ' if found else ''}{', '.join(found[:_EXAMPLES])}."
            )
        # that a layer is too small is no mistake of whoever names it
        small = [name for name, reason in self.excluded.items() if reason == SMALL]
        for name in ("layer_bits", "zero_rows"):
            patterns = getattr(config, name)
            if isinstance(patterns, Mapping):
                require_effect(
                    name,
                    patterns,
                    selectable=[*self.shapes, *small],
                    modules=self.modules,
                    dense=self.reasons,
                )
        for name, rows in self.zero_rows.items():
            check_rows(name, rows, self.shapes[name][0])

    def open(self, part: nn.Module, prefix: str = "", *, skip: tuple[str, ...] = ()) -> None:
        """Turn the layers to quantize into `nn.Linear` modules, which the calibration knows.

        Experts get a matrix each, and the rows of `zero_rows` become zero.

        Args:
            part: the model, or a module of it; changed in place.
            prefix: of the names of its modules in the model, with a dot.
            skip: prefixes of names to leave as they are.
        """
        names = {
            name: name.removeprefix(prefix)
            for name in self.shapes
            if name.startswith(prefix) and not name.startswith(skip)
        }
        for name, layout in self.experts.items():
            if name.startswith(prefix) and not name.startswith(skip):
                separate_dense(part.get_submodule(name.removeprefix(prefix)), layout)
        for name in names.keys() & self.originals.keys():
            replace_module(part, names[name], as_linear(part.get_submodule(names[name])))
        zero_rows(part, {names[n]: rows for n, rows in self.zero_rows.items() if n in names})

    def close(self, part: nn.Module, prefix: str = "") -> None:
        """Undo `open` where a layer has not been quantized.

        Args:
            part: the model, or a module of it; changed in place.
            prefix: of the names of its modules in the model, with a dot.
        """
        for name, original in self.originals.items():
            if name in self.shapes and name.startswith(prefix):
                module = part.get_submodule(name.removeprefix(prefix))
                if type(module) is nn.Linear:
                    replace_module(part, name.removeprefix(prefix), like(original, module))
        for _, module in list(separate_experts(part)):
            if not any(isinstance(matrix, PackedMatrix) for matrix in module.modules()):
                fuse(module)

    def without(self, new: Collection[str]) -> "Selection":
        """Return the selection without linear layers and modules of experts that stay dense."""
        inside = tuple(f"{name}." for name in new if name in self.experts)
        return replace(
            self,
            shapes={
                name: shape
                for name, shape in self.shapes.items()
                if name not in new and not name.startswith(inside)
            },
            experts={name: layout for name, layout in self.experts.items() if name not in new},
        )

    def new_layers(self, model: nn.Module) -> list[str]:
        """Return the dense layers of a loaded model that its checkpoint lacks.

        transformers has initialized them, and says so in a warning.
        """
        names = (*self.linear, *self.fused)
        loaded = {name: _is_loaded(model.get_submodule(name)) for name in names}
        # without any mark there is nothing to tell them apart by
        return [name for name in names if not loaded[name]] if any(loaded.values()) else []

    def record_new(self, config: WaterSICConfig, new: Collection[str]) -> None:
        """Write into the config of a quantized model which layers its files lack."""
        known = config.modules_to_not_convert or ()
        config.modules_to_not_convert = sorted({*known, *self._patterns(new)})
        # no layer whose name differs in numbers only is quantized
        config.left_dense |= dict.fromkeys(map(kind_of, new), NEW)

    def _patterns(self, names: Collection[str]) -> list[str]:
        return sorted(name.removeprefix(self.prefix).replace(".", r"\.") for name in names)

    def dense_patterns(self, quantized: Collection[str]) -> list[str]:
        """Return patterns of the linear layers and experts that stay dense.

        They tell a loader which layers it need not look for in the files.

        Args:
            quantized: names of the modules that are quantized, as of `quantized_modules`.
        """
        return self._patterns([n for n in (*self.linear, *self.fused) if n not in quantized])

    def left_dense(self, quantized: Collection[str], new: Collection[str] = ()) -> dict[str, str]:
        """Return why modules stay dense; those with vectors only, as norms, are not listed.

        Args:
            quantized: names of the modules that are quantized, as of `quantized_modules`.
            new: those that the checkpoint lacks, as of `new_layers`.

        Returns:
            Reasons by name of module.  Modules whose names differ in numbers only are one entry,
            with ``*`` for the numbers, if they share a reason and none of them is quantized.
        """
        dense = {
            name: BIASES if name in quantized else NEW if name in new else reason
            for name, reason in self.reasons.items()
            if name not in quantized or name in self.biased
        }
        states: dict[str, set[str | None]] = {}
        for name in (*quantized, *dense):
            states.setdefault(kind_of(name), set()).add(dense.get(name))
        return {
            kind_of(name) if len(states[kind_of(name)]) == 1 else name: reason
            for name, reason in dense.items()
        }


def quantized_modules(model: nn.Module) -> set[str]:
    """Return the names of the modules of a model that are quantized."""
    kinds = PackedMatrix | WaterSICTiedHead | SeparateExperts
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def _is_loaded(module: nn.Module) -> bool:
    """Return whether transformers has loaded the matrices of a module, or they are quantized."""
    matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
    # set by transformers on what it has loaded
    return all(getattr(p, "_is_hf_initialized", False) for p in matrices)


def towers_without_text(model: nn.Module) -> list[str]:
    """Return the largest modules of a model of text and images, or sounds, that see no text.

    They stand beside the language model: vision tower, projector.  A model of text alone has none.
    """
    others = {"vision_config", "audio_config"} & set(getattr(model.config, "sub_configs", ()))
    language_model = model.get_decoder() if others else model
    found: list[str] = []

    def search(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            inside = any(module is language_model for module in child.modules())
            if inside and child is not language_model:
                search(child, f"{prefix}{name}.")
            elif not inside and child is not model.get_output_embeddings():
                found.append(f"{prefix}{name}")

    if language_model is not model:
        search(model, "")
    return found


def _zero_rows(config: WaterSICConfig, names: Collection[str]) -> dict[str, list[int]]:
    """Return the rows to zero by layer, where the user has named them by pattern."""
    rows = config.zero_rows
    if not isinstance(rows, Mapping):
        return {}
    patterns = {name: module_matches(name, rows) for name in names}
    return {name: rows[pattern] for name, pattern in patterns.items() if pattern is not None}
