"""What the package checks of plain arguments before ctypes, which cuts integers off and names nothing. Each raises TypeError or ValueError that names the
argument, its value and what is allowed."""
import numbers
import os

S32_MIN, S32_MAX, S64_MAX = -2**31, 2**31 - 1, 2**63 - 1


def integer(name, value, least, most):
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: allowed is an integer")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}: allowed is {least} to {most}")
    return int(value)


def number(name, value):
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: allowed is a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {value}: allowed is a number that f64 can hold") from None


def flag(name, value):
    """0 or 1."""
    is_integer = isinstance(value, numbers.Integral) or type(value).__name__ in ("bool_", "bool")  # NumPy's bool is no Integral
    if not is_integer or value not in (0, 1):
        raise TypeError(f"{name} is {value!r}: allowed is True or False")
    return int(value)


def chosen(name, value, allowed):
    """`value`, which is one of `allowed`, a sequence or a table."""
    if not isinstance(value, (str, type(None))) or value not in allowed:
        raise ValueError(f"{name} is {value!r}: allowed is {', '.join(repr(key) for key in allowed)}")
    return value


def path(name, value):
    """As bytes."""
    try:
        encoded = os.fsencode(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: allowed is a path") from None
    if b"\0" in encoded:
        raise ValueError(f"{name} is {value!r}: allowed is a path without a null character")
    return encoded


def stream(value):
    """Of a CUstream's address, or of torch's or CuPy's stream objects."""
    for attribute in ("cuda_stream", "ptr"):
        value = getattr(value, attribute, value)
    if not isinstance(value, numbers.Integral) or not 0 <= value < 2**64:
        raise TypeError(f"stream is {value!r}: allowed is the address of a CUstream, a stream of torch or CuPy, or None")
    return int(value)
