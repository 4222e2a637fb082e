"""Prefixes of texts that models have read, kept for later requests: `PrefixCache`.

It knows token ids and bytes. What a block holds is known only to the KV cache that copied it.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

# Tokens of a block, but for the last block of a text. Shorter texts are not kept. On a CPU prompts
# are read in chunks of as many tokens (`baco.kv_cache.batched.CPU_CHUNK`).
BLOCK = 64


class Kind(NamedTuple):
    """Texts of different kinds share no prefix.

    Attributes:
        model: the model that read the text.
        variant: as `baco.kv_cache.protocol.KVCache.prefix_variant` returns it.
        salt: of the request.
    """

    model: str
    variant: int = 0
    salt: str = ""


@dataclass(slots=True, eq=False)
class _Block:
    """Some tokens of a text, after those of its parents.

    Attributes:
        ids: token ids; fewer than `BLOCK` only in a leaf.
        content: what the KV cache copied of these tokens.
        size: bytes of the content.
        prompt: how many of its first tokens were read as a prompt.
        parent: the block before; None for the root of a kind.
        children: blocks after it, by their ids.
    """

    ids: tuple[int, ...]
    content: Any = None
    size: int = 0
    prompt: int = 0
    parent: "_Block | None" = None
    children: dict[tuple[int, ...], "_Block"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """A kept prefix.

    Attributes:
        tokens: its length.
        blocks: what the KV cache copied of it, in order; the last may have more tokens.
    """

    tokens: int
    blocks: list[Any]


class PrefixCache:
    """What models have read of texts, as a tree of blocks; the least recently used go first.

    Texts with a common prefix hold it once. A kept prefix ends between two blocks, at the end of a
    prompt, or anywhere in the answer after it. So a prompt that continues no other is read in the
    same chunks, and to the same bits, as if nothing were kept. In a cache that cannot be cut
    (`KVCache.can_cut`) a text is one block, which only texts that begin with all of it can use.

    All methods may be called from any thread.

    Attributes:
        queries: by model, tokens of all prompts that were looked up.
        hits: by model, those of them that were found.
    """

    def __init__(self) -> None:
        self.queries: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self._roots: dict[Kind, _Block] = {}
        # From the least recently used. A block is always used after its children, so that the first
        # block is a leaf.
        self._order: OrderedDict[_Block, Kind] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return self._bytes

    def matching_tokens(self, kind: Kind, ids: tuple[int, ...], *, divisible: bool) -> int:
        """Length of the longest kept prefix of a text. This does not count as a use."""
        with self._lock:
            return self._match(kind, ids, divisible)[0]

    def find(self, kind: Kind, ids: tuple[int, ...], *, divisible: bool) -> Match:
        """The longest kept prefix of a text.

        Args:
            kind: of the text.
            ids: of its tokens.
            divisible: whether a part of a kept text can be used.
        """
        with self._lock:
            tokens, path = self._match(kind, ids, divisible)
            self._use(kind, path)
            self.queries[kind.model] += len(ids)
            self.hits[kind.model] += tokens
            return Match(tokens, [block.content for block in path])

    def use(self, kind: Kind, ids: tuple[int, ...], *, divisible: bool) -> None:
        """Let the longest kept prefix of a text be the most recently used one."""
        with self._lock:
            self._use(kind, self._match(kind, ids, divisible)[1])

    def keep(
        self,
        kind: Kind,
        ids: tuple[int, ...],
        copy: Callable[[int, int], Any],
        size: Callable[[int], int],
        limit: int,
        *,
        prompt: int,
        divisible: bool,
    ) -> None:
        """Keep a text that was read, or as many of its first blocks as there is room for.

        Args:
            kind: of the text.
            ids: of its tokens.
            copy: (start, stop) → what the KV cache holds of these tokens; None if that cannot be
                continued.
            size: tokens → bytes of what ``copy`` returns.
            limit: bytes of all blocks.
            prompt: tokens that were read as a prompt; an answer follows.
            divisible: whether a part of the text can be used.
        """
        if divisible and len(ids) <= prompt:
            ids = ids[: len(ids) // BLOCK * BLOCK]
        if len(ids) < BLOCK:
            return
        step = BLOCK if divisible else len(ids)
        with self._lock:
            root = self._roots.get(kind, _Block(()))
            block, path, start = root, list[_Block](), 0
            while start < len(ids):
                part = ids[start : start + step]
                child = block.children.get(part) or (_longer(block, part) if divisible else None)
                if child is None:
                    break
                path.append(child)
                block, start = child, start + step
            self._use(kind, path)
            in_use = set(path)
            if divisible and start < len(ids):
                self._drop_shorter(block, ids[start : start + step])
            for first in range(start, len(ids), step):
                part = ids[first : first + step]
                needed = size(len(part))
                if needed > limit or not self._evict(limit - needed, in_use):
                    break
                content = copy(first, first + len(part))
                if content is None:
                    break
                in_prompt = min(max(prompt - first, 0), len(part))
                block = _Block(part, content, needed, in_prompt, block)
                path.append(block)
                in_use.add(block)
                self._order[block] = kind
                self._bytes += needed
                assert block.parent is not None
                block.parent.children[part] = block
            self._use(kind, path)
            if root.children:
                self._roots[kind] = root

    def shrink(self, limit: int) -> None:
        """Drop the least recently used blocks, until all of them take at most ``limit`` bytes."""
        with self._lock:
            self._evict(limit, ())

    def clear(self) -> None:
        """Drop all blocks."""
        self.shrink(0)

    def _match(self, kind: Kind, ids: tuple[int, ...], divisible: bool) -> tuple[int, list[_Block]]:
        """Tokens of the longest kept prefix, and its blocks."""
        block, path, tokens = self._roots.get(kind, _Block(())), list[_Block](), 0
        if not divisible:
            whole = [c for c in block.children.values() if ids[: len(c.ids)] == c.ids]
            longest = max(whole, key=lambda child: len(child.ids), default=None)
            return (0, []) if longest is None else (len(longest.ids), [longest])
        while (child := block.children.get(ids[tokens : tokens + BLOCK])) is not None:
            path.append(child)
            block, tokens = child, tokens + len(child.ids)
        rest, most, nearest = ids[tokens : tokens + BLOCK], 0, None
        for child in block.children.values():
            common = _common_tokens(child.ids, rest)
            if common > most and child.prompt <= common and child.prompt < len(child.ids):
                most, nearest = common, child
        if nearest is not None:
            path.append(nearest)
            tokens += most
        return (tokens, path) if tokens >= BLOCK else (0, [])

    def _use(self, kind: Kind, path: Sequence[_Block]) -> None:
        for block in reversed(path):
            self._order[block] = kind
            self._order.move_to_end(block)

    def _evict(self, limit: int, in_use: "Sequence[_Block] | set[_Block]") -> bool:
        """Drop blocks that are not in use until all others take at most ``limit`` bytes; returns
        whether they do.
        """
        while self._bytes > limit and self._order:
            oldest = next(iter(self._order))
            if oldest in in_use:
                break
            self._drop(oldest)
        return self._bytes <= limit

    def _drop(self, block: _Block) -> None:
        kind = self._order.pop(block)
        self._bytes -= block.size
        assert block.parent is not None
        del block.parent.children[block.ids]
        root = self._roots.get(kind)
        if root is not None and not root.children:
            del self._roots[kind]

    def _drop_shorter(self, block: _Block, part: tuple[int, ...]) -> None:
        """Drop the children that a new child with these tokens makes superfluous."""
        for child in list(block.children.values()):
            if child.ids == part[: len(child.ids)]:
                self._drop(child)


def _longer(block: _Block, part: tuple[int, ...]) -> _Block | None:
    """A child that begins with the last tokens of a text."""
    if len(part) == BLOCK:
        return None
    children = (c for c in block.children.values() if c.ids[: len(part)] == part)
    return next(children, None)


def _common_tokens(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
