"""Recording of computations as CUDA graphs, one for each batch size, and the tensors of a batch that they read.

A CUDA graph launches all its kernels at once, but fixes all sizes and addresses. A size gets its graph when it occurs
for the second time; each batch is copied into the graph's input buffers.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pal.backbone.graphs import made_of
from pal.backbone.packed import PackedContext, Projection
from pal.types import LLMInputs

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

logger = logging.getLogger(__name__)

SEEN = 1024
"""Number of batch sizes remembered as seen once."""
SETTINGS = 8
"""Number of settings (a model with its trained weights and modes) whose graphs are kept."""

_Key = tuple[int, Hashable]
"""Number of the setting, and the batch's sizes."""


class Recorder(Protocol):
    """Interface of a recorder: makes a function repeatable, with inputs and results at fixed addresses."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run the function once, as it will be recorded."""
        ...

    def record(self, run: Callable[[], Sequence[Tensor | None]]) -> tuple[Callable[[], None], Sequence[Tensor | None]]:
        """A function that replays the recorded one, and its output tensors, undefined until the first replay."""
        ...


class CudaRecorder:
    """Recorder of CUDA graphs, which share one memory pool, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run on the stream that will record, since libraries initialise themselves per stream."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], Sequence[Tensor | None]]) -> tuple[Callable[[], None], Sequence[Tensor | None]]:
        """Record one graph; its results are in the graph's memory."""
        graph = torch.cuda.CUDAGraph()
        # other threads may load and move batches meanwhile
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            results = run()
        return graph.replay, results


class Recorded(Protocol):
    """A recorded computation."""

    @property
    def output_bytes(self) -> int:
        """Memory of its outputs, which is not shared with other graphs."""
        ...


_T = TypeVar("_T", bound=Recorded)


class Recordings(Generic[_T]):
    """Recorded computations by setting and batch size; the least recently used are freed.

    Args:
        recorder: by default, CUDA graphs on the LLM's device.
        most: number of batch sizes whose graphs are kept.
        most_bytes: memory of the outputs of all that are kept; None for any.
    """

    def __init__(self, recorder: Recorder | None, most: int, most_bytes: int | None = None) -> None:
        self._recorder, self._own = recorder, recorder is None
        self._most, self._most_bytes = most, most_bytes
        self._settings: OrderedDict[Hashable, int] = OrderedDict()
        self._numbers = 0
        self._kept: OrderedDict[_Key, _T] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        self.failed: str | None = None
        """Reason why no more graphs are recorded; None while they are."""

    def __len__(self) -> int:
        return len(self._kept)

    def possible(self, device: torch.device) -> bool:
        """True if anything can be recorded on this device, and no recording has failed."""
        return self.failed is None and (not self._own or device.type == "cuda")

    def find(self, llm: Backbone, setting: Hashable, sizes: Hashable, make: Callable[[Recorder], _T]) -> _T | None:
        """The graph for batches of these sizes; None when they occur for the first time, or recording fails."""
        if not self.possible(llm.device):
            return None
        key = (self._number(setting), sizes)
        made = self._kept.get(key)
        if made is None:
            if key not in self._seen:
                self._seen[key] = None
                if len(self._seen) > SEEN:
                    self._seen.popitem(last=False)
                return None
            made = self._make(llm, make)
            if made is None:
                return None
            self._kept[key] = made
        self._kept.move_to_end(key)
        while len(self._kept) > self._most or (len(self._kept) > 1 and self._too_large()):
            self._kept.popitem(last=False)
        return made

    def _too_large(self) -> bool:
        return self._most_bytes is not None and sum(x.output_bytes for x in self._kept.values()) > self._most_bytes

    def _number(self, setting: Hashable) -> int:
        """Number of a setting; where there are too many, the least recently used is dropped with its graphs."""
        if setting not in self._settings:
            self._settings[setting] = self._numbers = self._numbers + 1
            if len(self._settings) > SETTINGS:
                _, gone = self._settings.popitem(last=False)
                for known in (self._kept, self._seen):
                    for key in [key for key in known if key[0] == gone]:
                        del known[key]
        self._settings.move_to_end(setting)
        return self._settings[setting]

    def _make(self, llm: Backbone, make: Callable[[Recorder], _T]) -> _T | None:
        logger.debug("a CUDA graph for another batch size")
        if self._recorder is None or (isinstance(self._recorder, CudaRecorder) and self._recorder.device != llm.device):
            self._recorder = CudaRecorder(llm.device)
        try:
            return make(self._recorder)
        except RuntimeError as error:  # torch's base class for errors of CUDA, memory and graph capture
            self.failed = str(error).splitlines()[0]
            self._kept.clear()
            logger.warning("running on without CUDA graphs: %s", self.failed)
            return None


