"""The weights of a GGUF file, as llama.cpp holds them: quantised, on the CPU or a GPU."""

import ctypes
import hashlib
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch

from baco.errors import BacoError
from baco.models.llama_cpp.library import forget_errors, library, reason

# Bytes of the file that its digest samples, and at how many places.
_SAMPLE, _SAMPLES = 4096, 64
_TEXT_BYTES = 4096
# Idle room above this size is freed.
MAX_IDLE_BYTES = 2**28


class LlamaWeights:
    """A loaded GGUF file. The memory is freed with the object.

    Attributes:
        path: of the file.
        pointer: of the library, to the model.
        on_gpu: whether its layers are on a GPU.
        vocabulary_size: entries of a row of logits.
        layers, width, heads, key_heads, context: of the model.
        window: tokens of its sliding windows; 0 without any.
        recurrent: its state cannot be rolled back.
        parameters, bytes: of the weights.
        config: what callers read of a ``transformers`` configuration.
    """

    # Rows of logits are in the memory of the CPU, wherever the layers are.
    device = torch.device("cpu")
    generation_config = None
    is_quantized = True

    def __init__(self, path: Path, *, gpu: bool) -> None:
        functions = library()
        params = functions.llama_model_default_params()
        params.n_gpu_layers = -1 if gpu else 0
        forget_errors()
        pointer = functions.llama_model_load_from_file(str(path).encode(), params)
        if not pointer:
            raise BacoError(f"llama.cpp cannot load {path}: {reason()}")
        self.path, self.pointer, self.on_gpu = path, pointer, gpu
        self._lock = Lock()
        self._idle: list[Room] = []  # at most one, which no engine uses
        weakref.finalize(self, _free, functions, pointer, self._idle).atexit = False
        if functions.llama_model_has_encoder(pointer) or not functions.llama_model_has_decoder(
            pointer
        ):
            raise BacoError(f"{path} is no causal language model: it has an encoder")
        vocab = functions.llama_model_get_vocab(pointer)
        self.vocabulary_size = int(functions.llama_vocab_n_tokens(vocab))
        self.layers = int(functions.llama_model_n_layer(pointer))
        self.width = int(functions.llama_model_n_embd(pointer))
        self.heads = int(functions.llama_model_n_head(pointer))
        self.key_heads = int(functions.llama_model_n_head_kv(pointer))
        self.context = int(functions.llama_model_n_ctx_train(pointer))
        self.window = int(functions.llama_model_n_swa(pointer))
        self.recurrent = bool(
            functions.llama_model_is_recurrent(pointer) or functions.llama_model_is_hybrid(pointer)
        )
        self.parameters = int(functions.llama_model_n_params(pointer))
        self.bytes = int(functions.llama_model_size(pointer))
        ends = {functions.llama_vocab_eos(vocab), functions.llama_vocab_eot(vocab)}
        self.config = _Config(
            eos_token_id=sorted(int(end) for end in ends if end >= 0),
            bos_token_id=int(functions.llama_vocab_bos(vocab)),
            vocab_size=self.vocabulary_size,
            llama_cpp={**self.metadata, "weights": self._digest()},
        )

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The keys and values of the file that are no lists."""
        functions, buffer = library(), ctypes.create_string_buffer(_TEXT_BYTES)
        values = {}
        for index in range(functions.llama_model_meta_count(self.pointer)):
            texts = []
            for read in (
                functions.llama_model_meta_key_by_index,
                functions.llama_model_meta_val_str_by_index,
            ):
                read(self.pointer, index, buffer, len(buffer))
                texts.append(buffer.value.decode(errors="replace"))
            values[texts[0]] = texts[1]
        return values

    def number(self, key: str) -> int:
        """A number that the file gives for its architecture, 0 where it gives none."""
        value = self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}", "")
        return int(value) if value.isdigit() else 0

    @property
    def format(self) -> str:
        """The number format of most weights, as in ``Q4_1``."""
        functions, buffer = library(), ctypes.create_string_buffer(_TEXT_BYTES)
        functions.llama_model_desc(self.pointer, buffer, len(buffer))
        words = buffer.value.decode(errors="replace").replace("(guessed) ", "")
        return words.split(maxsplit=2)[-1]

    @property
    def cell_bytes(self) -> int:
        """About how many bytes of the cache a token takes."""
        keys = self.number("attention.key_length") or self.width // max(1, self.heads)
        values = self.number("attention.value_length") or keys
        return 2 * self.layers * self.key_heads * (keys + values)

    @property
    def bits(self) -> float:
        """Mean bits of a weight."""
        return 8 * self.bytes / max(1, self.parameters)

    def named_modules(self) -> list[Any]:
        """None: its weights are not PyTorch's."""
        return []

    def take_idle(self) -> "Room | None":
        """The room that no engine uses, if there is one."""
        with self._lock:
            return self._idle.pop() if self._idle else None

    def keep_idle(self, room: "Room", size: int) -> None:
        """Keep room of this many bytes for the next engine, unless it is large."""
        with self._lock:
            if size <= MAX_IDLE_BYTES and not self._idle:
                self._idle.append(room)
                return
        room.free()

    def _digest(self) -> str:
        """A digest of samples of the file."""
        size, digest = self.path.stat().st_size, hashlib.sha256()
        with self.path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
        return f"{size} {digest.hexdigest()}"


@dataclass(slots=True)
class Room:
    """A context of the library, which must be freed before its model.

    Attributes:
        pointer: of the library, to the context.
        cells: tokens that it can hold, of all sequences together.
        sequences: how many sequences it can hold.
    """

    pointer: Any
    cells: int
    sequences: int

    def free(self) -> None:
        """Free its memory."""
        if self.pointer:
            library().llama_free(self.pointer)
            self.pointer = None


def _free(functions: Any, pointer: Any, idle: list[Room]) -> None:
    for room in idle:
        room.free()
    functions.llama_model_free(pointer)


class _Config(SimpleNamespace):
    """The part of a ``transformers`` configuration that is read here."""

    def get_text_config(self, **_: Any) -> "_Config":
        """Itself: there is no other part."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))
