"""Rice code of a vector of small integers, vectorised in both directions.

Layout, least significant bit of a byte first: the low `parameter` bits of every element, element
after element; then every quotient q as q zeros and a one; then padding with zeros to a full byte.
"""

import numpy as np

MAX_PARAMETER = 15


def zigzag(values: np.ndarray) -> np.ndarray:
    """Map 0, -1, 1, -2, 2, ... to 0, 1, 2, 3, 4, ..."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


def unzigzag(values: np.ndarray) -> np.ndarray:
    """Invert `zigzag`."""
    return np.where(values & 1, -(values + 1) // 2, values // 2)


def best_parameter(values: np.ndarray) -> int:
    """Return the Rice parameter with the shortest code for integers >= 0."""
    return min(range(MAX_PARAMETER + 1), key=lambda p: len(values) * p + int((values >> p).sum()))


def code_bits(values: np.ndarray, parameter: int) -> int:
    """Return the number of bits of the code of `values`, before it is padded to a full byte."""
    return len(values) * (parameter + 1) + int((values >> parameter).sum())


def pack(values: np.ndarray, parameter: int) -> bytes:
    """Return the Rice code of a vector of integers >= 0."""
    remainders = (values[:, None] >> np.arange(parameter)) & 1
    unary = np.zeros(code_bits(values, parameter) - remainders.size, np.uint8)
    unary[np.cumsum((values >> parameter) + 1) - 1] = 1
    return np.packbits(
        np.r_[remainders.ravel().astype(np.uint8), unary], bitorder="little"
    ).tobytes()


def unpack(code: np.ndarray, count: int, parameter: int) -> np.ndarray:
    """Return the integers of a Rice code.

    Args:
        code: bytes of the code, uint8.
        count: number of integers.
        parameter: Rice parameter.

    Raises:
        ValueError: the code is not a result of `pack` for `count` elements.
    """
    bits = np.unpackbits(code, bitorder="little")
    planes, unary = bits[: count * parameter], bits[count * parameter :]
    ones = np.flatnonzero(unary)
    length = int(ones[-1]) + 1 if len(ones) else 0
    if len(planes) != count * parameter or len(ones) != count or len(unary) - length > 7:
        raise ValueError(f"{len(ones)} of {count} elements end inside {len(code)} bytes")
    quotients = np.diff(ones, prepend=-1) - 1
    remainders = planes.reshape(count, parameter).astype(np.int64) << np.arange(parameter)
    return (quotients << parameter) + remainders.sum(1)
