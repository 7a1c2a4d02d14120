"""A few machine operations that numba has no word for: eight bytes as one number, and the position of its lowest set bit.

Bytes are taken in little-endian order, which is that of every machine Arrow runs on.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_LOW = np.uint64(0x0101010101010101)
_HIGH = np.uint64(0x8080808080808080)


@intrinsic
def load64(_context: Any, array: Any, index: Any) -> Any:
    """`load64(array, index)`: array[index : index + 8] of a uint8 array as one uint64, wherever it lies. Unchecked."""
    if not (isinstance(array, types.Array) and array.dtype == types.uint8 and isinstance(index, types.Integer)):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        return builder.load(place, align=1)

    return types.uint64(array, types.int64), generate


@intrinsic
def store64(_context: Any, array: Any, index: Any, value: Any) -> Any:
    """`store64(array, index, value)`: the reverse of `load64`. Unchecked."""
    if not (isinstance(array, types.Array) and array.dtype == types.uint8 and isinstance(index, types.Integer)):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        builder.store(arguments[2], place, align=1)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.uint64), generate


@intrinsic
def other_bytes64(_context: Any, array: Any, index: Any, byte: Any) -> Any:
    """`other_bytes64(array, index, byte)`: a bit for each of array[index : index + 64], set where it is not `byte`. Unchecked."""
    if not (isinstance(array, types.Array) and array.dtype == types.uint8 and isinstance(index, types.Integer)):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 64)
        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), vector.as_pointer())
        loaded = builder.load(place, align=1)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[2], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)
        differs = builder.icmp_unsigned("!=", loaded, builder.shuffle_vector(one, one, zeros))
        return builder.bitcast(differs, ir.IntType(64))

    return types.uint64(array, types.int64, types.uint8), generate


@intrinsic
def trailing_zeros(_context: Any, value: Any) -> Any:
    """`trailing_zeros(value)`: the number of zero bits below the lowest set bit of a uint64; 64 for 0."""
    if not isinstance(value, types.Integer):
        return None

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@nb.njit(inline="always")
def leading_bytes_without(word: np.uint64, pattern: np.uint64) -> int:
    """How many bytes of `word`, from its lowest, come before the first that equals the byte repeated in `pattern`: 0..8."""
    other = word ^ pattern
    return trailing_zeros((other - _LOW) & ~other & _HIGH) >> 3


@nb.njit(inline="always")
def leading_plain_bytes(word: np.uint64) -> int:
    """How many bytes of `word`, from its lowest, come before the first with bit 7 set: 0..8."""
    return trailing_zeros(word & _HIGH) >> 3


@nb.njit(inline="always")
def low_bytes(count: int) -> np.uint64:
    """A mask of the lowest `count` bytes, 0..8 (two shifts, because one by 64 bits is undefined)."""
    half = np.uint64(count << 2)
    return ((np.uint64(1) << half) << half) - np.uint64(1)