def setting_of(llm: Backbone, modules: Sequence[nn.Module]) -> Hashable | None:
    """All that graphs of the LLM and these modules depend on besides sizes; None where no graph is possible."""
    device = llm.device.type
    made = made_of(modules, llm.layers)
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return made and (made, autocast, llm.lm.training, llm.recomputes_audio)


def same_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast as it is, but without its cache: weights' casts there would be those of the recorded batch."""
    return torch.autocast(
        device,
        torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    )


class MadeKeys:
    """`PackedSource` with each layer's K/V, or projection, computed already."""

    def __init__(self, made: Mapping[int, Projection | tuple[Tensor, Tensor]]) -> None:
        self.made = made

    def ready(self, more: int | None) -> None:
        """Nothing to do."""

    def projection(self, layer: int) -> Any:
        """Projection of a layer."""
        return self.made[layer]

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Not used with packed rows."""
        raise NotImplementedError


def laid_out(inputs: LLMInputs, packed: PackedContext) -> LLMInputs:
    """The inputs without host-only fields, and with each layer's projection or K/V in place of their source."""
    keys = tuple(replace(one, source=MadeKeys({layer: one.made(layer) for layer in one.layers})) for one in packed.keys)
    context = replace(packed, lengths=(), conversations=(), keys=keys)
    return replace(inputs, audio_context=context, labels_BT=None, targets=None)


class BatchTensors:
    """Tensors of nested dataclasses, tuples and mappings, each once, and the modules among them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self._numbers: dict[int, int] = {}
        self._rest: list[Hashable] = []

    def of(self, x: Any) -> Any:
        """Collect the tensors of `x`; returns `x`."""
        kind = _kind(type(x))
        if kind == "tensor" and not isinstance(x, nn.Parameter):
            if id(x) not in self._numbers:
                self._numbers[id(x)] = len(self.tensors)
                self.tensors.append(x)
            self._rest.append(("tensor", self._numbers[id(x)]))
        elif kind == "tensor":
            self.parameters.append(x)
            self._rest.append(id(x))
        elif kind == "module":
            self.modules.append(x)
            self._rest.append(id(x))
        elif kind == "leaf":
            self._rest.append(x if isinstance(x, Hashable) else id(x))
        else:
            children = _children(x)
            self._rest.append((type(x).__name__, len(children)))
            for name, child in children:
                self._rest.append(name)
                self.of(child)
        return x

    def key(self) -> Hashable:
        """Hashable key, equal for batches that differ only in the values of their tensors."""
        return tuple(self._rest), tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in self.tensors)

    def trained(self, modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        """Parameters of the modules, and those among the inputs, that may get gradients, each once."""
        found = [weight for module in modules for weight in module._parameters.values() if weight is not None]
        return list(dict.fromkeys(weight for weight in (*found, *self.parameters) if weight.requires_grad))

    def rebuilt(self, x: Any, tensors: Sequence[Tensor]) -> Any:
        """`x` with its tensors replaced."""
        kind = _kind(type(x))
        if kind == "tensor":
            return x if isinstance(x, nn.Parameter) else tensors[self._numbers[id(x)]]
        if kind in ("module", "leaf"):
            return x
        new = {name: self.rebuilt(child, tensors) for name, child in _children(x)}
        if kind == "dataclass":
            return replace(x, **new)
        return MadeKeys(new) if kind == "keys" else tuple(new.values()) if kind == "tuple" else new


_KINDS: dict[type, tuple[str, tuple[str, ...]]] = {}


def _kind(kind: type) -> str:
    """Kind of a type's objects: "tensor", "module", "keys", "dataclass", "tuple", "mapping" or "leaf"."""
    if kind not in _KINDS:
        _KINDS[kind] = (_find_kind(kind), tuple(x.name for x in fields(kind)) if is_dataclass(kind) else ())
    return _KINDS[kind][0]


def _find_kind(kind: type) -> str:
    for base, name in ((Tensor, "tensor"), (nn.Module, "module"), (MadeKeys, "keys")):
        if issubclass(kind, base):
            return name
    if is_dataclass(kind):
        return "dataclass"
    return "tuple" if issubclass(kind, tuple) else "mapping" if issubclass(kind, Mapping) else "leaf"


def _children(x: Any) -> list[tuple[Any, Any]]:
    """Fields or items of `x` by name."""
    kind = _kind(type(x))
    if kind == "dataclass":
        return [(name, getattr(x, name)) for name in _KINDS[type(x)][1]]
    if kind == "tuple":
        return list(enumerate(x))
    return list((x.made if kind == "keys" else x).items())
