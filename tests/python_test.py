"""The Python package on NumPy arrays and CPUs: results, strides, and errors that name the array.
Usage: python_test.py SOURCE_ROOT LIBKILN"""
import os
import pathlib
import re
import sys
import tempfile
import types
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

DATA = ROOT / "tests/data/int4"


def case(name):
    n, k, tiles, group, m = (int(part[1:]) for part in name.split("_"))
    load = lambda what: np.load(DATA / f"{name}.{what}.npy")  # noqa: E731
    return n, k, tiles, group, m, load("w"), load("packed"), load("sz"), load("x"), load("y")


def as_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class TorchLike:
    """What the package sees of a torch tensor on the CPU, over a NumPy array."""

    def __init__(self, array, dtype):
        self._array, self.dtype, self.shape = array, f"torch.{dtype}", array.shape
        self.device = types.SimpleNamespace(type="cpu", index=None)

    def data_ptr(self):
        return self._array.__array_interface__["data"][0]

    def stride(self):
        return tuple(stride // self._array.itemsize for stride in self._array.strides)


CASES = sorted({path.name.split(".")[0] for path in DATA.glob("*.npy")})


class Python(unittest.TestCase):
    def setUp(self):
        self.engine = kiln.Engine(cache="off", threads=1)

    def test_int4_mm_equals_torch_within_its_rounding(self):
        self.assertGreaterEqual(len(CASES), 6)
        for name in CASES:
            n, k, tiles, group, m, w, packed, sz, x, y = case(name)
            for weights in (w, packed):
                with self.subTest(name, dtype=str(weights.dtype)):
                    pack = self.engine.pack_int4(weights, sz, group)
                    self.assertEqual({"n": n, "k": k}, {key: pack.info()[key] for key in "nk"})
                    out = np.zeros((m, n + 3), np.uint16)[:, :n]
                    self.assertIs(out, self.engine.int4_mm(x, pack, out))
                    error = np.linalg.norm(as_float(out) - as_float(y)) / np.linalg.norm(as_float(y))
                    self.assertLess(error, 6e-3)
        self.assertEqual("reference", self.engine.int4_kernel(1, pack).info()["isa"])

    def test_weights_turn_into_each_other(self):
        for name in CASES:
            n, k, tiles, group, m, w, packed, *_ = case(name)
            np.testing.assert_array_equal(packed, kiln.int4_to_tensor_core(w, tiles, np.empty_like(packed)))
            np.testing.assert_array_equal(w, kiln.int4_from_tensor_core(packed, np.empty_like(w)))

    def test_int8_mm_is_exact(self):
        rng = np.random.default_rng(1)
        for m, n, k in ((1, 40, 100), (33, 17, 64)):
            a, b = (rng.integers(-128, 128, shape, dtype=np.int8) for shape in ((m, k), (n, k)))
            expected = a.astype(np.int32) @ b.T.astype(np.int32)
            for pack in (self.engine.pack_int8(b), self.engine.pack_int8(np.ascontiguousarray(b.T), "kn")):
                out = np.zeros((m, n), np.int32)
                self.engine.int8_mm(a, pack, out)
                np.testing.assert_array_equal(expected, out)

    def test_int8_mm_stages_in_numbers_and_arrays(self):
        rng = np.random.default_rng(2)
        m, n, k = 5, 24, 40
        for a_type, b_type in ((np.int8, np.uint8), (np.uint8, np.int8)):
            a, b = (rng.integers(np.iinfo(t).min, np.iinfo(t).max + 1, shape).astype(t) for t, shape in ((a_type, (m, k)), (b_type, (n, k))))
            pack = self.engine.pack_int8(b)
            bias = rng.integers(-9000, 9000, n, dtype=np.int32)
            for a_zp, b_zp in ((3, rng.integers(-5, 200, n, dtype=np.int32)), (rng.integers(-5, 200, m, dtype=np.int32), np.array([7], np.int32))):
                left = a.astype(np.int64) - np.reshape(a_zp, (-1, 1))
                right = b.astype(np.int64).T - np.reshape(b_zp, (1, -1))
                sums = left @ right + bias
                out = np.zeros((m, n), np.int32)
                self.engine.int8_mm(a, pack, out, a_zp=a_zp, b_zp=b_zp, bias=bias)
                np.testing.assert_array_equal(sums, out)
                # To nearest, ties to plus infinity: an addition and a shift.
                out = np.zeros((m, n), np.int8)
                self.engine.int8_mm(a, pack, out, a_zp=a_zp, b_zp=b_zp, bias=bias, shift_right=9, rounding="plus_inf", c_zp=-3, clamp=(-100, 50))
                np.testing.assert_array_equal(np.clip((sums + 256 >> 9) - 3, -100, 50), out)
                mult, shift = rng.integers(1, 2**31, n, dtype=np.int32), rng.integers(0, 9, n, dtype=np.int32)
                out = np.zeros((m, n), np.uint8)
                self.engine.int8_mm(a, pack, out, a_zp=a_zp, b_zp=b_zp, bias=bias, mult=mult, shift=shift, rounding="plus_inf", act="relu")
                scaled = sums * mult + (1 << (30 + shift.astype(np.int64))) >> (31 + shift.astype(np.int64))
                np.testing.assert_array_equal(np.clip(scaled, 0, 255), out)
                out = np.zeros((m, n), np.int32)
                self.engine.int8_mm(a, pack, out, a_zp=a_zp, b_zp=b_zp, bias=bias, shift_left=np.full(n, 2, np.int32), act="leaky_relu",
                                    slope_mult=1 << 30, slope_shift=1, rounding="plus_inf")
                np.testing.assert_array_equal(np.where(sums < 0, (sums << 2) + 2 >> 2, sums << 2), out)  # times 1/2 · 1/2
                for scale, dtype in ((0.0078125, np.float32), (rng.random(n, dtype=np.float32), np.float16)):
                    out = np.zeros((m, n), dtype)
                    self.engine.int8_mm(a, pack, out, scale, a_zp=a_zp, b_zp=b_zp, bias=bias, act="leaky_relu", slope=0.25)
                    y = sums.astype(np.float32) * np.float32(scale)
                    with np.errstate(over="ignore"):
                        np.testing.assert_array_equal(np.where(y < 0, y * np.float32(0.25), y).astype(dtype), out)

    def test_int8_linear_by_its_definition(self):
        rng = np.random.default_rng(3)
        m, n, k = 6, 20, 70
        w, ws, bias = rng.integers(-128, 128, (n, k), dtype=np.int8), rng.random(n, dtype=np.float32) + 1, rng.random(n, dtype=np.float32)
        x = (rng.random((m, k), dtype=np.float32) - 0.5) * np.logspace(-3, 3, m, dtype=np.float32)[:, None]
        x[2], x[4, 3] = 0, np.nan
        for pack in (self.engine.pack_int8_linear(w), self.engine.pack_int8_linear(np.ascontiguousarray(w.T), "kn")):
            for x_in, y_type in ((x, np.float32), (x.astype(np.float16), np.float16)):
                values = x_in.astype(np.float32)
                most = np.abs(values).max(axis=1, keepdims=True)
                with np.errstate(all="ignore"):
                    s, r = most / np.float32(127), np.float32(127) / most
                    q = np.where(np.isfinite(r), np.rint(values * r), 0)
                    s = np.where(np.isfinite(r) | np.isnan(most), s, np.float32(0))
                    sums = np.nan_to_num(q).astype(np.int64) @ w.T.astype(np.int64)
                    # Of f32 products exact in f64: one rounding, as fma makes it, but for double rounding in the last bit.
                    expected = sums.astype(np.float32).astype(np.float64) * (s * ws).astype(np.float64)
                for given in (None, bias):
                    out = np.zeros((m, n + 1), y_type)[:, :n]
                    self.assertIs(out, self.engine.int8_linear(x_in, pack, ws, out, given))
                    with np.errstate(over="ignore"):
                        want = (expected + (0 if given is None else given)).astype(np.float32).astype(y_type)
                    np.testing.assert_array_max_ulp(want[[0, 1, 2, 3, 5]], out[[0, 1, 2, 3, 5]], 1)
                    self.assertTrue(np.isnan(out[4]).all())
        bits = np.zeros((m, n), np.uint16)
        self.engine.int8_linear(x, pack, ws, bits)
        out = np.zeros((m, n), np.float32)
        self.engine.int8_linear(x, pack, ws, out)
        rows = [0, 1, 2, 3, 5]
        self.assertLessEqual(np.abs(as_float(bits)[rows] - out[rows]).max(), np.abs(out[rows]).max() * 2**-8)

    def test_tensors_by_their_methods(self):
        """As torch has them: data_ptr(), stride(), a dtype with a name."""
        rng = np.random.default_rng(4)
        a, b = rng.integers(0, 256, (3, 32), dtype=np.uint8), rng.integers(-128, 128, (16, 32), dtype=np.int8)
        zero, out = np.full(3, 128, np.int32), np.zeros((3, 16), np.float16)
        self.engine.int8_mm(TorchLike(a, "uint8"), self.engine.pack_int8(TorchLike(b, "int8")), TorchLike(out, "float16"),
                            scale=TorchLike(np.full(16, 2**-9, np.float32), "float32"), a_zp=TorchLike(zero, "int32"))
        np.testing.assert_array_equal(((a.astype(np.int32) - 128) @ b.T.astype(np.int32) * 2**-9).astype(np.float16), out)
        x, y, ws = np.ones((2, 32), np.float32), np.zeros((2, 16), np.float16), np.full(16, 2**-7, np.float32)
        self.engine.int8_linear(TorchLike(x, "float32"), self.engine.pack_int8_linear(TorchLike(b, "int8")), TorchLike(ws, "float32"), TorchLike(y, "float16"))
        np.testing.assert_allclose(np.tile(b.astype(np.float64).sum(axis=1) * 2**-7, (2, 1)), y, rtol=1e-3)

    def test_attention(self):
        rng = np.random.default_rng(2)
        bits = lambda values: ((values.astype(np.float32).view(np.uint32).astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)  # noqa: E731
        b, hq, hkv, m, n, d, dv = 2, 6, 3, 5, 40, 24, 16
        q = bits(rng.standard_normal((b, m, hq, d))).transpose(0, 2, 1, 3)  # heads within a row, as projections leave them
        k, v = bits(rng.standard_normal((b, hkv, n + 7, d)))[:, :, :n], bits(rng.standard_normal((b, hkv, n + 7, dv)))[:, :, :n]
        kv_len = np.array([n, 17], np.int32)
        for causal in ("none", "top_left", "bottom_right"):
            for lengths, scale in ((None, None), (kv_len, 0.3)):
                out, lse = np.zeros((b, m, hq, dv), np.uint16).transpose(0, 2, 1, 3), np.zeros((b, hq, m), np.float32)
                self.assertIs(out, self.engine.attention(q, k, v, out, causal, lengths, scale, lse))
                scores = np.einsum("bhmd,bhnd->bhmn", as_float(q), np.repeat(as_float(k), hq // hkv, 1)) * (scale or d**-0.5)
                for batch in range(b):
                    keys = n if lengths is None else lengths[batch]
                    ends = {"none": [keys] * m, "top_left": range(1, m + 1), "bottom_right": range(keys - m + 1, keys + 1)}[causal]
                    for row, end in enumerate(ends):
                        scores[batch, :, row, min(end, keys):] = -np.inf
                p = np.exp(scores)
                expected = np.einsum("bhmn,bhnd->bhmd", p / p.sum(-1, keepdims=True), np.repeat(as_float(v), hq // hkv, 1))
                self.assertLess(np.linalg.norm(as_float(out) - expected) / np.linalg.norm(expected), 6e-3)
                np.testing.assert_allclose(lse, np.log(p.sum(-1)), 1e-3, 1e-3)
                again = np.zeros_like(out)
                self.engine.attention(*(TorchLike(tensor, "bfloat16") for tensor in (q, k, v, again)), causal=causal, scale=scale,
                                      kv_len=None if lengths is None else TorchLike(lengths, "int32"), lse=TorchLike(np.zeros_like(lse), "float32"))
                np.testing.assert_array_equal(out, again)
        for says, call in {
            "q is f32: allowed is bf16": lambda: self.engine.attention(q.astype(np.float32), k, v, out),
            "k has shape (2, 3, 40, 23): allowed is (2, any, any, 24)": lambda: self.engine.attention(q, k[..., 1:], v, out),
            "v has shape": lambda: self.engine.attention(q, k, v[:, :2], out),
            "out has shape (2, 6, 4, 16): allowed is (2, 6, 5, 16)": lambda: self.engine.attention(q, k, v, out[:, :, :4]),
            "q has strides": lambda: self.engine.attention(np.asfortranarray(q), k, v, out),
            "kv_len has shape (1,): allowed is (2": lambda: self.engine.attention(q, k, v, out, kv_len=kv_len[:1]),
            "lse has shape": lambda: self.engine.attention(q, k, v, out, lse=lse[0]),
            "causal is 'left': allowed is 'none', 'top_left', 'bottom_right'": lambda: self.engine.attention(q, k, v, out, "left"),
            "scale is 0": lambda: self.engine.attention(q, k, v, out, scale=0),
        }.items():
            with self.subTest(says), self.assertRaises((TypeError, ValueError)) as raised:
                call()
            self.assertIn(says, str(raised.exception))
        for says, call in {
            "hq=4: allowed is a multiple of hkv, 3": lambda: self.engine.attention(q[:, :4], k, v, out[:, :4]),
            "scale is -1": lambda: self.engine.attention(q, k, v, out, scale=-1),
            "scale is nan": lambda: self.engine.attention(q, k, v, out, scale=float("nan")),
            "kv_len[1] is 41: allowed is 0 to n, 40": lambda: self.engine.attention(q, k, v, out, kv_len=kv_len + np.int32([0, 24])),
            "o is in memory that q spans": lambda: self.engine.attention(q[..., :16], k[..., :16], v, q[..., :16]),
        }.items():
            with self.subTest(says), self.assertRaises(kiln.Error) as raised:
                call()
            self.assertIn(says, str(raised.exception))
            self.assertEqual("invalid_argument", raised.exception.status)

    def test_errors_of_stages_name_them(self):
        a, b, out = np.zeros((3, 8), np.int8), np.zeros((4, 8), np.int8), np.zeros((3, 4), np.int8)
        pack, linear = self.engine.pack_int8(b), self.engine.pack_int8_linear(b)
        mm = lambda out=out, **stages: self.engine.int8_mm(a, pack, out, **stages)  # noqa: E731
        x, ws, y = np.zeros((3, 8), np.float32), np.zeros(4, np.float32), np.zeros((3, 4), np.float32)
        s32 = lambda *values: np.array(values, np.int32)  # noqa: E731
        for says, call in {
            "a_zp has shape (2,): allowed is (3)": lambda: mm(a_zp=s32(1, 2)),
            "b_zp has shape (3,): allowed is (4)": lambda: mm(b_zp=s32(1, 2, 3)),
            "bias has shape (1,): allowed is (4)": lambda: mm(bias=s32(1)),
            "bias is 3: allowed is an array of 4": lambda: mm(bias=3),
            "mult is f32: allowed is s32": lambda: mm(mult=np.ones(4, np.float32), shift=1),
            "shift has shape (5,): allowed is (4)": lambda: mm(mult=1, shift=s32(1, 2, 3, 4, 5)),
            "mult is given alone": lambda: mm(mult=1),
            "shift is given alone": lambda: mm(shift=1),
            "scale and shift_right are given": lambda: mm(scale=1.0, shift_right=1),
            "shift_right is 1.5: allowed is an integer": lambda: mm(shift_right=1.5),
            "c_zp is 4294967296: allowed is -2147483648 to 2147483647": lambda: mm(c_zp=2**32),
            "rounding is 'up': allowed is 'zero'": lambda: mm(shift_right=1, rounding="up"),
            "act is 'gelu': allowed is None, 'relu', 'leaky_relu'": lambda: mm(act="gelu"),
            "slope is None": lambda: mm(scale=1.0, act="leaky_relu"),
            "slope_mult is 1": lambda: mm(slope_mult=1),
            "clamp is 5: allowed is (lo, hi)": lambda: mm(clamp=5),
            "a is f32: allowed is s8 or u8": lambda: self.engine.int8_mm(a.astype(np.float32), pack, out),
            "b is s32: allowed is s8 or u8": lambda: self.engine.pack_int8(b.astype(np.int32)),
            "w is u8: allowed is s8": lambda: self.engine.pack_int8_linear(b.astype(np.uint8)),
            "layout is 'km'": lambda: self.engine.pack_int8_linear(b, "km"),
            "x is s8: allowed is bf16, f16 or f32": lambda: self.engine.int8_linear(a, linear, ws, y),
            "out is s8: allowed is bf16, f16 or f32": lambda: self.engine.int8_linear(x, linear, ws, out),
            "ws has shape (3,): allowed is (4)": lambda: self.engine.int8_linear(x, linear, ws[:3], y),
            "bias is s32: allowed is f32": lambda: self.engine.int8_linear(x, linear, ws, y, bias=s32(1, 2, 3, 4)),
        }.items():
            with self.subTest(says), self.assertRaises((TypeError, ValueError)) as raised:
                call()
            self.assertIn(says, str(raised.exception))
        for says, call in {
            "mult is 0": lambda: mm(mult=0, shift=1),
            "mult[2] is -1": lambda: mm(mult=s32(1, 1, -1, 1), shift=1),
            "shift is 32": lambda: mm(mult=1, shift=32),
            "shift is 63": lambda: mm(shift_right=63),
            "shift[1] is -1": lambda: mm(shift_left=s32(0, -1, 0, 0)),
            "slope_mult is 0": lambda: mm(act="leaky_relu", slope_mult=0, slope_shift=0),
            "scale is inf": lambda: mm(scale=float("inf")),
            "lo is 1": lambda: mm(clamp=(1, 0)),
            "hi is 128": lambda: mm(clamp=(0, 128)),
            "c_dtype": lambda: mm(np.zeros((3, 4), np.float32), shift_right=1),
        }.items():
            with self.subTest(says), self.assertRaises(kiln.Error) as raised:
                call()
            self.assertIn(says, str(raised.exception))
            self.assertEqual("invalid_argument", raised.exception.status)

    def test_packs_in_files(self):
        *_, group, m, w, packed, sz, x, y = case(CASES[0])
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "w.pack"
            self.engine.pack_int4(w, sz, group).save(path)
            self.assertGreater(path.stat().st_size, w.nbytes)

    def test_fp8_block_bmm(self):
        rng = np.random.default_rng(3)
        b, m, n, k = 2, 5, 136, 144
        values = {"e4m3": lambda bits: np.where(bits & 0x78, 2.0 ** ((bits >> 3 & 15) - 7.0) * (1 + (bits & 7) / 8), (bits & 7) * 2.0 ** -9),
                  "e5m2": lambda bits: np.where(bits & 0x7C, 2.0 ** ((bits >> 2 & 31) - 15.0) * (1 + (bits & 3) / 4), (bits & 3) * 2.0 ** -16)}
        for x_dtype, y_dtype, out in (("e4m3", "e5m2", np.zeros((b, m, n), np.float32)), ("e5m2", "e4m3", np.zeros((b, m, n), np.float16)),
                                      ("e4m3", "e4m3", np.zeros((m, b, n + 8), np.uint16)[:, :, :n].transpose(1, 0, 2))):
            with self.subTest(x=x_dtype, y=y_dtype, out=str(out.dtype)):
                x = rng.integers(0, 0x40, (m, b, k + 16), dtype=np.uint8)[:, :, :k].transpose(1, 0, 2)
                y = rng.integers(0, 0x40, (b, n, k), dtype=np.uint8)
                xs = rng.random((b, 2, m), dtype=np.float32).transpose(0, 2, 1)
                ys = rng.random((b, 2, 2), dtype=np.float32)
                exact = np.einsum("bmk,bnk->bmn", values[x_dtype](x) * np.repeat(xs, 128, axis=2)[:, :, :k],
                                  values[y_dtype](y) * np.repeat(np.repeat(ys, 128, axis=1)[:, :n], 128, axis=2)[:, :, :k])
                self.assertIs(out, self.engine.fp8_block_bmm(x, y, xs, ys, out, x_dtype, y_dtype))
                got = as_float(out) if out.dtype == np.uint16 else out.astype(np.float64)
                self.assertLess(np.linalg.norm(got - exact) / np.linalg.norm(exact), {np.uint16: 4e-3, np.float16: 5e-4, np.float32: 1e-6}[out.dtype.type])
        self.assertEqual("reference", self.engine.fp8_kernel(b, m, n, k).info()["isa"])
        for says, call in {
            "x is u8 with x_dtype None": lambda: self.engine.fp8_block_bmm(x, y, xs, ys, out),
            "y is u8 with y_dtype s8": lambda: self.engine.fp8_block_bmm(x, y, xs, ys, out, "e4m3", "s8"),
            "y has strides": lambda: self.engine.fp8_block_bmm(x, np.asfortranarray(y), xs, ys, out, "e4m3", "e4m3"),
            "xs has shape (2, 5, 1): allowed is (2, 5, 2)": lambda: self.engine.fp8_block_bmm(x, y, xs[:, :, :1], ys, out, "e4m3", "e4m3"),
            "ys has shape": lambda: self.engine.fp8_block_bmm(x, y, xs, ys[:, :1], out, "e4m3", "e4m3"),
            "out is s8: allowed is bf16, f16 or f32": lambda: self.engine.fp8_block_bmm(x, y, xs, ys, np.zeros((b, m, n), np.int8), "e4m3", "e4m3"),
            "x has strides": lambda: self.engine.fp8_block_bmm(np.asfortranarray(x), y, xs, ys, out, "e4m3", "e4m3"),
        }.items():
            with self.subTest(says), self.assertRaises((TypeError, ValueError)) as raised:
                call()
            self.assertIn(says, str(raised.exception))
        with self.assertRaises(kiln.Error) as raised:
            self.engine.fp8_kernel(1, 1, 8, 24)
        self.assertIn("k=24: allowed is a multiple of 16", str(raised.exception))

    def test_errors_name_the_array(self):
        n, k, tiles, group, m, w, packed, sz, x, y = case("n64_k128_t4_g64_m3")
        pack, out = self.engine.pack_int4(w, sz, group), np.zeros_like(y)
        for says, call in {
            "x is f32: allowed is bf16": lambda: self.engine.int4_mm(x.astype(np.float32), pack, out),
            "x has shape (3, 127)": lambda: self.engine.int4_mm(x[:, :127], pack, out),
            "out has shape (2, 64): allowed is (3, 64)": lambda: self.engine.int4_mm(x, pack, out[:2]),
            "x has strides": lambda: self.engine.int4_mm(np.asfortranarray(x), pack, out),
            "sz has shape": lambda: self.engine.pack_int4(w, sz[:1], group),
            "group is 48": lambda: self.engine.pack_int4(w, sz, 48),
            "w has strides": lambda: self.engine.pack_int4(np.asfortranarray(w), sz, group),
            "device 'tpu'": lambda: self.engine.pack_int4(w, sz, group, device="tpu"),
            "x is list": lambda: self.engine.int4_mm([1], pack, out),
            "inner_k_tiles is 3": lambda: kiln.int4_to_tensor_core(w, 3, packed),
        }.items():
            with self.subTest(says), self.assertRaises((TypeError, ValueError)) as raised:
                call()
            self.assertIn(says, str(raised.exception))
        with self.assertRaises(kiln.Error) as raised:
            self.engine.pack_int4(w, sz, group, device="cuda:200")
        self.assertEqual("unsupported", raised.exception.status)
        with self.assertRaises(kiln.Error) as raised:
            self.engine.pack_int4(w[:, :24].copy(), np.zeros((1, 64, 2), np.uint16), 48)
        self.assertIn("group is 48: allowed is 32, 64, 128 or 256", str(raised.exception))

    def test_plain_arguments_are_named(self):
        """What ctypes would cut off or refuse without a name."""
        b = np.zeros((16, 32), np.int8)
        int4 = self.engine.pack_int4(np.zeros((8, 16), np.uint8), np.zeros((1, 8, 2), np.uint16), 32)
        int8, linear = self.engine.pack_int8(b), self.engine.pack_int8_linear(b)
        a, out, x, y, ws = np.zeros((1, 32), np.int8), np.zeros((1, 16), np.int32), np.zeros((1, 32), np.uint16), np.zeros((1, 8), np.uint16), np.zeros(16, np.float32)
        q = np.zeros((1, 1, 2, 8), np.uint16)
        f8, scales, z = np.zeros((1, 8, 16), np.uint8), np.zeros((1, 8, 1), np.float32), np.zeros((1, 8, 8), np.float32)
        attention = lambda *arguments, **named: self.engine.attention(q, q, q, q.copy(), *arguments, **named)  # noqa: E731
        fp8_kernel = lambda **named: self.engine.fp8_kernel(**{"b": 1, "m": 1, "n": 8, "k": 16, **named})  # noqa: E731
        fixed = lambda array: np.broadcast_to(array, array.shape)  # noqa: E731  read-only
        for says, call in {
            "x_dtype is 'foo': allowed is 'e4m3', 'e5m2'": lambda: fp8_kernel(x_dtype="foo"),
            "x_dtype is 'bf16': allowed is 'e4m3', 'e5m2'": lambda: fp8_kernel(x_dtype="bf16"),
            "y_dtype is None: allowed is 'e4m3', 'e5m2'": lambda: fp8_kernel(y_dtype=None),
            "z_dtype is ['bf16']: allowed is 'bf16', 'f16', 'f32'": lambda: fp8_kernel(z_dtype=["bf16"]),
            "m is '1': allowed is an integer": lambda: fp8_kernel(m="1"),
            "n is 8.0: allowed is an integer": lambda: fp8_kernel(n=8.0),
            "k is 18446744073709551632: allowed is 0 to": lambda: fp8_kernel(k=2**64 + 16),
            "m is -2: allowed is -1 to": lambda: fp8_kernel(m=-2),
            "b is True: allowed is an integer": lambda: fp8_kernel(b=True),
            "batch_invariant is 'no': allowed is True or False": lambda: fp8_kernel(batch_invariant="no"),
            "batch_invariant is 2: allowed is True or False": lambda: attention(batch_invariant=2),
            "device 'cuda:4294967296': allowed is cpu, cuda or cuda:N": lambda: fp8_kernel(device="cuda:4294967296"),
            "device 'cuda:256': allowed is cpu, cuda or cuda:N": lambda: fp8_kernel(device="cuda:256"),
            "device 'cuda:²'": lambda: fp8_kernel(device="cuda:²"),
            "device 'cuda:'": lambda: fp8_kernel(device="cuda:"),
            "device 'None'": lambda: fp8_kernel(device=None),
            "m is 1.5: allowed is an integer": lambda: self.engine.int4_kernel(1.5, int4),
            "m is None: allowed is an integer": lambda: self.engine.int4_kernel(None, int4),
            "batch_invariant is None: allowed is True or False": lambda: self.engine.int4_mm(x, int4, y, batch_invariant=None),
            "weights is NoneType: allowed is a pack of int4_mm": lambda: self.engine.int4_mm(x, None, y),
            "weights is a pack of int8_mm: allowed is a pack of int4_mm": lambda: self.engine.int4_kernel(1, int8),
            "weights is a pack of int4_mm: allowed is a pack of int8_mm": lambda: self.engine.int8_mm(a, int4, out),
            "weights is ndarray: allowed is a pack of int8_mm": lambda: self.engine.int8_mm(a, b, out),
            "weights is a pack of int8_mm: allowed is a pack of int8_linear": lambda: self.engine.int8_linear(x, int8, ws, x[:, :16]),
            "stream is 'default': allowed is the address": lambda: self.engine.int4_mm(x, int4, y, stream="default"),
            "stream is -1: allowed is the address": lambda: self.engine.int8_mm(a, int8, out, stream=-1),
            "group is '32': allowed is an integer": lambda: self.engine.pack_int4(np.zeros((8, 16), np.uint8), np.zeros((1, 8, 2), np.uint16), "32"),
            "group is 32.0: allowed is an integer": lambda: self.engine.pack_int4(np.zeros((8, 16), np.uint8), np.zeros((1, 8, 2), np.uint16), 32.0),
            "w has shape (1, 1, 32, 0): allowed is (n/8, k/(T·16), 32, T/2)": lambda: self.engine.pack_int4(np.zeros((1, 1, 32, 0), np.int32), np.zeros((0, 8, 2), np.uint16), 32),
            "layout is ['nk']: allowed is 'kn', 'nk'": lambda: self.engine.pack_int8(b, ["nk"]),
            "layout is None: allowed is 'kn', 'nk'": lambda: self.engine.pack_int8_linear(b, None),
            "rounding is ['even']: allowed is 'zero'": lambda: self.engine.int8_mm(a, int8, out, shift_right=1, rounding=["even"]),
            "act is 1: allowed is None, 'relu'": lambda: self.engine.int8_mm(a, int8, out, act=1),
            "causal is ['none']": lambda: attention(["none"]),
            "causal is 0": lambda: attention(0),
            "scale is '1': allowed is a number": lambda: attention(scale="1"),
            "scale is True: allowed is a number": lambda: attention(scale=True),
            "scale is 1e-50, in f32 0": lambda: attention(scale=1e-50),
            "scale is 1000": lambda: attention(scale=10**400),
            "clamp is (0, 1000": lambda: self.engine.int8_mm(a, int8, out, clamp=(0, 10**400)),
            "x is NoneType": lambda: self.engine.int4_mm(None, int4, y),
            "out is NoneType": lambda: self.engine.int8_mm(a, int8, None),
            "ws is NoneType": lambda: self.engine.int8_linear(x, linear, None, x[:, :16]),
            "k is NoneType": lambda: self.engine.attention(q, None, q, q),
            "xs is NoneType": lambda: self.engine.fp8_block_bmm(f8, f8, None, scales, z, "e4m3", "e4m3"),
            "out is read-only": lambda: self.engine.int4_mm(x, int4, fixed(y)),
            "out is read-only: allowed is an array that may be written": lambda: self.engine.int8_mm(a, int8, fixed(out)),
            "out is read-only:": lambda: self.engine.int8_linear(x, linear, ws, fixed(x[:, :16])),
            "out is read-only: allowed": lambda: self.engine.attention(q, q, q, fixed(q)),
            "lse is read-only": lambda: attention(lse=fixed(np.zeros((1, 1, 2), np.float32))),
            "out is read-only: allowed is": lambda: self.engine.fp8_block_bmm(f8, f8, scales, scales[:, :1], fixed(z), "e4m3", "e4m3"),
            "out is read-only: allowed is an": lambda: kiln.int4_to_tensor_core(np.zeros((8, 16), np.uint8), 2, fixed(np.zeros((1, 1, 32, 1), np.int32))),
            "inner_k_tiles is 2.0: allowed is an integer": lambda: kiln.int4_to_tensor_core(np.zeros((8, 16), np.uint8), 2.0, np.zeros((1, 1, 32, 1), np.int32)),
            "threads is 'all': allowed is an integer": lambda: kiln.Engine(threads="all"),
            "threads is 4294967297: allowed is 0 to 4096": lambda: kiln.Engine(threads=2**32 + 1),
            "cache is 3: allowed is None, 'rw', 'ro' or 'off'": lambda: kiln.Engine(cache=3),
            "cache_dir is 3: allowed is a path": lambda: kiln.Engine(cache_dir=3),
            "cache_dir is '/tmp\\x00x': allowed is a path without a null character": lambda: kiln.Engine(cache_dir="/tmp\0x"),
            "path is None: allowed is a path": lambda: int4.save(None),
        }.items():
            with self.subTest(says), self.assertRaises((TypeError, ValueError)) as raised:
                call()
            self.assertIn(says, str(raised.exception))
        for says, call in {
            "options.cache_mode is 'r': allowed is rw, ro or off": lambda: kiln.Engine(cache="r"),
            "options.cache_dir is 'here': allowed is an absolute path": lambda: kiln.Engine(cache_dir="here"),
        }.items():
            with self.subTest(says), self.assertRaises(kiln.Error) as raised:
                call()
            self.assertIn(says, str(raised.exception))

    def test_flags_as_numpy_has_them(self):
        from kiln import _values
        self.assertEqual([1, 0, 1, 0], [_values.flag("lse", value) for value in (np.True_, np.False_, np.int8(1), False)])
        for value in (2, 1.0, "1", None, np.zeros(1, bool)):
            with self.subTest(value=value), self.assertRaises(TypeError):
                _values.flag("lse", value)

    def test_streams_as_their_owners_have_them(self):
        from kiln import _values
        self.assertEqual([5, 6, 7], [_values.stream(given) for given in (5, types.SimpleNamespace(cuda_stream=6), types.SimpleNamespace(ptr=7))])

    def test_sources_are_those_of_the_header(self):
        header = (ROOT / "api/kiln.h").read_text(encoding="utf-8")
        listed = re.search(r"typedef enum kiln_source \{(.*?)\}", header)[1]
        names = [re.sub("KILN_(FROM_)?", "", part.split("=")[0].strip()).lower() for part in listed.split(",")]
        self.assertEqual(names, list(kiln._library.SOURCES))

    def test_attention_reads_what_overlaps_repeats_and_runs_backwards(self):
        rng = np.random.default_rng(5)
        line = (rng.integers(0, 0x4000, 400, dtype=np.uint16) & 0x3FFF).astype(np.uint16)
        q = np.lib.stride_tricks.as_strided(line, (1, 2, 3, 16), (0, 2, 10, 2))
        k = line[:320].reshape(1, 1, 20, 16)[:, :, ::-1]
        v = np.broadcast_to(line[40:56], (1, 1, 20, 16))
        strided, dense = (np.zeros((1, 2, 3, 16), np.uint16) for _ in range(2))
        self.engine.attention(q, k, v, strided)
        self.engine.attention(q.copy(), k.copy(), v.copy(), dense)
        np.testing.assert_array_equal(dense, strided)

    def test_version(self):
        self.assertRegex(kiln.version(), r"^\d+\.\d+\.\d+$")


if __name__ == "__main__":
    unittest.main()
