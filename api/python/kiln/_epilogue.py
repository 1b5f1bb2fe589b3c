"""int8_mm's epilogue from Python values: which stages a call has, for the desc, and their values, for the args."""
import ctypes
import numbers

from . import _library as c
from . import _values as check
from ._arrays import as_array


def _checked(name, value, kind):
    return check.number(name, value) if kind is ctypes.c_float else check.integer(name, value, check.S32_MIN, check.S32_MAX)


class Epilogue:
    """`desc`: fields of Int8MmDesc; `args`: of Int8MmArgs, which point into what this object keeps alive."""

    def __init__(self, m, n, device, *, scale=None, mult=None, shift=None, shift_right=None, shift_left=None, a_zp=None,
                 b_zp=None, bias=None, rounding="zero", act=None, slope=None, slope_mult=None, slope_shift=None, c_zp=None, clamp=None):
        self._kept, self._device = [], device
        self.desc, self.args = {}, {}
        self._add_each("a_zp", a_zp, m, ctypes.c_int32)
        self._add_each("b_zp", b_zp, n, ctypes.c_int32)
        if bias is not None:
            if isinstance(bias, numbers.Number):
                raise TypeError(f"bias is {bias!r}: allowed is an array of {n}")
            self.desc["bias"], self.args["bias"] = c.EACH, self._pointer("bias", bias, n, ctypes.c_int32)
        self._add_rescale(n, scale, mult, shift, shift_right, shift_left)
        self.desc["rounding"] = c.ROUNDINGS[check.chosen("rounding", rounding, c.ROUNDINGS)]
        self.desc["act"] = c.ACTS[check.chosen("act", act, c.ACTS)]
        self._add_slope(act, slope, slope_mult, slope_shift)
        if c_zp is not None:
            self.desc["c_zp"], self.args["c_zp"] = c.ONE, _checked("c_zp", c_zp, ctypes.c_int32)
        if clamp is not None:
            try:
                lo, hi = (float(bound) for bound in clamp)
            except (TypeError, ValueError):
                raise TypeError(f"clamp is {clamp!r}: allowed is (lo, hi)") from None
            except OverflowError:
                raise ValueError(f"clamp is {clamp}: allowed are bounds that f64 can hold") from None
            self.desc["clamp"] = c.ONE
            self.args.update(lo=lo, hi=hi)

    def _add_rescale(self, n, scale, mult, shift, shift_right, shift_left):
        given = [name for name, value in (("scale", scale), ("mult", mult), ("shift_right", shift_right), ("shift_left", shift_left))
                 if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: allowed is one of scale, mult with shift, shift_right, shift_left")
        if (mult is None) != (shift is None):
            raise ValueError(f"{'shift' if mult is None else 'mult'} is given alone: allowed are mult and shift together")
        if not given:
            self.desc.update(rescale=c.RESCALES[None], rescale_per=c.PER_CHANNEL)
            return
        rescale = "q_scale" if mult is not None else given[0]
        values = {"scale": {"scale": scale}, "q_scale": {"mult": mult, "shift": shift}, "shift_right": {"shift": shift_right},
                  "shift_left": {"shift": shift_left}}[rescale]
        kind = ctypes.c_float if rescale == "scale" else ctypes.c_int32
        named = {name: given[0] if name == "shift" and mult is None else name for name in values}
        per_tensor = all(self._is_one(named[name], value, n) for name, value in values.items())
        self.desc.update(rescale=c.RESCALES[rescale], rescale_per=c.PER_TENSOR if per_tensor else c.PER_CHANNEL)
        for name, value in values.items():
            self.args[name] = self._pointer(named[name], value, 1 if per_tensor else n, kind)

    def _add_slope(self, act, slope, slope_mult, slope_shift):
        scaled = self.desc["rescale"] == c.RESCALES["scale"]
        wanted = () if act != "leaky_relu" else ("slope",) if scaled else ("slope_mult", "slope_shift")
        for name, value in (("slope", slope), ("slope_mult", slope_mult), ("slope_shift", slope_shift)):
            if (value is not None) != (name in wanted):
                raise ValueError(f"{name} is {value}: allowed with act={act!r} and {'scale' if scaled else 'no scale'} "
                                 f"{'is a number' if name in wanted else 'is None'}")
            if value is not None:
                self.args[name] = _checked(name, value, ctypes.c_float if name == "slope" else ctypes.c_int32)

    def _add_each(self, name, value, count, kind):
        if value is None:
            return
        one = self._is_one(name, value, count)
        self.desc[name] = c.ONE if one else c.EACH
        self.args[name] = self._pointer(name, value, 1 if one else count, kind)

    @staticmethod
    def _is_one(name, value, count):
        """A number, or an array of one element where `count` is another."""
        return isinstance(value, numbers.Number) or (as_array(value, name).shape == (1,) and count != 1)

    def _pointer(self, name, value, count, kind):
        if isinstance(value, numbers.Number):
            if self._device[0] != c.CPU:
                raise ValueError(f"{name} is a number: allowed on a GPU is an array there")
            values = (kind * max(count, 1))(*[_checked(name, value, kind)] * count)
            self._kept.append(values)
            return ctypes.addressof(values)
        array = as_array(value, name).expect(name, "f32" if kind is ctypes.c_float else "s32", (count,), self._device)
        self._kept.append(array.expect_dense(name))
        return array.pointer
