"""The operators of api/doc/quantised-graphs.md, each computed as its specification says, in NumPy, against the one Kiln call it maps to.
Usage: quantised_graphs_test.py SOURCE_ROOT LIBKILN"""
import os
import pathlib
import sys
import unittest

ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
os.environ["KILN_LIBRARY"] = sys.argv.pop(1)
sys.path.insert(0, str(ROOT / "api/python"))

try:
    import numpy as np
except ImportError:
    print("no NumPy")
    sys.exit(77)

import kiln  # noqa: E402

SHAPES = [(1, 48, 64), (7, 33, 100), (40, 130, 513)]
TYPES = (np.int8, np.uint8)


def wrapped(values):
    return ((values + 2**31) % 2**32 - 2**31).astype(np.int32)


def saturated(values, dtype):
    return np.clip(values, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


class Graphs(unittest.TestCase):
    def setUp(self):
        self.engine = kiln.Engine(cache="off", threads=1)
        self.rng = np.random.default_rng(7)

    def of(self, dtype, shape):
        return self.rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, shape).astype(dtype)

    def zero_points(self, dtype, count):
        """As ONNX gives them, of the operand's type: one, and one for each row or column; and as int32 for Kiln."""
        for values in (self.of(dtype, 1), self.of(dtype, count)):
            yield values.astype(np.int64), values.astype(np.int32) if len(values) > 1 else int(values[0])

    def mm(self, a, b, out_dtype, **stages):
        """b [k, n], as in these graphs."""
        out = np.zeros((a.shape[0], b.shape[1]), out_dtype)
        return self.engine.int8_mm(a, self.engine.pack_int8(b, "kn"), out, **stages)

    def operands(self):
        for m, n, k in SHAPES:
            for a_type in TYPES:
                for b_type in TYPES:
                    a, b = self.of(a_type, (m, k)), self.of(b_type, (k, n))
                    for az, a_zp in self.zero_points(a_type, m):
                        for bz, b_zp in self.zero_points(b_type, n):
                            sums = (a.astype(np.int64) - az[:, None]) @ (b.astype(np.int64) - bz[None, :])
                            yield a, b, sums, {"a_zp": a_zp, "b_zp": b_zp}

    def test_onnx_matmul_integer(self):
        for a, b, sums, stages in self.operands():
            np.testing.assert_array_equal(wrapped(sums), self.mm(a, b, np.int32, **stages))

    def test_onnx_qlinear_matmul(self):
        seen = set()
        for a, b, sums, stages in self.operands():
            n = b.shape[1]
            for b_scale in (np.float32(0.011), self.rng.random(n, dtype=np.float32) * np.float32(0.02)):
                y_scale = np.float32(np.abs(sums * (b_scale * 0.017)).max() / 150)  # some beyond the type
                scale = np.float32(0.017) * b_scale / y_scale
                given = scale if scale.shape else float(scale)
                for y_type in TYPES:
                    y_zp = int(self.rng.integers(-30, 31)) + (128 if y_type is np.uint8 else 0)
                    real = sums.astype(np.float32) * scale
                    expected = saturated(np.rint(real).astype(np.int64) + y_zp, y_type)
                    np.testing.assert_array_equal(expected, self.mm(a, b, y_type, scale=given, c_zp=y_zp, **stages))
                    relu = saturated(np.rint(np.maximum(real, 0)).astype(np.int64) + y_zp, y_type)
                    np.testing.assert_array_equal(relu, self.mm(a, b, y_type, scale=given, c_zp=y_zp, act="relu", **stages))
                    seen.update(expected.flat)
        self.assertGreater(len(seen), 350)  # of -128 … 255: not all at the ends of the types

    def test_onnx_qgemm(self):
        for a, b, sums, stages in self.operands():
            bias = self.rng.integers(-2**16, 2**16, b.shape[1], dtype=np.int32)
            scale, y_zp = np.float32(0.002), 17
            expected = saturated(np.rint((sums + bias).astype(np.float32) * scale).astype(np.int64) + y_zp, np.uint8)
            np.testing.assert_array_equal(expected, self.mm(a, b, np.uint8, scale=float(scale), bias=bias, c_zp=y_zp, **stages))

    def test_onnx_matmul_integer_to_float(self):
        for a, b, sums, stages in self.operands():
            scale = np.float32(0.03) * self.rng.random(b.shape[1], dtype=np.float32)
            np.testing.assert_array_equal(wrapped(sums).astype(np.float32) * scale, self.mm(a, b, np.float32, scale=scale, **stages))

    def test_torch_quantized_linear(self):
        for m, n, k in SHAPES:
            x, w = self.of(np.uint8, (m, k)), self.of(np.int8, (n, k))
            x_scale, x_zp, y_scale, y_zp = np.float32(0.02), 121, np.float32(0.9), 130
            w_scale = self.rng.random(n, dtype=np.float32) * np.float32(0.01)
            bias = np.rint(self.rng.standard_normal(n, dtype=np.float32) / (x_scale * w_scale)).astype(np.int32)
            sums = (x.astype(np.int64) - x_zp) @ w.T.astype(np.int64) + bias
            scale = x_scale * w_scale / y_scale
            for act in (None, "relu"):
                real = sums.astype(np.float32) * scale
                expected = saturated(np.rint(real if act is None else np.maximum(real, 0)).astype(np.int64) + y_zp, np.uint8)
                out = np.zeros((m, n), np.uint8)
                self.engine.int8_mm(x, self.engine.pack_int8(w), out, a_zp=x_zp, bias=bias, scale=scale, act=act, c_zp=y_zp)
                np.testing.assert_array_equal(expected, out)

    def test_tract_fused_ops(self):
        """QScale: acc · mult / 2^(31 + shift), by its policy; then the rest of the sequence, in Python integers."""
        def scaled(value, mult, shift, policy):
            v, s = value * mult, 31 + shift
            half, magnitude = 1 << (s - 1), abs(v)
            nudge = {"zero": -1, "away": 0, "minus_inf": -(v >= 0), "plus_inf": -(v <= 0), "even": (magnitude >> s & 1) - 1,
                     "odd": -(magnitude >> s & 1)}[policy]
            rounded = magnitude + half + nudge >> s
            return rounded if v >= 0 else -rounded

        m, n, k = 9, 40, 24
        a, b = self.of(np.int8, (m, k)), self.of(np.uint8, (k, n))
        a_zp, b_zp, c_zp, lo, hi = -5, 131, 4, -100, 90
        bias = self.rng.integers(-3000, 3000, n, dtype=np.int32)
        sums = (a.astype(np.int64) - a_zp) @ (b.astype(np.int64) - b_zp) + bias
        # Powers of two make ties; the others are what trained graphs have.
        mult = np.where(np.arange(n) % 2 == 0, 1 << 30, self.rng.integers(1 << 30, 2**31, n)).astype(np.int32)
        shift = np.where(np.arange(n) % 2 == 0, 2, 9).astype(np.int32)
        for policy in ("zero", "away", "minus_inf", "plus_inf", "even", "odd"):
            def element(i, j):
                value = scaled(int(sums[i, j]), int(mult[j]), int(shift[j]), policy)
                if value < 0:
                    value = scaled(value, 1 << 30, 1, policy)
                return min(max(value + c_zp, lo), hi)
            expected = np.array([[element(i, j) for j in range(n)] for i in range(m)], np.int8)
            out = self.mm(a, b, np.int8, a_zp=a_zp, b_zp=b_zp, bias=bias, mult=mult, shift=shift, rounding=policy, act="leaky_relu",
                          slope_mult=1 << 30, slope_shift=1, c_zp=c_zp, clamp=(lo, hi))
            np.testing.assert_array_equal(expected, out, policy)


if __name__ == "__main__":
    unittest.main()
