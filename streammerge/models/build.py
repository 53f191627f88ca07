"""A transformers model without its weights: parameters on meta, buffers real.

The model's constructor runs as always, but every parameter is replaced by one without memory as soon as a module
registers it. Buffers (rotary frequencies, position numbers, scales) are not in checkpoints; they are what the
constructor computed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def return_freed_memory(piece: int = 1 << 20) -> None:
    """Let glibc give what is free back to the kernel, and from now on every freed piece of so many bytes at once.

    By itself it keeps up to 64 MiB at the end of its heap, and whatever it freed below what is in use: beyond any
    prediction of what a process holds.
    """
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, piece)
        library.mallopt(M_TRIM_THRESHOLD, piece)
        library.malloc_trim(0)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that this thread builds meanwhile get parameters without memory."""
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook

    return_freed_memory()  # a parameter takes memory for a moment; untouched, but the heap would keep its room
    thread = threading.get_ident()

    def replace(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def build(source: str | Path, dtype: torch.dtype, attention: str, cls: str | None) -> nn.Module:
    """The model of a checkpoint folder, or of a transformers config, in eval mode; `cls` names another class.

    Raises:
        RecipeError: transformers is missing, or does not run this model so.
        CheckpointError: config.json is missing or names no class that transformers has.
    """
    try:
        import transformers
    except ImportError:
        raise RecipeError("running a model needs transformers; pip install streammerge[models]") from None
    config: Any = source
    if isinstance(source, (str, Path)):
        if not (Path(source) / "config.json").exists():
            raise CheckpointError(f"{source}: no config.json; give the folder of a transformers checkpoint")
        try:
            config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{source}/config.json: transformers cannot read it ({_line(error)})") from None
    found = _class(transformers, config, cls, source)
    config.use_cache = False  # keys and values of earlier tokens are for generation
    try:
        with parameters_on_meta():
            model = found._from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        raise RecipeError(
            f"transformers {transformers.__version__} cannot build {found.__name__} ({_line(error)})"
        ) from None
    built: nn.Module = model.eval()
    return built


def _class(transformers: Any, config: Any, cls: str | None, source: Any) -> Any:
    name = cls or next(iter(getattr(config, "architectures", None) or ()), None)
    if name is None:
        raise CheckpointError(f"{source}: the config names no architecture; say which class of transformers it is")
    found = getattr(transformers, name, None)
    if found is None:
        raise CheckpointError(f"{source}: transformers {transformers.__version__} has no class {name!r}")
    if hasattr(found, "_model_mapping"):
        model_type = type(config)
        if model_type not in found._model_mapping:
            raise CheckpointError(
                f"{source}: {name} has no class for a {config.model_type} model; name the class itself"
            )
        mapped = found._model_mapping[model_type]
        found = mapped[0] if isinstance(mapped, (list, tuple)) else mapped
    if getattr(config, "is_encoder_decoder", False) and "Encoder" not in found.__name__:
        raise RecipeError(f"{found.__name__} is no chain of layers: run its encoder alone, say as class T5EncoderModel")
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
