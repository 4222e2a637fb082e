"""How often one half's rows decided a round alone, so that nobody asks where they seldom do."""

from dataclasses import dataclass, field

from baco.source import Source

# Less than this share of the rounds lately is seldom.
_SELDOM = 0.1
# How quickly that share follows what is seen, and how quickly it rises while nobody looks: every
# ten rounds or so somebody does.
_EMA_WEIGHT, _DOUBT = 0.1, 0.001


@dataclass(slots=True)
class SkipStats:
    """The share of rounds that each half, read first, decided lately."""

    _share: dict[Source, float] = field(default_factory=lambda: {"base": 0.5, "aligned": 0.5})

    def rarely_sufficient(self, half: Source) -> bool:
        """Is it to be expected that the other half is read too, whatever this one says?"""
        if self._share[half] >= _SELDOM:
            return False
        self._share[half] += _DOUBT
        return True

    def saw(self, half: Source, enough: bool) -> None:
        """A half's rows were enough for a round, or not."""
        self._share[half] += _EMA_WEIGHT * (enough - self._share[half])
