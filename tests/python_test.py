"""The Python package on NumPy arrays and CPUs: results, strides, and errors that name the array.
Usage: python_test.py SOURCE_ROOT LIBKILN"""
import os
import pathlib
import sys
import tempfile
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

    def test_version(self):
        self.assertRegex(kiln.version(), r"^\d+\.\d+\.\d+$")


if __name__ == "__main__":
    unittest.main()
