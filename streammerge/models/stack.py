"""A network as a chain: embedding, layers, head; one stage's weights are enough to run it.

    Stack.from_transformers(folder, shapes, example)   causal LMs, encoders, vision transformers
    Stack.of(build, shapes, example)                   any nn.Module whose attribute `stages` names its layers

The layers are the modules of one list that take each other's result; what runs before them is the embedding, what runs
after them is the head. Neither is written down: the model's own forward runs with stand-ins for its layers (record.py),
and which parameters it touches before and after them is watched. Parameters live on meta; whoever runs a stage brings
its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.models import chain
from streammerge.models.chain import Layer
from streammerge.models.names import Shape, match, places
from streammerge.models.record import Call, Key, Record, Recorder, each_tensor, fill, tensors
from streammerge.models.shapes import fill_template, no_memory, template
from streammerge.models.stage import Stage, Values, cut

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Batch = Mapping[str, Any]  # what the model's forward takes, and what the loss takes, by name


class Stack:
    """A module without weights, cut into stages. Not for two threads at a time.

    `unused` are checkpoint tensors that no stage runs with; `copies` (name -> name) hold the values of another tensor.
    """

    def __init__(
        self, module: nn.Module, layers: list[Layer], shapes: Mapping[str, Shape], example: Batch | None
    ) -> None:
        if not layers:
            raise RecipeError(f"{type(module).__name__} has no layers")
        chain.check_separate(module, layers)
        self.module = module
        self.layers = layers
        self._recorder: Recorder | None = None
        self._tail: Callable[[Tensor], Tensor] | None = None
        self._templates: dict[str, Any] = {}
        self._accepted = chain.accepted(module)
        parameters = dict(module.named_parameters())
        self._skeleton = {name: p for name, p in parameters.items() if not chain.inside(name, layers)}
        self._places = {first: names for first, names in places(module).items() if first in self._skeleton}
        self.dtype: torch.dtype = next(iter(parameters.values())).dtype
        self.vocabulary = chain.vocabulary(module)
        self._stand_in()
        found = match(module, shapes)
        before, after = (set(self._skeleton), set()) if example is None else self._watch(example)
        self.stages = cut(module, layers, found.parts, before, after)
        used = {name for stage in self.stages for name in stage.tensors}
        self.copies = {name: first for name, first in found.copies.items() if first in used}
        self.unused = tuple(name for name in shapes if name not in used and name not in self.copies)

    @property
    def vocabulary_names(self) -> tuple[str | None, str | None]:
        """The parameters of the map onto the vocabulary: weight and bias."""
        held = (None, None) if self.vocabulary is None else (self.vocabulary.weight, self.vocabulary.bias)
        names = {id(parameter): name for name, parameter in self._skeleton.items()}
        return names.get(id(held[0])), names.get(id(held[1]))

    @classmethod
    def from_transformers(
        cls,
        source: Any,
        shapes: Mapping[str, Shape],
        example: Batch | None = None,
        *,
        dtype: torch.dtype | None = None,
        attention: str = "sdpa",
        model: str | None = None,
    ) -> Stack:
        """The stack of a checkpoint folder or of a transformers config.

        `shapes` are the checkpoint's tensors. `example` is one batch: it shows what belongs to the embedding and what
        to the head; without it all that is no layer counts as embedding, which is enough to visit layers. `dtype` is
        what the model computes in (fp32). `attention` is "sdpa" or "eager". `model` names another class of transformers
        than the config does: "AutoModel", "T5EncoderModel".

        Raises:
            RecipeError: transformers is missing, or the model is no chain of layers.
            CheckpointError: config and tensors do not belong together.
        """
        import torch

        from streammerge.models.build import build

        module = build(source, dtype or torch.float32, attention, model)
        return cls(module, chain.find_layers(module), shapes, example)

    @classmethod
    def of(
        cls,
        build: Callable[[], nn.Module],
        shapes: Mapping[str, Shape],
        example: Batch | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Stack:
        """The stack of what `build()` returns: a module whose attribute `stages` is the dotted name of its layers.

        They are a ModuleList or Sequential, each called once and in order; its modules take the hidden state first and
        return the next one. The module's forward takes a batch by name. Parameters get no memory while `build` runs.

        Raises:
            RecipeError: `stages` is missing, or its modules are no chain.
            CheckpointError: module and tensors do not belong together.
        """
        import torch

        from streammerge.models.build import parameters_on_meta

        with parameters_on_meta():
            module = build()
        path = getattr(module, "stages", None)
        if not isinstance(path, str):
            raise RecipeError(f"{type(module).__name__} does not name its layers; set stages = 'path.of.its.layers'")
        module = module.to(dtype or torch.float32).eval()
        found = module.get_submodule(path)
        return cls(module, [(f"{path}.{name}", layer) for name, layer in found.named_children()], shapes, example)

    def names_in(self, shapes: Mapping[str, Shape]) -> dict[str, str]:
        """Our tensors' names -> the names of the same tensors in another checkpoint, where it has them.

        Raises:
            CheckpointError: a shape differs.
        """
        theirs = {part: name for name, part in match(self.module, shapes).parts.items()}
        return {name: theirs[part] for s in self.stages for name, part in s.parts.items() if part in theirs}

    def to(self, device: torch.device) -> None:
        """Move the buffers, which are all that the module holds."""
        for module in self.module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    def enter(self, weights: Values, batch: Batch) -> Record:
        """Run the embedding: its results are the record's entries, hidden state first, with their autograd graph."""
        recorder = Recorder(len(self.layers), self._shapes)
        self._run(weights, batch, recorder, lambda hidden: hidden[..., :1])
        return recorder.record

    def layer(self, stage: Stage, weights: Values, call: Call, values: Mapping[Key, Tensor]) -> list[Tensor]:
        """Run one layer: the tensors that it returns, in the order of `call.gives`."""
        from torch.func import functional_call

        args, kwargs = fill(call, values)
        return list(tensors(functional_call(stage.module, stage.local(weights), args, kwargs, tie_weights=False)))

    def leave(self, weights: Values, batch: Batch, hidden: Tensor) -> Any:
        """Run the head on the last layer's hidden state: what the model returns."""
        return self._run(weights, batch, Recorder(len(self.layers), self._shapes, hidden), None)

    def before_vocabulary(self, weights: Values, batch: Batch, hidden: Tensor) -> Tensor:
        """Run the head up to the map onto the vocabulary: what that map is given."""
        given: list[Tensor] = []

        def tail(final: Tensor) -> Tensor:
            given.append(final)
            return final[..., :1]

        self._run(weights, batch, Recorder(len(self.layers), self._shapes, hidden), tail)
        return given[-1]

    def logits(self, batch: Batch, scores: Tensor) -> Tensor:
        """What the model makes of the vocabulary's scores (any part of them): scaling, soft capping, or nothing."""
        result: Tensor = self._run({}, batch, Recorder(len(self.layers), self._shapes), lambda _: scores).logits
        return result

    def _run(self, weights: Values, batch: Batch, recorder: Recorder, tail: Callable[[Tensor], Tensor] | None) -> Any:
        """The model's own forward with stand-ins for layers, absent weights and, given `tail`, the vocabulary."""
        from torch.func import functional_call

        values = {}
        for first, names in self._places.items():
            value = weights[first] if first in weights else self._absent(first, batch)
            values.update(dict.fromkeys(names, value))
        inputs = {name: value for name, value in batch.items() if name in self._accepted}
        self._recorder, self._tail = recorder, tail
        try:
            return functional_call(self.module, values, (), inputs, tie_weights=False)
        finally:
            self._recorder = self._tail = None

    def _absent(self, name: str, batch: Batch) -> Tensor:
        """Stands in for a parameter that is not there."""
        import torch

        device = next(value.device for value in batch.values() if isinstance(value, torch.Tensor))
        return no_memory(tuple(self._skeleton[name].shape), self._skeleton[name].dtype, device)

    def _stand_in(self) -> None:
        def layer(index: int, real: Any, args: Any, kwargs: Any) -> Any:
            recorder = self._recorder
            return real(*args, **kwargs) if recorder is None else recorder.visit(index, args, kwargs)

        def vocabulary(real: Any, args: Any, kwargs: Any) -> Any:
            return real(*args, **kwargs) if self._tail is None else self._tail(args[0])

        for index, (_, module) in enumerate(self.layers):
            chain.replace_forward(module, lambda *given, index=index: layer(index, *given))
        if self.vocabulary is not None:
            chain.replace_forward(self.vocabulary, vocabulary)

    def _shapes(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What layer `index` would return for such arguments: tensors of the right shapes."""
        key = f"{index} {each_tensor((args, kwargs), lambda tensor: (tuple(tensor.shape), tensor.dtype))}"
        if key not in self._templates:
            recorder, self._recorder = self._recorder, None
            try:
                self._templates[key] = template(self.layers[index][1], self.dtype, args, kwargs)
            finally:
                self._recorder = recorder
        return fill_template(self._templates[key], list(tensors((args, kwargs))))

    def _watch(self, example: Batch) -> tuple[set[str], set[str]]:
        """The parameters around the layers that the model touches before their end, and after it."""
        recorder = Recorder(len(self.layers), self._shapes)
        values = {name: self._absent(name, example) for name in self._skeleton}
        with chain.touched(values, lambda: len(recorder.record.calls) == len(self.layers)) as found:
            self._run(values, example, recorder, lambda hidden: hidden[..., :1])
        if len(recorder.record.calls) != len(self.layers):
            raise RecipeError(f"{type(self.module).__name__} runs only {len(recorder.record.calls)} of its layers")
        last = {name for name in self.vocabulary_names if name is not None}
        return found.get(False, set()), found.get(True, set()) | last
