import numpy as np
import pytest

from codec.rans import LEAST_STATE, STATE_BYTES, TOTAL, SymbolReader, write_symbols


def alphabet(rng, size):
    """Random frequencies [size] of which none is 0, adding up to TOTAL, and where each begins."""
    frequencies = 1 + rng.multinomial(TOTAL - size, rng.dirichlet(np.full(size, 0.1)))
    return frequencies, frequencies.cumsum() - frequencies


def read(data, tables, n):
    reader, symbols = SymbolReader(data), []
    for frequencies, starts in tables[:n]:
        symbol = int((starts + frequencies).searchsorted(reader.slot, "right"))
        reader.take(int(starts[symbol]), int(frequencies[symbol]))
        symbols.append(symbol)
    return symbols, reader


@pytest.mark.parametrize("seed", range(5))
def test_symbols_of_changing_alphabets_come_back(seed):
    rng = np.random.default_rng(seed)
    tables = [alphabet(rng, int(rng.integers(1, 2000))) for _ in range(400)]
    symbols = [int(rng.integers(len(frequencies))) for frequencies, _ in tables]
    data = write_symbols(*(np.array([table[part][s] for table, s in zip(tables, symbols)]) for part in (1, 0)))
    assert read(data, tables, 400)[0] == symbols
    assert read(data, tables, 400)[1].at_end and not read(data, tables, 399)[1].at_end


def test_size_is_the_information_of_the_symbols():
    rng = np.random.default_rng(0)
    frequencies, starts = alphabet(rng, 1024)
    symbols = rng.choice(1024, 20_000, p=frequencies / TOTAL)
    bits = -np.log2(frequencies[symbols] / TOTAL).sum()
    n_bytes = len(write_symbols(starts[symbols], frequencies[symbols]))
    assert bits / 8 <= n_bytes <= bits / 8 * 1.001 + STATE_BYTES


def test_against_the_formula_in_plain_integers():
    """Without renormalization the state is Duda's x -> TOTAL floor(x / f) + start + x mod f of all symbols, last first."""
    starts, frequencies = np.array([0, 30_000, 100]), np.array([30_000, 35_536, 60_000])
    x = LEAST_STATE
    for start, frequency in reversed(list(zip(starts.tolist(), frequencies.tolist()))):
        x = TOTAL * (x // frequency) + start + x % frequency
    assert x < 2**32 and write_symbols(starts, frequencies) == x.to_bytes(4, "big")


def test_a_sure_symbol_takes_no_bits():
    assert len(write_symbols(np.zeros(1000, int), np.full(1000, TOTAL))) == STATE_BYTES


def test_damage_is_noticed_at_the_end_or_reads_other_symbols():
    rng = np.random.default_rng(1)
    tables = [alphabet(rng, 256)] * 300
    symbols = rng.integers(256, size=300)
    frequencies, starts = tables[0]
    data = bytearray(write_symbols(starts[symbols], frequencies[symbols]))
    noticed = 0
    for position in range(len(data)):
        damaged = bytes(data[:position]) + bytes([data[position] ^ 1]) + bytes(data[position + 1 :])
        got, reader = read(damaged, tables, 300)
        assert got != symbols.tolist() or not reader.at_end
        noticed += not reader.at_end
    assert noticed > 0.7 * len(data)  # one alphabet throughout can get into step again; a file has its CRC
