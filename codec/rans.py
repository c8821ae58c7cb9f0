"""Entropy coding: symbols to bytes by range asymmetric numeral systems, given how likely each was.

Whole numbers throughout, so that what one machine writes any other reads. Source: Duda 2013 (arXiv:1311.2540); byte by byte
as in Giesen's `rans_byte` (2014).
"""

import math

import numpy as np

STATE_BYTES = 4  # the state lies in [2**24, 2**32) between symbols
LEAST_STATE = 1 << 8 * (STATE_BYTES - 1)
TOTAL_BITS = 16
TOTAL = 1 << TOTAL_BITS  # what the frequencies of all symbols add up to


def least_bits(alphabet_size: int) -> float:
    """What a symbol takes at least, where none of so many is impossible; 0 for an alphabet of one."""
    return -math.log2(max(TOTAL - alphabet_size + 1, 1) / TOTAL)


def write_symbols(starts: np.ndarray, frequencies: np.ndarray) -> bytes:
    """Symbols to bytes that `SymbolReader` takes in the same order.

    Args:
        starts: [n] whole numbers: of each symbol the sum of the frequencies of those before it in its alphabet.
        frequencies: [n] whole numbers from 1 to TOTAL: of each symbol its own.
    """
    state, emitted = LEAST_STATE, bytearray()
    for start, frequency in zip(reversed(starts.tolist()), reversed(frequencies.tolist())):
        while state >= (LEAST_STATE >> TOTAL_BITS << 8) * frequency:
            emitted.append(state & 255)
            state >>= 8
        state = (state // frequency << TOTAL_BITS) + state % frequency + start
    return state.to_bytes(STATE_BYTES, "big") + emitted[::-1]


class SymbolReader:
    """Inverse of `write_symbols`: ask `slot`, find the symbol whose [start, start + frequency) holds it, `take` that."""

    def __init__(self, data: bytes):
        self.data, self.position = data, STATE_BYTES
        self.state = int.from_bytes(data[:STATE_BYTES], "big")

    @property
    def slot(self) -> int:
        return self.state & TOTAL - 1

    def take(self, start: int, frequency: int) -> None:
        """Go on past a symbol."""
        self.state = frequency * (self.state >> TOTAL_BITS) + self.slot - start
        while self.state < LEAST_STATE and self.position < len(self.data):
            self.state = self.state << 8 | self.data[self.position]
            self.position += 1

    @property
    def at_end(self) -> bool:
        """Whether all bytes are used and the state is what writing began with: most damaged data does not get there."""
        return self.position == len(self.data) and self.state == LEAST_STATE
