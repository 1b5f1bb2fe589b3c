"""The Python package on NumPy arrays and CPUs: results, strides, and errors that name the array.
Usage: python_test.py SOURCE_ROOT LIBKILN"""
import os
import pathlib
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
            "causal is 'left': allowed is none, top_left, bottom_right": lambda: self.engine.attention(q, k, v, out, "left"),
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

    def test_packs_in_files(self):
        *_, group, m, w, packed, sz, x, y = case(CASES[0])
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "w.pack"
            self.engine.pack_int4(w, sz, group).save(path)
            self.assertGreater(path.stat().st_size, w.nbytes)

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
