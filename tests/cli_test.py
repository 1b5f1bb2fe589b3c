"""The kiln command as its users see it: results, JSON, files, exit codes and messages. Usage: cli_test.py KILN MODELS_DIRECTORY"""
import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import pty
import random
import re
import resource
import shutil
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import time
import unittest

KILN = []  # the command, behind what runs it where the machine cannot
MODELS = pathlib.Path()
REDIS = shutil.which("redis-server") or shutil.which("redis-check-rdb")
OK, FAILED, USAGE, INTEGRITY = 0, 1, 2, 3
SHAPE = ["int8_mm", "m=5", "n=33", "k=70"]
SHAPES = {"int8_mm": SHAPE, "int8_linear": ["int8_linear", "m=5", "n=33", "k=70", "bias=1"],
          "int4_mm": ["int4_mm", "m=5", "n=40", "k=192", "group=64"],
          "fp8_block_bmm": ["fp8_block_bmm", "b=2", "m=5", "n=136", "k=144", "x_dtype=e5m2", "z_dtype=f16"],
          "attention": ["attention", "hq=4", "hkv=2", "m=5", "n=33", "d=24", "dv=16", "causal=bottom_right", "lse=1"]}
SEED = int(os.environ.get("KILN_TEST_SEED", "1"))


def npy(descr, shape, data, version=(1, 0), order="False", shape_text=None):
    """A .npy file by the book (numpy.org, numpy.lib.format)."""
    text = "{'descr': '%s', 'fortran_order': %s, 'shape': %s, }" % (descr, order, shape_text or tuple(shape))
    length_format = "<H" if version[0] == 1 else "<I"
    before = 8 + struct.calcsize(length_format)
    text += " " * (63 - (before + len(text)) % 64) + "\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack(length_format, len(text)) + text.encode() + data


def read_npy(data):
    assert data[:8] == b"\x93NUMPY\x01\x00", data[:8]
    (length,) = struct.unpack("<H", data[8:10])
    assert (10 + length) % 64 == 0 and data[9 + length] == ord("\n")
    header = eval(data[10:10 + length].decode(), {"__builtins__": {}}, {})
    assert not header["fortran_order"]
    return header["descr"], header["shape"], data[10 + length:]


class CommandTest(unittest.TestCase):
    def setUp(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="kiln-cli-test-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("KILN_")}
        self.env.update(KILN_CACHE_DIR=str(self.dir / "cache"), XDG_DATA_HOME=str(self.dir / "data"), KILN_THREADS="2")
        # A refused allocation is for the command to report, not for the sanitizer.
        self.env["ASAN_OPTIONS"] = ":".join(filter(None, [os.environ.get("ASAN_OPTIONS"), "allocator_may_return_null=1"]))

    def kiln(self, *args, env=None, expect=OK):
        done = subprocess.run([*KILN, *map(str, args)], env={**self.env, **(env or {})}, cwd=self.dir, capture_output=True, text=True, timeout=120)
        self.assertEqual(expect, done.returncode, f"kiln {args} {env}\n{done.stdout}{done.stderr}")
        return done

    def json(self, *args, env=None, expect=OK):
        done = self.kiln(*args, "--json", env=env, expect=expect)
        return json.loads(done.stdout)

    def refused(self, *args, says, env=None, expect=USAGE):
        """One line on stderr that holds every text of `says`, nothing on stdout."""
        done = self.kiln(*args, env=env, expect=expect)
        self.assertEqual("", done.stdout)
        # AddressSanitizer announces an allocation that it refuses.
        said = re.sub(r"^==\d+==WARNING: AddressSanitizer failed to allocate .*\n", "", done.stderr)
        self.assertTrue(re.fullmatch(r"kiln: [^\n]+\n", said), said)
        for text in [says] if isinstance(says, str) else says:
            self.assertIn(text, said)

    def write(self, name, content):
        path = self.dir / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


# What reads files, keys and words is the same code on every architecture, and each of these starts the command some dozens of times.
EMULATED = bool(os.environ.get("TEST_EMULATOR"))
not_emulated = unittest.skipIf(EMULATED, "not of one architecture: the tests of this machine's own build have it")


class Info(CommandTest):
    def test_json(self):
        info = self.json("info")
        self.assertEqual({"version", "target", "machine", "cache", "gpus", "ops", "environment", "known_targets"}, set(info))
        self.assertEqual(str(self.dir / "cache" / "kernels.db"), info["cache"]["path"])
        (threads,) = [row for row in info["environment"] if row["name"] == "KILN_THREADS"]
        self.assertEqual({"name": "KILN_THREADS", "value": "2", "origin": "environment"}, threads)
        (op,) = [op for op in info["ops"] if op["op"] == "int8_mm"]
        self.assertEqual(["m", "n", "k"], [field["name"] for field in op["fields"] if field["required"]])
        (reference,) = [path for path in op["paths"] if path["isa"] == "reference"]
        self.assertTrue(reference["available"])

    def test_target_is_one_line_that_warmup_takes(self):
        target = self.kiln("info", "--target").stdout
        self.assertTrue(re.fullmatch(r"\S+\n", target), target)
        self.assertEqual({"target": target.strip()}, self.json("info", "--target"))
        self.assertEqual(target.strip(), self.json("info")["target"])
        self.kiln("warmup", *SHAPE, "--target", target.strip())

    def test_people_see_everything(self):
        text = self.kiln("info").stdout
        for word in ("0 to 2147483647 or any", "nk, kn", "avx2", "portable", "reference", "KILN_MISS", "KILN_PERF", "neoverse-v1"):
            self.assertIn(word, text)

    def test_a_full_output_is_an_error(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*KILN, "info"], env=self.env, stdout=full, stderr=subprocess.PIPE, text=True)
        self.assertEqual((FAILED, "kiln: cannot write to standard output\n"), (done.returncode, done.stderr))


class Run(CommandTest):
    def test_every_path_equals_the_reference(self):
        for op in self.json("info")["ops"]:
            for path in op["paths"]:
                with self.subTest(op=op["op"], isa=path["isa"], device=path["device"]):
                    env = {"KILN_FORCE": f"{op['op']}:{path['isa']}"}
                    shape = [*SHAPES[op["op"]], f"device={path['device']}"]
                    if path["available"]:
                        report = self.json("run", *shape, "--check", "--repeat", 2, env=env)
                        self.assertTrue(report["check"]["ok"])
                        if op["op"] == "int8_mm":
                            self.assertEqual({"ok": True, "max_abs_err": 0, "rel_err": 0}, report["check"])
                        self.assertEqual(path["isa"], report["isa"])
                        self.assertEqual(path["backend"], report["backend"])
                    elif path["device"] == "cpu":
                        self.refused("run", *shape, env=env, says=["nothing computes", path["isa"]], expect=FAILED)
                    else:
                        self.refused("run", *shape, env=env, says=[path["reason"]], expect=FAILED)

    def test_float8_travels_as_bytes_and_bf16_as_words(self):
        self.write("x.npy", npy("|u1", (1, 2, 16), bytes([0x38] * 16 + [0x40] * 16)))  # 1, 2 in e4m3
        self.write("y.npy", npy("|u1", (1, 8, 16), bytes([0x3C] * 128)))  # 1 in e5m2
        self.write("xs.npy", npy("<f4", (1, 2, 1), struct.pack("<2f", 1, 3)))
        self.write("ys.npy", npy("<f4", (1, 1, 1), struct.pack("<f", 0.5)))
        words = ["fp8_block_bmm", "y_dtype=e5m2", *(f"{name}=@{self.dir}/{name}.npy" for name in ("x", "y", "xs", "ys"))]
        report = self.json("run", *words, f"out=@{self.dir}/z.npy", "--check")
        self.assertIn("b=1 m=2 n=8 k=16", report["desc"])
        descr, shape, data = read_npy((self.dir / "z.npy").read_bytes())
        self.assertEqual(("<u2", (1, 2, 8)), (descr, shape))
        self.assertEqual([0x4100] * 8 + [0x4240] * 8, list(struct.unpack("<16H", data)))  # 8, 48 in bf16
        self.write("xs.npy", npy("<f4", (1, 2, 2), bytes(16)))
        self.refused("run", *words, says=["tensor xs has shape [1, 2, 2]", "takes [1, 2, 1]"])
        self.write("x.npy", npy("|i1", (1, 2, 16), bytes(32)))
        self.write("xs.npy", npy("<f4", (1, 2, 1), bytes(8)))
        self.refused("run", *words, says=["has dtype '|i1'", "tensor x", "is e4m3, which travels as '|u1'"])

    def test_json(self):
        report = self.json("run", *SHAPE)
        self.assertEqual({"op", "desc", "key", "backend", "isa", "source", "compile_us", "load_us", "run_us", "gops", "gbps", "check"}, set(report))
        self.assertEqual({"min", "median"}, set(report["run_us"]))
        self.assertLessEqual(report["run_us"]["min"], report["run_us"]["median"])
        self.assertIsNone(report["check"])
        self.assertAlmostEqual(2 * 5 * 33 * 70 / report["run_us"]["min"] / 1e3, report["gops"], delta=1e-6 * report["gops"])

    def test_two_processes_share_a_kernel(self):
        first, second = self.json("run", *SHAPE), self.json("run", *SHAPE)
        self.assertEqual(("compiled", "disk"), (first["source"], second["source"]))
        self.assertEqual(first["key"], second["key"])
        self.assertEqual(first["compile_us"], second["compile_us"])

    def test_one_kernel_serves_a_class_of_m(self):
        self.assertEqual(self.json("run", "int8_mm", "m=100", "n=16", "k=16")["key"], self.json("run", "int8_mm", "m=101", "n=16", "k=16")["key"])

    def test_attention_with_lengths_and_scale(self):
        shape = ["attention", "b=3", "hq=4", "hkv=2", "m=4", "n=70", "d=16", "dv=24", "causal=bottom_right", "lse=1"]
        whole = self.json("run", *shape, "--check")
        for more in (["kv_len=random"], ["kv_len=0"], ["kv_len=70", "scale=0.5"], ["scale=random"], ["scale=0"]):
            with self.subTest(more):
                report = self.json("run", *shape, *more, "--check")
                self.assertTrue(report["check"]["ok"])
                self.assertEqual(whole["key"], report["key"])  # of a call, not of the kernel
        half = self.json("bench", *shape, "kv_len=35")  # rates count the keys that there are: queries 0 to 3 see 32 to 35 of them
        self.assertAlmostEqual(2 * 3 * 4 * (32 + 33 + 34 + 35) * (16 + 24), half["gops"] * half["run_us"]["min"] * 1e3, delta=1)
        self.assertTrue(self.json("explain", *shape)["isa"])
        self.assertIn("ret", self.json("disasm", *shape)["listing"])

    def test_empty_problems(self):
        for fields in (["m=0", "n=3", "k=4"], ["m=3", "n=0", "k=4"], ["m=3", "n=4", "k=0"]):
            self.assertTrue(self.json("run", "int8_mm", *fields, "--check")["check"]["ok"])

    def test_bench(self):
        report = self.json("bench", *SHAPE)
        self.assertGreater(report["gops"], 0)
        self.assertIn("GOPS", self.kiln("bench", *SHAPE).stdout)


class Files(CommandTest):
    def setUp(self):
        super().setUp()
        print(f"seed {SEED}", file=sys.stderr)
        self.random = random.Random(SEED)

    def matrix(self, rows, columns):
        return [[self.random.randint(-128, 127) for _ in range(columns)] for _ in range(rows)]

    @staticmethod
    def packed(matrix):
        return b"".join(struct.pack(f"<{len(row)}b", *row) for row in matrix)

    def test_product_of_files(self):
        m, n, k = 7, 19, 45
        a, b = self.matrix(m, k), self.matrix(k, n)
        transposed = [list(column) for column in zip(*b)]
        expected = [[sum(x * y for x, y in zip(row, column)) for column in transposed] for row in a]
        for version in ((1, 0), (2, 0), (3, 0)):
            self.write("a.npy", npy("|i1", (m, k), self.packed(a), version))
            self.write("nk.npy", npy("|i1", (n, k), self.packed(transposed), version))
            self.write("kn.npy", npy("|i1", (k, n), self.packed(b), version))
            for name, layout in (("c", "nk"), ("out", "kn")):
                self.kiln("run", "int8_mm", "a=@a.npy", f"b=@{layout}.npy", f"b_layout={layout}", f"{name}=@c.npy", "--check")
                descr, shape, data = read_npy((self.dir / "c.npy").read_bytes())
                self.assertEqual(("<i4", (m, n)), (descr, shape))
                self.assertEqual([x for row in expected for x in row], list(struct.unpack(f"<{m * n}i", data)))

    def test_attention_of_files(self):
        # One batch, one head, d = dv = 8: q·k is 0 for key 0 and 8·ln 2 / 8 for keys 1 and 2; with kv_len 2 the weights are 1/3 and 2/3.
        bits = lambda value: struct.unpack("<I", struct.pack("<f", value))[0] + 0x8000 >> 16
        rows = lambda *values: struct.pack(f"<{8 * len(values)}H", *(bits(value) for value in values for _ in range(8)))
        self.write("q.npy", npy("<u2", (1, 1, 1, 8), rows(1.0)))
        self.write("k.npy", npy("<u2", (1, 1, 3, 8), rows(0.0, 0.0625, 0.0625)))
        self.write("v.npy", npy("<u2", (1, 1, 3, 8), rows(3.0, 6.0, float("nan"))))
        self.write("kv_len.npy", npy("<i4", (1,), struct.pack("<i", 2)))
        self.write("scale.npy", npy("<f4", (1,), struct.pack("<f", 2 * 0.6931471806)))
        inputs = [f"{name}=@{name}.npy" for name in ("q", "k", "v", "kv_len")]
        for scale in ("scale=@scale.npy", "scale=1.3862943611"):
            report = self.json("run", "attention", *inputs, scale, "lse=1", "lse=@lse.npy", "out=@o.npy", "--check")
            self.assertTrue(report["check"]["ok"])
            descr, shape, data = read_npy((self.dir / "o.npy").read_bytes())
            self.assertEqual(("<u2", (1, 1, 1, 8)), (descr, shape))
            self.assertEqual({bits(5.0)}, set(struct.unpack("<8H", data)))
            descr, shape, data = read_npy((self.dir / "lse.npy").read_bytes())
            self.assertEqual(("<f4", (1, 1, 1)), (descr, shape))
            self.assertAlmostEqual(1.0986123, struct.unpack("<f", data)[0], delta=1e-3)

    def test_one_file_gives_some_sizes(self):
        self.write("a.npy", npy("|i1", (3, 4), bytes(12)))
        self.assertIn(" m=3 n=9 k=4 ", self.json("run", "int8_mm", "a=@a.npy", "n=9")["desc"])
        self.refused("run", "int8_mm", "a=@a.npy", says="field n is missing")

    def test_misshaped(self):
        self.write("a.npy", npy("|i1", (3, 4), bytes(12)))
        self.write("b.npy", npy("|i1", (5, 6), bytes(30)))
        self.write("flat.npy", npy("|i1", (12,), bytes(12)))
        self.write("scalar.npy", npy("|i1", (), bytes(1)))
        self.refused("run", "int8_mm", "a=@a.npy", "b=@b.npy", says=["tensor b has shape [5, 6]", "takes [5, 4]"])
        self.refused("run", "int8_mm", "a=@a.npy", "n=2", "m=9", says=["tensor a has shape [3, 4]", "takes [9, 4]"])
        self.refused("run", "int8_mm", "a=@flat.npy", "m=3", "n=2", "k=4", says=["tensor a has shape [12]", "takes [3, 4]"])
        self.refused("run", "int8_mm", "a=@scalar.npy", "m=3", "n=2", "k=4", says="tensor a has shape []")
        self.refused("run", "int8_mm", "a=@flat.npy", "n=2", "k=4", says=["tensor a has shape [12]", "takes [m, 4]"])

    def test_wrong_dtypes(self):
        self.write("a.npy", npy("<i4", (3, 4), bytes(48)))
        self.refused("run", "int8_mm", "a=@a.npy", "n=2", says=["a.npy", "'<i4'", "tensor a", "s8", "'|i1'"])
        for descr in ("<f8", ">i4", "<i8", "|b1", "|O", "<U3", ""):
            self.write("a.npy", npy(descr, (3, 4), bytes(96)))
            self.refused("run", "int8_mm", "a=@a.npy", "n=2", says=["a.npy", f"dtype '{descr}'", "|i1, |u1, <u2, <f2, <i4, <f4"])

    def test_damaged_files(self):
        good = npy("|i1", (3, 4), bytes(12))
        cases = {
            b"": "not a .npy file",
            b"PK\x03\x04 a zip file, say": "not a .npy file",
            good[:9]: "cut short in its header",
            good[:40]: "cut short in its header",
            good[:-1]: "cut short: shape [3, 4] of |i1 takes 12 bytes of data, the file has 11",
            good + b"x": "too long",
            npy("|i1", (3, 4), bytes(12), (9, 0)): "version 9.0: allowed are 1.0, 2.0, 3.0",
            npy("|i1", (3, 4), bytes(12), order="True"): "Fortran order",
            npy("|i1", (3, 4), bytes(12), order="Maybe"): "'fortran_order' cannot be read",
            npy("|i1", (), bytes(12), shape_text="(-3, 4)"): "'shape' cannot be read: allowed is a tuple of at most 32 extents",
            npy("|i1", (), bytes(12), shape_text="(3 4)"): "'shape' cannot be read",
            npy("|i1", (), bytes(12), shape_text="(3, 4"): "",
            npy("|i1", (), bytes(12), shape_text="(%s)" % ("1, " * 40)): "'shape' cannot be read",
            npy("|i1", (), bytes(12), shape_text="(99999999999999999999,)"): "'shape' cannot be read",
            npy("<i4", (), bytes(12), shape_text="(4611686018427387905, 4)"): "is impossible",
            npy("<i4", (), bytes(12), shape_text="(4294967296, 4294967296)"): "is impossible",
            npy("|i1", (), bytes(12), shape_text="(4611686018427387904,)"): "cut short",
            npy("|i1', 'x': 'y", (3, 4), bytes(12)): "unknown or repeated entry 'x'",
            b"\x93NUMPY\x01\x00\x02\x00{}": "lacks one of descr, fortran_order, shape",
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff{": "header of 4294967295 bytes",
        }
        for content, message in cases.items():
            with self.subTest(message=message, content=content[:100]):
                self.write("a.npy", content)
                self.refused("run", "int8_mm", "a=@a.npy", "n=2", says=["a.npy", message])

    @not_emulated
    def test_random_damage_never_crashes(self):
        good = npy("|i1", (3, 4), bytes(12))
        for _ in range(60):
            content = bytearray(good)
            for _ in range(self.random.randint(1, 4)):
                content[self.random.randrange(len(content))] = self.random.randrange(256)
            content = content[:self.random.randint(0, len(content))] if self.random.random() < 0.3 else content
            self.write("a.npy", bytes(content))
            done = subprocess.run([*KILN, "run", "int8_mm", "a=@a.npy", "n=2", "k=4"], env=self.env, cwd=self.dir, capture_output=True)
            self.assertIn(done.returncode, (OK, USAGE), (bytes(content), done.stderr))

    def test_unreadable(self):
        self.refused("run", "int8_mm", "a=@nothing.npy", "n=2", says=["nothing.npy", "No such file"])
        self.refused("run", "int8_mm", "a=@.", "n=2", says=". is not a regular file".replace(". is", ".: is"))
        os.mkfifo(self.dir / "fifo.npy")
        self.refused("run", "int8_mm", "a=@fifo.npy", "n=2", says="is not a regular file")

    def test_output_is_whole_or_absent(self):
        self.refused("run", *SHAPE, "c=@missing/c.npy", says="cannot write missing/c.npy", expect=FAILED)
        self.refused("run", *SHAPE, "c=@/dev/null", says="not a regular file", expect=FAILED)
        self.assertTrue(stat.S_ISCHR(os.stat("/dev/null").st_mode))
        self.write("target.npy", b"old")
        (self.dir / "link.npy").symlink_to("target.npy")
        self.kiln("run", *SHAPE, "c=@link.npy")
        self.assertTrue((self.dir / "link.npy").is_symlink())
        self.assertEqual((5, 33), read_npy((self.dir / "target.npy").read_bytes())[1])
        self.assertEqual({"target.npy", "link.npy", "cache", "data"}, {entry.name for entry in self.dir.iterdir()})


class Warmup(CommandTest):
    MANIFEST = '{"kernels": [\n  {"op": "int8_mm", "m": [1, 16, 128, 200], "n": 48, "k": 64},\n  {"op": "int8_mm", "m": "any", "n": 32, "k": 16, "b_layout": "kn"}\n]}'

    def test_manifest_twice(self):
        self.write("m.json", self.MANIFEST)
        first, second = self.json("warmup", "m.json", "-j", 2), self.json("warmup", "m.json", "-j", 1)
        self.assertEqual({"target", "descs", "kernels", "hit", "compiled", "failed", "written_to_remote", "ms", "results"}, set(first))
        counts = lambda report: [report[name] for name in ("descs", "kernels", "hit", "compiled", "failed")]
        self.assertEqual([5, 4, 0, 4, 0], counts(first))
        self.assertEqual([5, 4, 4, 0, 0], counts(second))
        self.assertEqual({"compiled"}, {row["result"] for row in first["results"]})
        self.assertEqual("disk", self.json("run", "int8_mm", "m=150", "n=48", "k=64", env={"KILN_MISS": "error"})["source"])

    def test_one_desc(self):
        self.assertEqual(1, self.json("warmup", *SHAPE)["compiled"])
        self.assertEqual(1, self.json("warmup", *SHAPE)["hit"])
        self.assertIn("1 kernel for 1 desc: 1 hit, 0 compiled, 0 failed", self.kiln("warmup", *SHAPE).stdout)

    def test_models(self):
        for config in sorted(MODELS.glob("*.json")):
            with self.subTest(model=config.name):
                report = self.json("warmup", "--model", config, "--scheme", "w8a8", "--tokens", "1,16,128")
                self.assertEqual((0, report["kernels"]), (report["failed"], report["compiled"] + report["hit"]))
        descs = {row["desc"] for row in self.json("warmup", "--model", MODELS / "qwen3-1.7b.json", "--scheme", "w8a8", "--tokens", "1")["results"]}
        shapes = {tuple(map(int, re.search(r" n=(\d+) k=(\d+) ", desc).groups())) for desc in descs}
        self.assertEqual({(2048, 2048), (1024, 2048), (4096, 2048), (6144, 2048), (12288, 2048), (2048, 6144), (151936, 2048)}, shapes)

    def test_dynamic_quantisation(self):
        for scheme, op in (("w8a8", "int8_mm"), ("w8a8-dynamic", "int8_linear")):
            report = self.json("warmup", "--model", MODELS / "all-minilm-l6.json", "--scheme", scheme, "--tokens", "1,16")
            self.assertEqual((0, 8, {op}), (report["failed"], report["kernels"], {row["desc"].split()[0] for row in report["results"]}))

    def test_attention_layers(self):
        heads = {"all-minilm-l6": ("1 hkv=1", "32 dv=32 causal=none"), "llama-3-8b": ("4 hkv=1", "128 dv=128 causal=bottom_right"),
                 "qwen3-1.7b": ("2 hkv=1", "128 dv=128 causal=bottom_right"), "deepseek-v3": ("1 hkv=1", "192 dv=128 causal=bottom_right")}
        if EMULATED:  # models are read alike everywhere: what is left is that their kernels are found
            heads = {"llama-3-8b": heads["llama-3-8b"]}
        for model, (group, sizes) in heads.items():
            report = self.json("warmup", "--model", MODELS / f"{model}.json", "--scheme", "attention", "--tokens", "1,100,200")
            self.assertEqual((0, 2), (report["failed"], report["kernels"]))
            self.assertEqual({f"attention b=any hq={group} m={m} n=any d={sizes} lse=0 batch_invariant=0" for m in (1, "any")},
                             {row["desc"] for row in report["results"]})
        shape = ["attention", "b=2", "hq=32", "hkv=8", "n=40", "d=128", "dv=128", "causal=bottom_right"]
        self.assertEqual({"disk"}, {self.json("run", *shape, m, "--check", env={"KILN_MISS": "error"})["source"] for m in ("m=1", "m=50")})
        if not EMULATED:
            both = self.json("warmup", "--model", MODELS / "all-minilm-l6.json", "--scheme", "w8a8-dynamic,attention", "--tokens", "1,16")
            self.assertEqual((0, {"int8_linear", "attention"}), (both["failed"], {row["desc"].split()[0] for row in both["results"]}))
        self.write("heads.json", '{"model_type": "llama", "hidden_size": 80, "num_attention_heads": 4, "num_key_value_heads": 3}')
        self.refused("warmup", "--model", "heads.json", "--scheme", "attention", "--tokens", "1", says=["heads.json", "d=20: allowed is a multiple of 8"])

    def test_deepseek_layers(self):
        report = self.json("warmup", "--model", MODELS / "deepseek-v3.json", "--scheme", "fp8-block", "--tokens", "1,8", "--target", "sm_90a")
        self.assertEqual((24, 12, 0), (report["descs"], report["compiled"], report["failed"]))  # one class of m
        self.assertIn("fp8_block_bmm b=1 m=8 n=24576 k=1536 ", " ".join(row["desc"] for row in report["results"]))
        results = self.json("warmup", "--model", MODELS / "deepseek-v3.json", "--scheme", "w8a8", "--tokens", "1")["results"]
        shapes = {tuple(map(int, re.search(r" n=(\d+) k=(\d+) ", row["desc"]).groups())) for row in results}
        self.assertEqual({(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384), (18432, 7168), (36864, 7168), (7168, 18432),
                          (2048, 7168), (4096, 7168), (7168, 2048), (129280, 7168)}, shapes)

    def test_unknown_model_types(self):
        self.write("new.json", '{"model_type": "new", "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 128}')
        self.assertEqual(0, self.json("warmup", "--model", "new.json", "--scheme", "w8a8", "--tokens", "1")["failed"])
        self.write("mamba.json", '{"model_type": "mamba", "hidden_size": 64}')
        self.refused("warmup", "--model", "mamba.json", "--scheme", "w8a8", "--tokens", "1", says=["mamba.json:1", '"num_attention_heads"', "mamba"])

    def test_bad_configs(self):
        cases = {
            '{\n "model_type": "llama",\n "hidden_size": "many"}': ["c.json:3: /hidden_size:", '"many"', "from 1 to"],
            '{\n "hidden_size": 0}': ["c.json:2: /hidden_size: 0"],
            '{"hidden_size": 65, "num_attention_heads": 2, "intermediate_size": 1, "vocab_size": 1}': ["c.json:1", "does not divide hidden_size 65"],
            '{"hidden_size": 1e3}': ["/hidden_size: 1000.0"],
            '{"hidden_size": 99999999999999999999}': ["/hidden_size"],
            "[]": ["is no config.json"],
            '{"a":\n 1,,}': ["c.json:2: not JSON"],
            '{"hidden_size": 64,\n "model_type": 7}': ["c.json:2: /model_type: 7: allowed is a string"],
            '{\n "hidden_size": 1e999}': ["c.json:2: ", "1e999"],
            '{"hidden_size": 64,\n "hidden_size": 65}': ["c.json:2: /hidden_size: is given twice"],
            '{"hidden_size":\n' + "[" * 100000 + "]" * 100000 + "}": ["c.json:2: has more than 64 lists"],
        }
        for text, says in cases.items():
            with self.subTest(text=text):
                self.write("c.json", text)
                self.refused("warmup", "--model", "c.json", "--scheme", "w8a8", "--tokens", "1", says=says)

    def test_a_long_name_with_many_members_costs_no_more_than_the_file(self):
        self.write("m.json", '{"%s": [%s0]}' % ("x" * 100000, "0," * 100000))
        usage = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        self.refused("warmup", "m.json", says=["is no manifest"])
        self.assertLess(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, max(usage, 1 << 20))  # KiB

    @not_emulated
    def test_bad_manifests(self):
        kernel = '{"kernels": [\n{"op": "int8_mm",\n "m": 1,\n %s}]}'
        cases = {
            "": ["m.json:1: not JSON"],
            '{\n\n"kernels": [}': ["m.json:3: not JSON"],
            "[1]": ["m.json:1: is no manifest"],
            '{"kernels": 3}': ["is no manifest"],
            '{"kernels": [],\n "extra": 1}': ["m.json:2: /extra: unknown field"],
            '{"kernels": [\n\n3]}': ["m.json:3: /kernels/0: is no object"],
            '{"kernels": [\n{"m": 1}]}': ['m.json:2: /kernels/0: needs "op"', "int8_mm"],
            '{"kernels": [\n{\n"op": 7}]}': ["m.json:3: /kernels/0/op:"],
            '{"kernels": [\n{\n"op": "int9_mm"}]}': ["m.json:3: /kernels/0/op: unknown op 'int9_mm'", "int8_mm"],
            kernel % '"n": 1, "k": -1': ["m.json:4: /kernels/0/k: int8_mm: k=-1: allowed is an integer from 0"],
            kernel % '"n": 1, "k": 1.5': ["m.json:4: /kernels/0/k: is a value of type number"],
            kernel % '"n": 1, "k": true': ["/kernels/0/k: is a value of type boolean"],
            kernel % '"n": 1, "k": []': ["/kernels/0/k: is an empty list"],
            kernel % '"n": 1, "k": [1, "x"]': ["m.json:4: /kernels/0/k/1: int8_mm: k=x"],
            kernel % '"n": 1, "q": 1': ["m.json:4: /kernels/0/q: unknown field", "b_layout"],
            kernel % '"n": 1': ["m.json:2: /kernels/0: int8_mm: field k is missing"],
            kernel % '"n": 1, "k": 1, "device": "tpu"': ["m.json:2", "device=tpu"],
            kernel % ('"n": %s, "k": %s' % ((list(range(1000)),) * 2)): ["more than 100000 kernels"],
            '{"kernels":\n' + "[" * 200000: ["m.json:2: has more than 64 lists and objects within one another"],
            kernel % ('"n": 1, "k": ' + "[" * 100000 + "]" * 100000): ["m.json:4: has more than 64 lists"],
            '{"kernels": [%s0]}' % ("0," * (1 << 20)): ["has more than 1048576 values"],
            '{"kernels": [], "%s": 1}' % ("x" * 100000): ["m.json:1: /xxx", "unknown field: known is kernels"],
            '{"kernels": [{"op": "\\u009b"}]}': ["unknown op ' '"],
        }
        for text, says in cases.items():
            with self.subTest(text=text[:80]):
                self.write("m.json", text)
                self.refused("warmup", "m.json", says=says)

    def test_bad_calls(self):
        config = MODELS / "qwen3-1.7b.json"
        self.refused("warmup", says="nothing to warm up")
        self.refused("warmup", "none.json", says=["none.json", "No such file"])
        self.refused("warmup", config, says="is no manifest")
        self.refused("warmup", "--model", config, says="--scheme and --tokens go together")
        self.refused("warmup", "--model", config, "--scheme", "w4", "--tokens", "1", says=["--scheme w4", "w8a8"])
        self.refused("warmup", "--model", config, "--scheme", "w8a8", "--tokens", "1,x", says="--tokens")
        self.refused("warmup", "--model", config, "--scheme", "w8a8", "--tokens=-1", says="--tokens")
        self.refused("warmup", "--model", config, "--scheme", "w8a8", "--tokens", "1", *SHAPE, says="either --model, a manifest or an op")
        self.refused("warmup", "--model", config, "--scheme", "w8a8", "--tokens", "2147483648", says=["--tokens", "2147483647"])
        self.refused("warmup", *SHAPE, "--target", "vax", says=["target 'vax'", "sapphirerapids"])
        self.refused("warmup", *SHAPE, "--target", "", says="target ''")
        self.refused("warmup", *SHAPE, "-j", "0", says="--jobs")
        self.refused("warmup", "int8_mm", "m=1", says="field n is missing")

    def test_a_busy_cache_is_waited_for(self):
        self.kiln("warmup", *SHAPE)
        with contextlib.closing(sqlite3.connect(self.dir / "cache" / "kernels.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            waiting = subprocess.Popen([*KILN, "warmup", "int8_mm", "m=1", "n=2", "k=3", "--json"], env=self.env, stdout=subprocess.PIPE, text=True)
            time.sleep(0.3)  # far beyond what a lookup waits for
            other.execute("ROLLBACK")
        self.assertEqual(1, json.loads(waiting.communicate(timeout=60)[0])["compiled"])
        self.assertEqual(OK, waiting.returncode)

    def test_another_machine(self):
        here = self.json("run", *SHAPE)["key"]
        self.assertEqual(1, self.json("warmup", *SHAPE, "--target", "x86-64-v3")["compiled"])
        keys = {row["key"]: row["isa"] for row in self.json("cache", "list")["kernels"]}
        self.assertIn(here, keys)
        self.assertIn("avx2", keys.values())

    def test_a_bar_only_on_a_terminal(self):
        self.write("m.json", self.MANIFEST)
        self.assertEqual("", self.kiln("warmup", "m.json").stderr)
        parent, child = pty.openpty()
        subprocess.run([*KILN, "warmup", "m.json"], env=self.env, cwd=self.dir, stdout=subprocess.DEVNULL, stderr=child, check=True)
        os.close(child)
        shown = b""
        with contextlib.suppress(OSError):  # EIO once all is read, which a loaded machine hands over in pieces
            while piece := os.read(parent, 65536):
                shown += piece
        shown = shown.decode()
        os.close(parent)
        self.assertIn("4/4", shown)
        self.assertTrue(shown.endswith("\x1b[K"), shown)


class Cache(CommandTest):
    def damage(self, key):
        """Flips a bit of the code of one row."""
        db = sqlite3.connect(self.dir / "cache" / "kernels.db")
        (code,) = db.execute("SELECT code FROM kernels WHERE key = ?", (bytes.fromhex(key),)).fetchone()
        damaged = bytearray(code)
        damaged[len(damaged) // 2] ^= 1
        db.execute("UPDATE kernels SET code = ? WHERE key = ?", (bytes(damaged), bytes.fromhex(key)))
        db.commit()
        db.close()

    def forge(self, key, **columns):
        """Changes columns of one row and authenticates it anew, as whoever has the key file can."""
        secret = (self.dir / "data" / "kiln" / "cache.key").read_bytes()
        with contextlib.closing(sqlite3.connect(self.dir / "cache" / "kernels.db")) as db:
            db.row_factory = sqlite3.Row
            row = dict(db.execute("SELECT * FROM kernels WHERE key = ?", (bytes.fromhex(key),)).fetchone()) | columns
            (schema,) = db.execute("PRAGMA user_version").fetchone()
            blob = lambda content: struct.pack("<Q", len(content)) + content
            message = struct.pack("<I", schema) + blob(row["key"])
            message += b"".join(blob(row[name].encode()) for name in ("op", "desc", "isa", "target", "generator"))
            message += struct.pack("<qq", row["compile_us"], row["created_at"]) + blob(b"") + blob(row["code"])
            row["code_bytes"] = len(row["code"])
            row["mac"] = hashlib.blake2b(message, key=secret, digest_size=32).digest()
            db.execute(f"UPDATE kernels SET {', '.join(f'{name} = :{name}' for name in row)} WHERE key = :key", row)
            db.commit()

    def code_of(self, key):
        with contextlib.closing(sqlite3.connect(self.dir / "cache" / "kernels.db")) as db:
            return db.execute("SELECT code FROM kernels WHERE key = ?", (bytes.fromhex(key),)).fetchone()[0]

    def test_looking_at_nothing(self):
        self.assertEqual({"kernels": []}, self.json("cache", "list"))
        self.assertEqual(0, self.json("cache", "stats")["rows"])
        self.assertEqual(0, self.json("cache", "verify", "--recompile")["ok"])
        self.assertEqual(0, self.json("cache", "clear")["rows"])
        self.assertFalse((self.dir / "cache").exists())

    @not_emulated
    def test_a_damaged_database(self):
        self.json("run", *SHAPE)
        directory = self.dir / "cache"
        (directory / "kernels.db").write_bytes(bytes(20000))
        self.refused("cache", "stats", says="not a database", expect=INTEGRITY)
        self.refused("cache", "verify", says="not a database", expect=INTEGRITY)
        report = self.json("doctor")  # stores a kernel as a host would
        self.assertTrue(report["ok"], report)
        self.assertTrue(any("not a database" in check["text"] for check in report["checks"] if check["name"] == "log"), report)
        self.assertLessEqual(1, self.json("cache", "stats")["rows"])
        self.assertEqual(str(directory / "kernels-1.db"), self.json("cache", "path")["path"])
        # Within the same day that is a problem for people.
        (directory / "kernels-1.db").write_bytes(bytes(20000))
        result = self.kiln("doctor", expect=FAILED)
        self.assertIn("kiln cache clear", result.stdout)
        self.assertEqual(0, self.json("cache", "clear")["rows"])
        self.assertEqual(["kernels-2.db", "kernels.lock", "kernels.usage"], sorted(path.name for path in directory.iterdir() if "journal" not in path.name))
        self.json("run", *SHAPE)
        self.assertEqual(1, self.json("cache", "verify")["ok"])

    def test_path_stats_list_inspect(self):
        key = self.json("run", *SHAPE)["key"]
        path = self.dir / "cache" / "kernels.db"
        self.assertEqual(f"{path}\n", self.kiln("cache", "path").stdout)
        self.assertEqual({"path": str(path)}, self.json("cache", "path"))
        stats = self.json("cache", "stats")
        self.assertEqual((1, 512 << 20), (stats["rows"], stats["max_bytes"]))
        self.assertEqual({"path", "rows", "bytes", "file_bytes", "max_bytes", "usage", "system", "remote"}, set(stats))
        (row,) = self.json("cache", "list")["kernels"]
        self.assertEqual((key, "int8_mm"), (row["key"], row["op"]))
        self.assertIn(key[:16], self.kiln("cache", "list").stdout)
        whole = self.json("cache", "inspect", key[:12])
        self.assertEqual(key, whole["key"])
        self.assertTrue(whole["of_this_version"])
        self.assertIn("main", whole["entries"])
        self.assertRegex(whole["generator"], r"^[0-9a-f]{64}$")
        self.assertIn(key, self.kiln("cache", "inspect", key).stdout)
        self.refused("cache", "inspect", "0" * 64, says="no kernel has a key", expect=FAILED)
        for bad in ("", "xyz", "0" * 65):
            self.refused("cache", "inspect", bad, says="give the first digits")

    @not_emulated
    def test_stats_of_all_processes(self):
        self.assertIsNone(self.json("cache", "stats")["usage"])
        began = int(time.time())
        key = self.json("run", *SHAPE)["key"]
        for _ in range(3):
            self.json("run", *SHAPE)
        self.damage(key)
        self.json("run", *SHAPE)
        self.json("warmup", *SHAPE)
        for _ in range(2):  # looking counts nothing
            self.json("explain", *SHAPE)
            self.json("cache", "inspect", key)
            self.json("cache", "verify", "--recompile")
            usage = self.json("cache", "stats")["usage"]
        self.assertTrue(began <= usage.pop("since") <= time.time())
        self.assertEqual((4, 2, 2, 2, 1, 1), tuple(usage[name] for name in ("disk_hits", "misses", "compiles", "puts", "refused", "refused_mac")))
        self.assertGreater(usage["compile_us"], 0)
        for name in ("system_hits", "compile_failures", "fallbacks", "evictions", "evicted_bytes", "refused_key_file", "refused_code", "refused_features", "refused_size", "refused_system", "refused_remote", "busy", "errors", "remote_hits", "remote_errors"):
            self.assertEqual(0, usage[name], name)
        shown = self.kiln("cache", "stats").stdout
        for text in ("4 on disk", "misses         2", "compiles       2 in", "refused        1 (1 changed or of another key)", "0 times busy, 0 errors"):
            self.assertIn(text, shown)
        (self.dir / "cache" / "kernels.usage").write_bytes(b"no usage file" * 100)
        self.assertIsNone(self.json("cache", "stats")["usage"])
        self.assertEqual("disk", self.json("run", *SHAPE)["source"])
        self.assertEqual(1, self.json("cache", "stats")["usage"]["disk_hits"])

    def test_an_ambiguous_key(self):
        self.write("m.json", json.dumps({"kernels": [{"op": "int8_mm", "m": [1, 2, 4, 8, 16, 32, "any"], "n": [1, 2, 3], "k": 4}]}))
        self.kiln("warmup", "m.json")
        digits = sorted(row["key"][0] for row in self.json("cache", "list")["kernels"])  # 21 keys, 16 digits
        digit = next(a for a, b in zip(digits, digits[1:]) if a == b)
        self.refused("cache", "inspect", digit, says=[f"key '{digit}'", "give more digits"])

    def test_verify(self):
        info = self.json("info")
        for path in info["ops"][0]["paths"]:
            if path["available"] and path["generator"] != "none":
                self.json("run", *SHAPE, env={"KILN_FORCE": path["isa"]})
        key = self.json("run", "int8_mm", "m=1", "n=20", "k=30")["key"]
        rows = self.json("cache", "stats")["rows"]
        report = self.json("cache", "verify", "--recompile")
        self.assertEqual((rows, 0), (report["ok"], report["bad"]))
        self.assertEqual({"same": rows, "different": [], "failed": [], "skipped": 0}, report["recompiled"])
        self.damage(key)
        report = self.json("cache", "verify", "--dry-run", expect=INTEGRITY)
        self.assertEqual((rows - 1, 1, [key], 0), (report["ok"], report["bad"], report["bad_keys"], report["removed"]))
        self.assertIn(key, self.kiln("cache", "verify", expect=INTEGRITY).stdout)
        self.assertEqual(0, self.json("cache", "verify")["bad"])

    def test_recompiling_the_kernels_of_every_target(self):
        # What is emitted for which target, and that it is so on every architecture, is aarch64_test's: here one kernel of each is enough under an emulator.
        classes = "7" if EMULATED else "1, 7, 100"
        self.write("m.json", '{"kernels": [{"op": "int8_mm", "m": [%s], "n": 80, "k": 72}]}' % classes)
        targets = [target["name"] for target in self.json("info")["known_targets"] if not target["target"].startswith("nvptx")]
        for target in targets:
            for path in ("", *(() if EMULATED and target not in (targets[0], targets[-1]) else ("portable",))):
                self.kiln("warmup", "m.json", "--target", target, env={"KILN_FORCE": path})
        rows = self.json("cache", "stats")["rows"]
        self.assertGreater(rows, 5 if EMULATED else 30)
        report = self.json("cache", "verify", "--recompile")
        self.assertEqual((rows, 0), (report["ok"], report["bad"]))
        self.assertEqual({"same": rows, "different": [], "failed": [], "skipped": 0}, report["recompiled"])

    @not_emulated
    def test_recompiling_tells_other_bytes_from_other_versions(self):
        key, other = (self.json("run", "int8_mm", f"m={m}", "n=64", "k=64")["key"] for m in (1, 9))
        self.forge(other, generator="0" * 64)
        report = self.json("cache", "verify", "--recompile")
        self.assertEqual((2, 0), (report["ok"], report["bad"]))
        self.assertEqual({"same": 1, "different": [], "failed": [], "skipped": 1}, report["recompiled"])
        self.assertIn("1 compiled again to the same bytes, 0 to others, 1 of another version", self.kiln("cache", "verify", "--recompile").stdout)
        # A code of the other version that this one cannot read is no difference either.
        self.forge(other, code=b"of another version", generator="0" * 64)
        self.assertEqual(1, self.json("cache", "verify", "--recompile")["recompiled"]["skipped"])
        sound = self.code_of(key)
        for at in (len(sound) // 2, len(sound) - 1, 0):  # in the image, in the plan, in what comes first: authentic all the same
            changed = bytearray(sound)
            changed[at] ^= 1
            self.forge(key, code=bytes(changed))
            report = self.json("cache", "verify", "--recompile", expect=INTEGRITY)
            self.assertEqual((2, 0), (report["ok"], report["bad"]))
            self.assertEqual([key], report["recompiled"]["different"])
            self.assertIn(f"different  {key}", self.kiln("cache", "verify", "--recompile", expect=INTEGRITY).stdout)
            self.kiln("cache", "verify")
        self.forge(key, code=sound)
        self.assertEqual(1, self.json("cache", "verify", "--recompile")["recompiled"]["same"])

    def test_recompiling_without_llvm_finds_no_difference(self):
        self.json("run", *SHAPE, env={"KILN_FORCE": "portable"})
        alone = shutil.copy(KILN[-1], self.dir / "kiln")  # away from libkiln-llvm.so.0
        done = subprocess.run([*KILN[:-1], alone, "cache", "verify", "--recompile"], env=self.env, capture_output=True, text=True)
        self.assertEqual(FAILED, done.returncode, done.stderr)
        self.assertIn("0 to others, 0 of another version, 1 failed", done.stdout)
        self.assertIn("libkiln-llvm.so.0", done.stderr)

    def test_a_damaged_row_is_compiled_again(self):
        key = self.json("run", *SHAPE)["key"]
        self.damage(key)
        done = self.kiln("run", *SHAPE, "--check", "--json")
        self.assertIn("fails authentication", done.stderr)
        self.assertEqual(("compiled", True), (json.loads(done.stdout)["source"], json.loads(done.stdout)["check"]["ok"]))
        self.damage(key)
        self.refused("cache", "inspect", key, says="fails authentication", expect=INTEGRITY)

    def test_prune_and_clear(self):
        self.json("warmup", "--model", MODELS / "all-minilm-l6.json", "--scheme", "w8a8", "--tokens", "1,16,128")
        rows = self.json("cache", "stats")["rows"]
        self.assertEqual({"rows": 0, "bytes": 0, "dry_run": False}, self.json("cache", "prune"))
        self.assertEqual((rows, True), tuple(self.json("cache", "clear", "--dry-run")[name] for name in ("rows", "dry_run")))
        self.assertEqual(rows, self.json("cache", "stats")["rows"])
        self.assertEqual(rows, self.json("cache", "clear")["rows"])
        self.assertEqual(0, self.json("cache", "stats")["rows"])

    def test_off(self):
        env = {"KILN_CACHE": "off"}
        for _ in range(2):
            self.assertEqual("compiled", self.json("run", *SHAPE, env=env)["source"])
        self.refused("cache", "list", env=env, says="it is off", expect=FAILED)
        self.assertEqual(1, self.json("warmup", *SHAPE, env=env, expect=FAILED)["failed"])
        self.assertFalse((self.dir / "cache").exists())

    def test_read_only(self):
        env = {"KILN_CACHE": "ro"}
        self.assertEqual("compiled", self.json("run", *SHAPE, env=env)["source"])
        self.assertFalse((self.dir / "cache").exists())
        self.json("run", *SHAPE)
        self.assertEqual("disk", self.json("run", *SHAPE, env=env)["source"])
        self.refused("cache", "clear", env=env, says="read-only", expect=FAILED)

    def test_miss_policies(self):
        self.refused("run", *SHAPE, env={"KILN_MISS": "error"}, says=["is not cached", "KILN_MISS=error"], expect=FAILED)
        self.assertTrue(self.json("run", *SHAPE, "--check", env={"KILN_MISS": "fallback"})["check"]["ok"])

    @not_emulated
    def test_unusable_directories(self):
        self.write("file", "")
        for directory, word in (("/proc/kiln", "/proc/kiln"), (str(self.dir / "file"), "not trusted")):
            with self.subTest(directory=directory):
                env = {"KILN_CACHE_DIR": directory}
                done = self.kiln("run", *SHAPE, "--check", env=env)
                self.assertIn(word, done.stderr)
                self.assertEqual(1, self.json("warmup", *SHAPE, env=env, expect=FAILED)["failed"])
                self.assertIn(word, self.kiln("doctor", env=env, expect=FAILED).stdout)
        (self.dir / "open").mkdir()
        (self.dir / "open").chmod(0o777)
        self.refused("cache", "list", env={"KILN_CACHE_DIR": str(self.dir / "open")}, says=["open is not trusted", "0777", "0700"], expect=FAILED)
        if os.getuid() == 0:
            (self.dir / "foreign").mkdir(mode=0o700)
            os.chown(self.dir / "foreign", 12345, 12345)
            self.refused("cache", "list", env={"KILN_CACHE_DIR": str(self.dir / "foreign")}, says="uid 12345", expect=FAILED)


@not_emulated
class Places(CommandTest):
    """Where the cache lies when nobody says so: homes as they are found."""

    def setUp(self):
        super().setUp()
        self.dir.chmod(0o755)  # for other users
        self.home = self.dir / "home"
        self.home.mkdir(mode=0o755)
        self.env.update(HOME=str(self.home), KILN_CACHE_DIR="", XDG_DATA_HOME="")

    def warned(self, *args, env=None, user=None):
        """The result of a run that is right all the same, and its one warning."""
        done = subprocess.run([*KILN, "run", *SHAPE, "--check", "--json"], env={**self.env, **(env or {})}, cwd=self.dir,
                              capture_output=True, text=True, timeout=120, user=user)
        self.assertEqual(OK, done.returncode, done.stderr)
        report = json.loads(done.stdout)
        self.assertTrue(report["check"]["ok"])
        self.assertRegex(done.stderr, r"^kiln: \[warn\] [^\n]+\n$")
        return report, done.stderr

    def test_a_home(self):
        for source in ("compiled", "disk"):
            self.assertEqual(source, self.json("run", *SHAPE)["source"])
        self.assertEqual(str(self.home / ".cache/kiln/kernels.db"), self.kiln("cache", "path").stdout.strip())
        for path in (".cache", ".cache/kiln", ".local/share/kiln"):
            self.assertEqual(0o700, stat.S_IMODE((self.home / path).stat().st_mode))

    def test_a_home_that_the_group_may_write_and_the_command_that_mends_it(self):
        self.home.chmod(0o2775)  # as systems with a group for each user have
        for _ in range(2):
            report, warning = self.warned()
            self.assertEqual("compiled", report["source"])
            self.assertIn(f"{self.home} is not trusted: it is a directory of uid {os.getuid()} with mode 2775", warning)
        self.assertEqual([], list(self.home.iterdir()))
        doctor = self.kiln("doctor", expect=FAILED).stdout
        self.assertRegex(doctor, rf"(?m)^fail +cache directory +{self.home} is not trusted")
        command = re.search("`(chmod [^`]+)` mends it", warning).group(1)
        subprocess.run(command, shell=True, check=True)
        self.kiln("run", *SHAPE)
        self.assertEqual("disk", self.json("run", *SHAPE)["source"])

    def test_a_linked_cache_directory(self):
        (self.dir / "scratch").mkdir()
        (self.home / ".cache").symlink_to(self.dir / "scratch")
        self.kiln("run", *SHAPE)
        self.assertTrue((self.dir / "scratch/kiln/kernels.db").exists())
        self.assertEqual("disk", self.json("run", *SHAPE)["source"])

    def test_no_home(self):
        for home in ("", "relative"):
            report, warning = self.warned(env={"HOME": home})
            self.assertEqual("compiled", report["source"])
            self.assertIn("the kernel cache is off: there is no place for it; set HOME", warning)
        _, warning = self.warned(env={"HOME": "/proc/none"})  # no home, but a name for one
        self.assertIn("cannot make the directory /proc/none", warning)

    @unittest.skipUnless(os.getuid() == 0, "needs the superuser to be another user")
    def test_a_home_of_another_user(self):
        # As in an image that runs under any number: nothing can be made there, whoever that is.
        report, warning = self.warned(user=12345)
        self.assertEqual("compiled", report["source"])
        self.assertIn(f"cannot make the directory {self.home}/.", warning)
        self.home.chmod(0o777)
        _, warning = self.warned(user=12345)
        self.assertIn(f"the superuser's `chmod go-w {self.home}` mends it, or, where others must write, `chmod +t {self.home}`", warning)
        self.home.chmod(0o1777)
        for source in ("compiled", "disk"):
            done = subprocess.run([*KILN, "run", *SHAPE, "--json"], env=self.env, cwd=self.dir, capture_output=True, text=True, user=12345)
            self.assertEqual((source, ""), (json.loads(done.stdout)["source"], done.stderr))
        # Another user finds it taken, and goes on.
        _, warning = self.warned(user=12346)
        self.assertIn("uid 12345", warning)

    @unittest.skipUnless(os.environ.get("KILN_TEST_FAKE_NFS"), "needs a library to preload")
    @unittest.skipIf(os.environ.get("TEST_EMULATOR"), "the emulator is a program of another machine")
    def test_a_home_on_the_network(self):
        runtime = self.dir / "run"
        runtime.mkdir(mode=0o700)
        env = {"LD_PRELOAD": os.environ["KILN_TEST_FAKE_NFS"], "XDG_RUNTIME_DIR": str(runtime),
               "FAKE_NFS": f"{self.home}:/var/tmp:/tmp/kiln-{os.getuid()}"}
        for source in ("compiled", "disk"):
            report, warning = self.warned(env=env)
            self.assertEqual(source, report["source"])
            self.assertIn(f"{self.home}/.cache/kiln is on nfs", warning)
            self.assertIn(f"the kernel cache is in {runtime}/kiln/cache instead", warning)
        self.assertEqual([], list(self.home.iterdir()))
        self.assertTrue((runtime / "kiln/key/cache.key").exists())
        self.assertEqual(str(runtime / "kiln/cache/kernels.db"), self.kiln("cache", "path", env=env).stdout.strip())
        (row,) = [row for row in self.json("info", env=env)["environment"] if row["name"] == "KILN_CACHE_DIR"]
        self.assertEqual(("moved", f"{runtime}/kiln/cache"), (row["origin"], row["value"]))
        self.assertIn("is on nfs", self.kiln("doctor", env=env).stdout)

    @unittest.skipUnless(os.getuid() == 0, "needs the superuser to make a setuid program")
    @unittest.skipIf(os.environ.get("TEST_EMULATOR"), "emulated programs have no more rights")
    def test_a_privileged_process_ignores_its_environment(self):
        if os.statvfs(self.dir).f_flag & os.ST_NOSUID:
            self.skipTest("mounted nosuid")
        program = shutil.copy(KILN[-1], self.dir / "kiln")
        os.chmod(program, 0o4755)
        env = {**self.env, "KILN_CACHE_DIR": str(self.dir / "planted"), "KILN_THREADS": "1", "KILN_DUMP_DIR": str(self.dir / "dump"),
               "KILN_TRUSTED_KEYS": str(self.dir / "keys"), "KILN_CACHE_SYSTEM_DIR": str(self.dir / "system"), "KILN_LOG": "off"}
        done = subprocess.run([program, "info", "--json"], env=env, capture_output=True, text=True, user=12345)
        self.assertEqual(OK, done.returncode, done.stderr)
        self.assertIn("the environment is ignored: this process has rights that its caller does not have", done.stderr)
        rows = {row["name"]: (row["value"], row["origin"]) for row in json.loads(done.stdout)["environment"]}
        self.assertEqual({"default"}, {origin for _, origin in rows.values()})
        for name in ("KILN_CACHE_DIR", "KILN_DUMP_DIR", "KILN_TRUSTED_KEYS", "KILN_CACHE_SYSTEM_DIR"):
            self.assertEqual("", rows[name][0])
        done = subprocess.run([program, "run", *SHAPE, "--check", "--json"], env=env, cwd="/", capture_output=True, text=True, user=12345)
        self.assertTrue(json.loads(done.stdout)["check"]["ok"], done.stderr)
        self.assertFalse((self.dir / "planted").exists() or (self.dir / "dump").exists())


@not_emulated
class Bundle(CommandTest):
    """Bundles between two caches: this one, and that of another machine."""
    HEADER, INDEX_ENTRY, DIGEST = 50, 72, 32  # api/doc/bundle.md

    def setUp(self):
        super().setUp()
        self.there = {"KILN_CACHE_DIR": str(self.dir / "there")}
        self.write("m.json", json.dumps({"kernels": [{"op": "int8_mm", "m": [1, 16], "n": [32, 48], "k": 64}]}))
        self.kiln("warmup", "m.json")
        self.public = self.kiln("cache", "keygen", "secret").stdout
        self.id = self.public.split()[1]

    def test_to_another_machine_and_back(self):
        report = self.json("cache", "export", "a.bundle", "--key", "secret")
        self.assertEqual({"path": "a.bundle", "kernels": 4, "bytes": (self.dir / "a.bundle").stat().st_size, "signed_by": self.id, "left_out": 0, "refused": 0}, report)
        self.assertEqual(0o644, stat.S_IMODE((self.dir / "a.bundle").stat().st_mode))
        self.write("trusted", f"# the fleet's\n{self.public}")
        arguments = ["cache", "import", "a.bundle", "--trusted", "trusted"]
        expected = {"path": "a.bundle", "kernels": 4, "added": 4, "present": 0, "signed_by": self.id, "trusted": True, "dry_run": True}
        self.assertEqual(expected, self.json(*arguments, "--dry-run", env=self.there))
        self.assertFalse((self.dir / "there").exists())
        self.assertEqual({**expected, "dry_run": False}, self.json(*arguments, env=self.there))
        self.assertEqual({**expected, "added": 0, "present": 4, "dry_run": False}, self.json(*arguments, env=self.there))
        self.assertIn("added 0, 4 there already", self.kiln(*arguments, env=self.there).stdout)
        self.assertEqual({"same": 4, "different": [], "failed": [], "skipped": 0}, self.json("cache", "verify", "--recompile", env=self.there)["recompiled"])
        self.assertEqual("disk", self.json("run", "int8_mm", "m=1", "n=32", "k=64", "--check", env={**self.there, "KILN_MISS": "error"})["source"])
        self.kiln("cache", "export", "b.bundle", "--key", "secret", env=self.there)
        self.assertEqual((self.dir / "a.bundle").read_bytes(), (self.dir / "b.bundle").read_bytes())

    def test_every_generator_and_target(self):
        for target in self.json("info")["known_targets"]:
            if not target["target"].startswith("nvptx"):
                for path in ("", "portable"):
                    self.kiln("warmup", "int8_mm", "m=7", "n=64", "k=64", "--target", target["name"], env={"KILN_FORCE": path})
        rows = self.json("cache", "stats")["rows"]
        self.assertEqual((rows, 0), tuple(self.json("cache", "export", "a.bundle")[name] for name in ("kernels", "left_out")))
        self.assertEqual(rows, self.json("cache", "import", "a.bundle", "--allow-unsigned", env=self.there)["added"])

    def test_selection(self):
        self.kiln("warmup", *SHAPE, "--target", "x86-64-v3")
        self.kiln("warmup", *SHAPE, "--target", "neoverse-v1")
        of = lambda *arguments: self.json("cache", "export", "a.bundle", *arguments)["kernels"]
        self.assertEqual(6, of())
        self.assertEqual(6, of("--op", "int8_mm", "--max-age", "1h"))
        self.assertEqual(1, of("--target", "neoverse-v1"))
        time.sleep(1.1)
        self.refused("cache", "export", "none.bundle", "--max-age", "0s", says=["no kernel to export that --op, --target and --max-age let through", "nothing was written"], expect=FAILED)
        self.assertFalse((self.dir / "none.bundle").exists())
        for arguments, says in (
            (["--max-age", "7"], "--max-age 7: allowed is a number"),
            (["--max-age", "9999999999d"], "--max-age"),
            (["--op", "int9_mm"], ["--op int9_mm", "int8_mm"]),
            (["--target", "vax"], "target 'vax'"),
        ):
            self.refused("cache", "export", "none.bundle", *arguments, says=says)

    def test_exporting_is_no_use_and_leaves_bad_rows_out(self):
        before = self.json("cache", "list")
        self.kiln("cache", "export", "a.bundle")
        self.assertEqual(before, self.json("cache", "list"))
        Cache.damage(self, before["kernels"][0]["key"])
        done = self.kiln("cache", "export", "a.bundle", "--json", expect=INTEGRITY)
        self.assertEqual((3, 1), tuple(json.loads(done.stdout)[name] for name in ("kernels", "refused")))
        self.assertIn("1 kernel failed authentication and left out", done.stderr)
        self.assertEqual(4, self.json("cache", "stats")["rows"])

    def test_who_is_trusted(self):
        self.kiln("cache", "export", "signed", "--key", "secret")
        self.kiln("cache", "export", "unsigned")
        self.kiln("cache", "keygen", "other")
        self.write("others", self.kiln("cache", "keygen", "other", "--public").stdout)
        own = self.dir / "data" / "kiln" / "trusted.keys"
        self.refused("cache", "import", "unsigned", env=self.there, says=["unsigned is unsigned", "--allow-unsigned"], expect=INTEGRITY)
        self.refused("cache", "import", "signed", env=self.there, says=[self.id, "none of the 0 trusted here", f"{own}, which does not exist"], expect=INTEGRITY)
        self.refused("cache", "import", "signed", "--trusted", "others", env=self.there, says=["none of the 1 trusted here (others)"], expect=INTEGRITY)
        self.assertFalse((self.dir / "there").exists())
        own.write_text(self.public)
        self.assertTrue(self.json("cache", "import", "signed", "--dry-run", env=self.there)["trusted"])
        self.refused("cache", "import", "signed", "--trusted", "others", env=self.there, says="none of the 1 trusted", expect=INTEGRITY)
        own.chmod(0o622)
        self.refused("cache", "import", "signed", env=self.there, says=["trusted.keys is not trusted", "0622"], expect=FAILED)
        own.unlink()
        fleet = {**self.there, "KILN_TRUSTED_KEYS": str(self.write("fleet", self.public))}
        self.assertEqual(4, self.json("cache", "import", "signed", env=fleet)["added"])
        (self.dir / "keys").mkdir()
        shutil.copy(self.dir / "fleet", self.dir / "keys" / "fleet.pub")
        shutil.copy(self.dir / "others", self.dir / "keys" / "others.pub")
        self.assertTrue(self.json("cache", "import", "signed", "--trusted", "keys", "--dry-run", env=self.there)["trusted"])
        self.assertTrue(self.json("cache", "import", "signed", "--trusted", "others", "--trusted", "fleet", "--dry-run", env=self.there)["trusted"])
        for name, signer in (("signed", self.id), ("unsigned", None)):
            report = self.json("cache", "import", name, "--allow-unsigned", "--dry-run", env=self.there)
            self.assertEqual((signer, False), (report["signed_by"], report["trusted"]))

    def sealed(self, bundle):
        """The digest of an unsigned bundle, made right again."""
        end = self.HEADER + self.INDEX_ENTRY * struct.unpack_from("<I", bundle, 14)[0]
        return bundle[:end] + hashlib.blake2b(bundle[:end], digest_size=self.DIGEST).digest() + bundle[end + self.DIGEST:]

    def test_a_bad_bundle_changes_nothing(self):
        self.kiln("cache", "export", "good")
        good = (self.dir / "good").read_bytes()
        self.assertEqual(good, self.sealed(good))
        entry = lambda i: slice(self.HEADER + i * self.INDEX_ENTRY, self.HEADER + (i + 1) * self.INDEX_ENTRY)
        sizes = [struct.unpack_from("<I", good, entry(i).start + 64)[0] for i in range(4)]
        start = self.HEADER + 4 * self.INDEX_ENTRY + self.DIGEST
        stored = [good[start + sum(sizes[:i]):start + sum(sizes[:i + 1])] for i in range(4)]
        # The last two kernels under each other's key.
        index = [good[entry(i)] for i in range(4)]
        index[2], index[3] = index[2][:32] + index[3][32:], index[3][:32] + index[2][32:]
        swapped = self.sealed(good[:self.HEADER] + b"".join(index) + bytes(self.DIGEST) + stored[0] + stored[1] + stored[3] + stored[2])
        forged_key = self.sealed(good[:entry(3).start] + b"\xff" * 32 + good[entry(3).start + 32:])
        cases = {
            b"": "fewer than a header",
            good[:-1]: "cut short or something follows",
            good[:60]: "cut short",
            good + b"x": "something follows its end",
            good[:8] + b"\x02" + good[9:]: "format version 2",
            good[:-20] + bytes([good[-20] ^ 1]) + good[-19:]: "its digest is wrong",
            swapped: "its key is not the digest of what it says",
            forged_key: "its key is not the digest of what it says",
        }
        for content, says in cases.items():
            with self.subTest(says=says):
                self.write("bad", content)
                self.refused("cache", "import", "bad", "--allow-unsigned", env=self.there, says=["bad", says], expect=FAILED if "version" in says else INTEGRITY)
                self.assertFalse((self.dir / "there").exists())
        self.assertEqual(4, self.json("cache", "import", "good", "--allow-unsigned", env=self.there)["added"])

    def test_not_files(self):
        os.mkfifo(self.dir / "fifo")
        for name, says in (("none", "No such file"), (".", "not a regular file"), ("/dev/null", "not a regular file"), ("fifo", "not a regular file")):
            self.refused("cache", "import", name, says=says, expect=FAILED)
        for name, says in ((".", "not a regular file"), ("/dev/null", "not a regular file"), ("none/a.bundle", "No such file")):
            self.refused("cache", "export", name, says=says, expect=FAILED)
        self.refused("cache", "import", "none", env={"KILN_CACHE": "ro"}, says="KILN_CACHE is not rw", expect=FAILED)
        self.refused("cache", "import", "none", env={"KILN_CACHE": "off"}, says="it is off", expect=FAILED)

    def test_a_busy_cache_is_waited_for(self):
        self.kiln("cache", "export", "a.bundle")
        self.kiln("warmup", *SHAPE, env=self.there)
        with contextlib.closing(sqlite3.connect(self.dir / "there" / "kernels.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = subprocess.Popen([*KILN, "cache", "import", "a.bundle", "--allow-unsigned", "--json"], env={**self.env, **self.there}, cwd=self.dir, stdout=subprocess.PIPE, text=True)
            time.sleep(0.3)
            other.execute("ROLLBACK")
        self.assertEqual(4, json.loads(waiting.communicate(timeout=60)[0])["added"])

    def test_keys(self):
        self.assertRegex(self.public, r"^ed25519 [0-9a-f]{16} [A-Za-z0-9+/]{43}=\n$")
        secret = (self.dir / "secret").read_text()
        self.assertEqual(0o600, stat.S_IMODE((self.dir / "secret").stat().st_mode))
        self.refused("cache", "keygen", "secret", says="never overwritten", expect=FAILED)
        self.assertEqual(secret, (self.dir / "secret").read_text())
        self.assertEqual({"path": "secret", "id": self.id, "public_key": self.public.strip()}, self.json("cache", "keygen", "secret", "--public"))
        self.assertNotEqual(self.public, self.kiln("cache", "keygen", "another").stdout)
        self.write("public", self.public).chmod(0o600)
        self.refused("cache", "export", "x", "--key", "public", says="no secret key", expect=INTEGRITY)
        self.refused("cache", "import", "x", "--trusted", "secret", says="a secret key stands where a public one is needed")
        (self.dir / "secret").chmod(0o644)
        self.refused("cache", "export", "x", "--key", "secret", says=["secret is not trusted", "0644", "0600"], expect=FAILED)
        self.assertFalse((self.dir / "x").exists())


@not_emulated
class SystemCache(CommandTest):
    """A bundle under the user's cache, as an image or an administrator provides it."""

    def setUp(self):
        super().setUp()
        self.bundle = self.dir / "system" / "kernels.bundle"
        self.bundle.parent.mkdir()
        key = self.json("run", *SHAPE)["key"]
        self.public = self.kiln("cache", "keygen", "secret").stdout
        self.id = self.public.split()[1]
        self.kiln("cache", "export", self.bundle, "--key", "secret")
        shutil.rmtree(self.dir / "cache")
        self.env.update(KILN_CACHE_SYSTEM_DIR=str(self.bundle.parent), KILN_TRUSTED_KEYS=str(self.write("trusted", self.public)))
        self.key = key

    def test_serves_without_a_cache_of_ones_own(self):
        strict = {"KILN_MISS": "error"}
        report = self.json("run", *SHAPE, "--check", env=strict)
        self.assertEqual(("disk", self.key, True), (report["source"], report["key"], report["check"]["ok"]))
        self.assertEqual("system", self.json("explain", *SHAPE)["tier"])
        self.assertEqual(1, self.json("warmup", *SHAPE)["hit"])
        self.assertIn("ret", self.json("disasm", *SHAPE, env=strict)["listing"])
        self.assertFalse((self.dir / "cache").exists())
        homeless = {"HOME": "", "XDG_DATA_HOME": "", "KILN_CACHE_DIR": "", **strict}
        self.assertEqual("disk", self.json("run", *SHAPE, env=homeless)["source"])
        for off in ({"KILN_CACHE": "off"}, {"KILN_DISABLE": "disk"}):
            self.assertEqual("compiled", self.json("run", *SHAPE, env=off)["source"])

    def test_the_users_own_comes_first(self):
        self.json("run", *SHAPE, env={"KILN_CACHE_SYSTEM_DIR": ""})
        self.assertEqual("disk", self.json("explain", *SHAPE)["tier"])
        Cache.damage(self, self.key)  # a bad row is no reason to compile
        done = self.kiln("run", *SHAPE, "--json", env={"KILN_MISS": "error"})
        self.assertIn("fails authentication", done.stderr)
        self.assertEqual("disk", json.loads(done.stdout)["source"])
        self.assertEqual("system", self.json("explain", *SHAPE)["tier"])

    def test_is_shown(self):
        system = {"path": str(self.bundle), "rows": 1, "file_bytes": self.bundle.stat().st_size, "signed_by": self.id, "error": ""}
        self.assertEqual(system, self.json("cache", "stats")["system"])
        self.assertIn(f"{self.bundle}: 1 kernel", self.kiln("cache", "stats").stdout)
        self.assertIsNone(self.json("cache", "stats", env={"KILN_CACHE_SYSTEM_DIR": ""})["system"])
        self.assertEqual(str(self.bundle), self.json("info")["cache"]["system_path"])
        self.assertIn(f"under it  {self.bundle}", self.kiln("info").stdout)
        self.assertRegex(self.kiln("doctor").stdout, r"(?m)^ok +system cache .*1 kernel, all authentic, signed by " + self.id)

    def test_untrusted_is_a_miss_said_once(self):
        env = {"KILN_TRUSTED_KEYS": str(self.write("nobody", "# nobody\n"))}
        done = self.kiln("run", *SHAPE, "--check", "--json", env=env)
        self.assertEqual("compiled", json.loads(done.stdout)["source"])
        self.assertEqual(1, done.stderr.count("\n"), done.stderr)
        self.assertIn(f"is signed by key {self.id}, which is not in the list of trusted keys", done.stderr)
        self.assertIn("not in the list", self.json("cache", "stats", env=env)["system"]["error"])
        self.assertRegex(self.kiln("doctor", env=env, expect=FAILED).stdout, r"(?m)^fail +system cache .*not in the list")
        content = bytearray(self.bundle.read_bytes())
        content[-9] ^= 1
        self.bundle.write_bytes(content)
        self.assertRegex(self.kiln("doctor", expect=FAILED).stdout, r"(?m)^fail +system cache +1 of 1 kernel")
        self.bundle.unlink()
        self.assertRegex(self.kiln("doctor").stdout, r"(?m)^warn +system cache .*No such file")


@unittest.skipUnless(REDIS, "redis-tools is not installed")
@not_emulated
class RemoteCache(CommandTest):
    """Redis behind the caches on disk: the CI fills it, the fleet reads it."""

    def setUp(self):
        super().setUp()
        socket = self.dir / "redis.sock"
        # Debian's redis-tools has the server's program under another name: it is what its own name says.
        redis = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(self.dir), "--logfile", "redis.log"],
                                 executable=REDIS, stdin=subprocess.DEVNULL)
        self.addCleanup(redis.wait)
        self.addCleanup(redis.kill)
        self.redis = redis
        for _ in range(1000):
            if socket.exists():
                break
            time.sleep(0.02)
        self.public = self.kiln("cache", "keygen", "secret").stdout
        self.id = self.public.split()[1]
        self.url = f"unix://{socket}?timeout_ms=1000"
        self.env.update(KILN_REMOTE=self.url, KILN_TRUSTED_KEYS=str(self.write("trusted", self.public)))
        self.ci = {"KILN_REMOTE_SIGNING_KEY": str(self.dir / "secret"), "KILN_CACHE_DIR": str(self.dir / "ci-cache")}

    def test_filled_by_warmup_and_read_by_all(self):
        made = self.json("warmup", *SHAPE, env=self.ci)
        self.assertEqual((1, 1), (made["compiled"], made["written_to_remote"]))
        self.assertIn(f"; 1 written to {self.url}", self.kiln("warmup", *SHAPE, env=self.ci).stdout)
        self.assertEqual("remote", self.json("explain", *SHAPE)["tier"])
        self.assertIn("hit: remote", self.kiln("explain", *SHAPE).stdout)
        self.assertIn("ret", self.json("disasm", *SHAPE, env={"KILN_MISS": "error"})["listing"])
        report = self.json("run", *SHAPE, "--check", env={"KILN_MISS": "error"})
        self.assertEqual(("remote", True), (report["source"], report["check"]["ok"]))
        self.assertEqual(self.id, self.json("cache", "inspect", report["key"])["signed_by"])
        self.assertRegex(self.kiln("cache", "inspect", report["key"]).stdout, rf"(?m)^signed by +{self.id}$")
        self.redis.kill()
        self.assertEqual("disk", self.json("run", *SHAPE)["source"])
        self.assertEqual(1, self.json("cache", "verify")["ok"])

    def test_is_counted(self):
        self.json("warmup", *SHAPE, env=self.ci)
        stranger = {"KILN_TRUSTED_KEYS": str(self.write("others", self.kiln("cache", "keygen", "other").stdout))}
        self.kiln("run", *SHAPE, env=stranger)
        shutil.rmtree(self.dir / "cache")
        self.assertEqual("remote", self.json("run", *SHAPE)["source"])
        shutil.rmtree(self.dir / "cache")
        self.kiln("run", *SHAPE, env=stranger)
        usage = self.json("cache", "stats")["usage"]
        names = ("remote_hits", "misses", "compiles", "refused", "refused_remote", "remote_errors")
        self.assertEqual((0, 1, 1, 1, 1, 0), tuple(usage[name] for name in names))
        other = ["int8_mm", "m=5", "n=34", "k=70"]
        self.json("warmup", *other, env=self.ci)
        self.json("run", *other)
        self.redis.kill()
        self.redis.wait()
        self.json("run", "int8_mm", "m=5", "n=35", "k=70")
        usage = self.json("cache", "stats")["usage"]
        self.assertEqual((1, 2, 2, 1, 1, 1), tuple(usage[name] for name in names))
        shown = self.kiln("cache", "stats").stdout
        for text in ("1 in the remote tier", "1 (1 of the remote tier)", "0 errors, 1 in the remote tier"):
            self.assertIn(text, shown)

    def test_is_shown(self):
        self.json("warmup", *SHAPE, env=self.ci)
        remote = self.json("cache", "stats")["remote"]
        self.assertEqual((self.url, 1, ""), (remote["url"], remote["names"], remote["error"]))
        self.assertIn(f"{self.url}: 1 name", self.kiln("cache", "stats").stdout)
        self.assertEqual(self.url, self.json("info")["cache"]["remote"])
        self.assertIn(f"behind it  {self.url}", self.kiln("info").stdout)
        secret = self.kiln("info", env={"KILN_REMOTE": "redis://ci:hunter2@127.0.0.1:1/3"}).stdout
        self.assertIn("redis://ci:***@127.0.0.1:1/3", secret)
        self.assertNotIn("hunter2", secret)
        healthy = self.kiln("doctor", env=self.ci).stdout
        for line in (r"ok +trusted keys +1 key in ", rf"ok +signing key +{self.id}", r"ok +remote cache .*answers in", r"ok +remote kernels +0 of 1 looked at would be refused"):
            self.assertRegex(healthy, "(?m)^" + line)

    def test_what_a_doctor_finds(self):
        self.json("warmup", *SHAPE, env=self.ci)
        other = self.kiln("cache", "keygen", "other").stdout
        nobody = {"KILN_TRUSTED_KEYS": str(self.write("others", other))}
        self.assertRegex(self.kiln("doctor", env=nobody).stdout, rf"(?m)^warn +remote kernels +1 of 1 .*names key {self.id}, which is not in the list")
        done = self.kiln("run", *SHAPE, "--json", env=nobody)
        self.assertEqual("compiled", json.loads(done.stdout)["source"])
        self.assertEqual(1, done.stderr.count("\n"), done.stderr)
        self.assertIn("a row is refused", done.stderr)
        self.assertRegex(self.kiln("doctor", env={"KILN_TRUSTED_KEYS": "/no/such"}, expect=FAILED).stdout, r"(?m)^fail +remote keys .*/no/such")
        (self.dir / "other").chmod(0o644)
        self.assertRegex(self.kiln("doctor", env={"KILN_REMOTE_SIGNING_KEY": str(self.dir / "other")}, expect=FAILED).stdout, r"(?m)^fail +signing key")
        self.redis.kill()
        self.redis.wait()
        self.assertRegex(self.kiln("doctor", expect=FAILED).stdout, r"(?m)^fail +remote cache .*Connection refused")
        self.assertIn("Connection refused", self.json("cache", "stats")["remote"]["error"])

    def test_bad_urls(self):
        for url, says in (("rediss://:hunter2@h", "TLS"), ("redis://hunter2@h", ":PASSWORD@"), ("http://h", "redis://")):
            done = self.kiln("info", env={"KILN_REMOTE": url}, expect=USAGE)
            self.assertIn("KILN_REMOTE: ", done.stderr)
            self.assertIn(says, done.stderr)
            self.assertNotIn("hunter2", done.stderr)


class Explain(CommandTest):
    def test_miss_then_hit(self):
        miss = self.json("explain", *SHAPE)
        self.assertEqual("none", miss["tier"])
        self.json("run", *SHAPE)
        hit = self.json("explain", *SHAPE)
        self.assertEqual(("disk", miss["key"]), (hit["tier"], hit["key"]))
        near = self.json("explain", "int8_mm", "m=5", "n=34", "k=70")
        self.assertTrue(near["nearest"].endswith("differs in n"), near["nearest"])
        self.assertIn("differs in n", self.kiln("explain", "int8_mm", "m=5", "n=34", "k=70").stdout)

    def test_why_a_miss(self):
        self.kiln("warmup", *SHAPE, env={"KILN_FORCE": "portable"})
        self.assertEqual("", self.json("explain", *SHAPE, env={"KILN_FORCE": "portable"})["why"])
        self.assertEqual("", self.json("explain", "int8_mm", "m=5", "n=34", "k=70")["why"])  # another desc was never expected
        key = self.json("cache", "list")["kernels"][0]["key"]
        why = self.json("explain", *SHAPE, "--target", "x86-64-v3", env={"KILN_DISABLE": "llvm"})["why"]
        self.assertIn(f"kernel {key[:16]} of the same desc is stored: generator ", why)
        self.assertIn("isa portable there, avx2 here", why)
        here = self.json("info")["target"].split(":")[0]
        there, cores = ("aarch64", "neoverse-v1") if here == "x86_64" else ("x86_64", "x86-64-v3")
        why = self.json("explain", *SHAPE, "--target", cores, env={"KILN_FORCE": "portable"})["why"]
        self.assertIn(f"{here} there, {there} here", why)
        self.assertIn(why, self.kiln("explain", *SHAPE, "--target", cores, env={"KILN_FORCE": "portable"}).stdout)

    def test_candidates(self):
        report = self.json("explain", *SHAPE, "--target", "x86-64-v3", env={"KILN_DISABLE": "x86"})
        taken = [candidate for candidate in report["candidates"] if candidate["taken"]]
        self.assertEqual(1, len(taken))
        self.assertEqual(report["isa"], taken[0]["isa"])
        reasons = {candidate["isa"]: candidate["reason"] for candidate in report["candidates"]}
        self.assertIn("KILN_DISABLE", reasons["avx2"])
        self.assertEqual([path["isa"] for path in self.json("info")["ops"][0]["paths"]], [candidate["isa"] for candidate in report["candidates"]])

    def test_every_path_is_accounted_for(self):
        ops = {"int8_mm": ["m=4", "n=64", "k=64"], "int8_linear": ["m=4", "n=64", "k=64"], "int4_mm": ["m=4", "n=64", "k=64", "group=32"],
               "attention": ["b=1", "hq=2", "hkv=1", "m=4", "n=64", "d=64", "dv=64"]}
        for target, here in (("sapphirerapids", {"amx", "avx512vnni", "avxvnni", "avx2", "avx512bf16"}), ("apple-m4", {"sme", "i8mm", "sdot", "neon"})):
            for op, words in ops.items():
                with self.subTest(target, op=op):
                    report = self.json("explain", op, *words, "--target", target)
                    rows = {candidate["isa"]: candidate for candidate in report["candidates"]}
                    self.assertLessEqual(here | {"portable", "reference"}, set(rows) | set(report["without_implementation"]))
                    self.assertFalse(set(rows) & set(report["without_implementation"]))
                    self.assertEqual([], [isa for isa, row in rows.items() if not row["taken"] and not row["reason"]])
        self.assertEqual("amx", self.json("explain", "int8_linear", *ops["int8_linear"], "--target", "sapphirerapids")["isa"])
        alone = self.json("explain", "int8_linear", "m=1", "n=64", "k=64", "--target", "sapphirerapids")
        self.assertEqual("avx512vnni", alone["isa"])
        self.assertIn("M ≤ 1", alone["candidates"][0]["reason"])
        self.assertIn("without an implementation of int4_mm: ", self.kiln("explain", "int4_mm", *ops["int4_mm"]).stdout)

    def test_nothing_left(self):
        env = {"KILN_DISABLE": "x86,arm,portable,reference"}
        report = self.json("explain", *SHAPE, env=env, expect=FAILED)
        self.assertEqual((None, ""), (report["isa"], report["key"]))
        self.refused("run", *SHAPE, env=env, says=["nothing computes", "left out by KILN_DISABLE"], expect=FAILED)

    def test_force(self):
        env = {"KILN_FORCE": "portable", "KILN_DISABLE": "llvm"}
        reasons = {candidate["isa"]: candidate["reason"] for candidate in self.json("explain", *SHAPE, env=env, expect=FAILED)["candidates"]}
        self.assertIn("KILN_FORCE takes portable only", reasons["reference"])
        self.assertIn("KILN_DISABLE", reasons["portable"])

    def test_no_tensors(self):
        self.refused("explain", *SHAPE, "a=@a.npy", says="takes no tensors")


class Disasm(CommandTest):
    def test_listing(self):
        report = self.json("disasm", *SHAPE)
        self.assertIn("ret", report["listing"])
        self.assertEqual(report["key"], self.json("run", *SHAPE)["key"])
        self.assertIn("main", self.kiln("disasm", *SHAPE).stdout)

    def test_reference_has_none(self):
        self.refused("disasm", *SHAPE, env={"KILN_FORCE": "reference"}, says="no generated code", expect=FAILED)


class Doctor(CommandTest):
    def test_healthy(self):
        report = self.json("doctor")
        self.assertTrue(report["ok"])
        states = {check["name"]: check["state"] for check in report["checks"]}
        for name in ("machine", "clock", "SQLite", "code memory", "cache directory", "cache key", "trusted keys", "run int8_mm", "LLVM",
                     "cache", "stored kernels", "locks"):
            self.assertEqual("ok", states.get(name), report)
        self.assertIn("NVIDIA driver", states)
        self.assertIn("free space", states)
        self.assertRegex(self.kiln("doctor").stdout, r"(?m)^ok +SQLite +3\.")

    @not_emulated
    def test_open_key(self):
        self.kiln("doctor")
        (self.dir / "data" / "kiln" / "cache.key").chmod(0o644)
        done = self.kiln("doctor", expect=FAILED)
        self.assertRegex(done.stdout, r"(?m)^fail +cache key .*0600")

    @not_emulated
    def test_unknown_variables(self):
        self.assertRegex(self.kiln("doctor", env={"KILN_DISBALE": "amx"}).stdout, r"(?m)^warn +environment +KILN_DISBALE is no variable")

    @not_emulated
    def test_forbidden_compiling_is_no_failure(self):
        report = self.json("doctor", env={"KILN_MISS": "error"})
        self.assertIn({"state": "warn", "name": "run int8_mm"}, [{name: check[name] for name in ("state", "name")} for check in report["checks"]])


@not_emulated
class DoctorFindings(CommandTest):
    """Each thing that doctor looks at, made wrong: the line that says so, and what to do."""

    def finds(self, state, name, *says, env=None, command=None, **options):
        """`doctor` says this of `name`, in its text and as JSON; and its exit code goes with it."""
        argv = command or [*KILN, "doctor"]
        done = subprocess.run(argv, env={**self.env, **(env or {})}, cwd=self.dir, capture_output=True, text=True, timeout=120, **options)
        self.assertEqual("", done.stderr)
        lines = [line for line in done.stdout.splitlines() if re.match(rf"{state} +{name} ", line)]
        self.assertTrue(any(all(text in line for text in says) for line in lines), done.stdout)
        self.assertEqual(FAILED if re.search("(?m)^fail ", done.stdout) else OK, done.returncode)
        if command is None:
            done = subprocess.run([*argv, "--json"], env={**self.env, **(env or {})}, cwd=self.dir, capture_output=True, text=True, timeout=120, **options)
            report = json.loads(done.stdout)
            self.assertEqual(done.returncode == OK, report["ok"])
            self.assertIn((state, name), [(check["state"], check["name"]) for check in report["checks"]])

    def test_permissions_above(self):
        (self.dir / "open/data").mkdir(parents=True)
        (self.dir / "open").chmod(0o777)
        for name, variable in (("cache directory", "KILN_CACHE_DIR"), ("cache key", "XDG_DATA_HOME")):
            self.finds("fail", name, f"{self.dir}/open is not trusted", "0777", f"`chmod go-w {self.dir}/open` mends it", env={variable: str(self.dir / "open/data")})

    def test_trusted_keys(self):
        self.finds("ok", "trusted keys", "none: ", "trusted.keys does not exist")
        keys = self.write("keys", self.kiln("cache", "keygen", "secret").stdout)
        self.finds("ok", "trusted keys", "1 key in", env={"KILN_TRUSTED_KEYS": str(keys)})
        keys.chmod(0o666)
        self.finds("fail", "trusted keys", "keys is not trusted", "0666", env={"KILN_TRUSTED_KEYS": str(keys)})

    def test_a_clock_that_was_ahead(self):
        self.kiln("doctor")
        db = sqlite3.connect(self.dir / "cache" / "kernels.db")
        db.execute("UPDATE kernels SET last_hit_at = 4102531200")  # 2100
        db.commit()
        db.close()
        self.finds("warn", "clock", "is before the last use of a stored kernel, 2100-01-0", "kiln cache clear")

    @unittest.skipIf(os.environ.get("TEST_EMULATOR"), "the program is the emulator")
    def test_a_clock_that_is_behind(self):
        program = shutil.copy(KILN[-1], self.dir / "kiln")
        os.utime(program, (4102531200, 4102531200))
        self.finds("warn", "clock", "is before this command was built or installed, 2100-01-0", "set the clock", command=[program, "doctor"])

    def test_locks(self):
        (self.dir / "cache/kernels.lock").mkdir(parents=True)
        (self.dir / "cache").chmod(0o700)
        self.finds("fail", "locks", "kernels.lock: cannot open", "KILN_CACHE_DIR")
        self.finds("ok", "locks", "only SQLite's", env={"KILN_CACHE": "ro"})

    def test_bad_rows(self):
        key = self.json("run", *SHAPE)["key"]
        Cache.damage(self, key)
        self.finds("fail", "stored kernels", "1 of 2 fail authentication: `kiln cache verify` removes them")

    def test_a_full_place_and_a_read_only_one(self):
        probe = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m none "$1" && umount "$1"', "-", str(self.dir)]
        if os.environ.get("TEST_EMULATOR") or subprocess.run(probe, capture_output=True).returncode != 0:
            self.skipTest("nothing can be mounted")
        (self.dir / "cache").mkdir(mode=0o700)
        mounted = 'mount -t tmpfs -o mode=700,{options} none "$1" && shift && exec "$@"'
        def on(options):
            return ["unshare", "-m", "sh", "-c", mounted.format(options=options), "-", str(self.dir / "cache"), *KILN, "doctor"]
        self.finds("fail", "free space", "needed are 16.0 MiB", command=on("size=1m"))
        self.finds("warn", "free space", "less than KILN_CACHE_MAX_MB=512", command=on("size=64m"))
        self.finds("warn", "file system", "tmpfs", "gone after a restart", command=on("size=64m"))
        self.finds("warn", "file system", "read-only; what is stored serves", command=on("size=64m,ro"))

    @unittest.skipIf(os.environ.get("TEST_EMULATOR"), "the emulator is refused what its program is")
    def test_code_memory(self):
        self.finds("ok", "code memory", "a memfd", "memory-deny-write-execute is off")

        def deny_write_execute():
            PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
            ctypes.CDLL(None).prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0)

        if ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) >= 0:  # PR_GET_MDWE is known
            self.finds("ok", "code memory", "a memfd", "memory-deny-write-execute is on", preexec_fn=deny_write_execute)
        limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        self.finds("warn", "code memory", "anonymous, as no memfd can be had", preexec_fn=limited)

    @unittest.skipUnless(os.environ.get("KILN_TEST_FAKE_CUDA"), "needs a driver that is none")
    @unittest.skipIf(os.environ.get("TEST_EMULATOR"), "the emulator is a program of another machine")
    def test_driver(self):
        self.finds("ok", "NVIDIA driver", "CUDA 13.0", env={"LD_LIBRARY_PATH": os.environ["KILN_TEST_FAKE_CUDA"]})
        shutil.copy(os.environ["KILN_TEST_FAKE_NFS"], self.dir / "libcuda.so.1")  # some library
        self.finds("warn", "NVIDIA driver", "cuGetProcAddress", env={"LD_LIBRARY_PATH": str(self.dir)})


@not_emulated
class BadCalls(CommandTest):
    def test_commands(self):
        self.refused(says=["no command given", "warmup"])
        self.refused("frobnicate", says=["unknown command 'frobnicate'", "known commands are info, run"])
        self.refused("--frobnicate", says="unknown option '--frobnicate'")
        self.refused("cache", says=["no command given", "inspect"])
        self.refused("cache", "frobnicate", says="unknown command 'frobnicate'")
        self.refused("info", "more", says="more")
        for command in ("run", "explain", "disasm", "bench"):
            self.refused(command, says="OP is required")
            self.refused(command, "int9_mm", says=["unknown op 'int9_mm'", "int8_mm"])
            self.refused(command, *SHAPE, "--frobnicate", says="--frobnicate")
        self.assertIn("warmup", self.kiln("--help").stdout)
        self.assertRegex(self.kiln("--version").stdout, r"^kiln \d+\.\d+\.\d+\n$")

    def test_fields(self):
        cases = {
            ("m=1",): "field n is missing",
            ("m=1", "n=1", "k=1", "z=1"): "unknown field 'z'",
            ("m=1", "n=1", "k="): "k=: allowed is an integer",
            ("m=-2", "n=1", "k=1"): "m=-2: allowed is an integer",
            ("m=1", "n=99999999999999999999", "k=1"): "n=99999999999999999999",
            ("m=2147483647", "n=2147483647", "k=2147483647"): "2^61 bytes",
            ("m=1", "n=1", "k=1", "k=1"): "field k is given twice",
            ("m=any", "n=1", "k=1"): "m=any: to run, give a number",
            ("m=1", "n=1", "k=1", "b_layout=nn"): "b_layout=nn: allowed is one of kn, nk",
            ("m=1", "n=1", "k=1", "device=tpu"): "device=tpu: allowed is cpu",
            ("m=1", "n=1", "k=1", "word"): "'word' is neither",
            ("m=1", "n=1", "k=1", "=1"): "'=1' is neither",
            ("m=1", "n=1", "k=1", "a=1"): "a is a tensor: give a=@file.npy",
            ("m=1", "n=1", "k=1", "q=@f.npy"): "unknown tensor 'q'",
            ("m=1", "n=1", "k=1", "a=@"): "lacks the name of a file",
            ("m=1", "n=1", "k=1", "c=@x", "out=@y"): "tensor c is given twice",
        }
        for fields, message in cases.items():
            with self.subTest(fields=fields):
                self.refused("run", "int8_mm", *fields, says=message)
        self.refused("run", *SHAPE, "--repeat", "0", says="--repeat")
        self.refused("bench", *SHAPE, "a=@a.npy", says="makes its own tensors")

    def test_attention(self):
        shape = {"b": "1", "hq": "4", "hkv": "2", "m": "3", "n": "5", "d": "16", "dv": "8"}
        self.write("f.npy", npy("<f4", (1,), bytes(4)))
        self.write("two.npy", npy("<i4", (2,), bytes(8)))
        cases = {
            "d=12": "d=12: allowed is a multiple of 8 from 8 to 256",
            "d=264": "d=264: allowed is an integer from 8 to 256",
            "dv=0": "dv=0: allowed is an integer from 8 to 256",
            "dv=9": "dv=9: allowed is a multiple of 8 from 8 to 256",
            "hq=3": "hq=3: allowed is a multiple of hkv, 2",
            "hkv=0": "hq=4: allowed is a multiple of hkv, 0",
            "m=-1": "m=-1: allowed is an integer from 0",
            "b=any": "b=any: to run, give a number",
            "causal=left": "causal=left: allowed is one of none, top_left, bottom_right",
            "lse=2": "lse=2: allowed is an integer from 0 to 1",
            "scale=-0.5": "attention: scale is -0.5: allowed is a finite number",
            "scale=nan": "attention: scale is nan",
            "scale=inf": "attention: scale is inf",
            "scale=big": "attention: scale=big: allowed is a number, random or @file.npy",
            "scale=@f.npy scale=1": "tensor scale is given twice",
            "kv_len=6": "attention: kv_len[0] is 6: allowed is 0 to n, 5",
            "kv_len=-1": "attention: kv_len[0] is -1",
            "kv_len=2.5": "attention: kv_len=2.5: allowed is a 32-bit integer, random or @file.npy",
            "kv_len=@two.npy": "kv_len has shape [2]",
            "kv_len=@f.npy": "has dtype '<f4': tensor kv_len",
            "lse=@lse.npy": "tensor lse is given",
            "q=1": "q is a tensor: give q=@file.npy",
        }
        for words, message in cases.items():
            fields = dict(shape)
            extra = []
            for word in words.split():
                name, value = word.split("=")
                (fields.__setitem__ if name in fields else lambda *_: extra.append(word))(name, value)
            with self.subTest(words=words):
                self.refused("run", "attention", *(f"{name}={value}" for name, value in fields.items()), *extra, "out=@o.npy", says=message,
                             env={"KILN_CACHE": "off", "KILN_FORCE": "reference"})
                self.assertFalse((self.dir / "o.npy").exists())
        for command in ("explain", "disasm", "warmup"):
            self.refused(command, "attention", *(f"{name}={value}" for name, value in shape.items()), "scale=1", says="scale=1: this command takes no tensors")

    @not_emulated
    def test_every_op_names_what_is_wrong(self):
        self.write("q.npy", npy("<u2", (1, 4, 5, 64), bytes(2560)))
        self.write("f32.npy", npy("<f4", (1, 4, 5, 64), bytes(5120)))
        self.write("cut.npy", npy("<u2", (1, 4, 5, 64), bytes(2560))[:300])
        self.write("lengths.npy", npy("<i4", (1,), struct.pack("<i", 34)))
        self.write("empty.npy", "")
        (self.dir / "folder").mkdir()
        attention, linear, bmm = "attention hq=4 hkv=2 m=5 n=33 d=64 dv=64", "int8_linear m=5 n=33 k=70", "fp8_block_bmm b=2 m=5 n=136 k=144"
        model = f"warmup --model {MODELS / 'llama-3-8b.json'}"
        for words, says in {
            "run attention": "attention: field hq is missing: give an integer from 0 to 65536",
            "run attention hq=4 hkv=2 m=5 n=33 d=257 dv=64": "d=257: allowed is an integer from 8 to 256",
            "run attention hq=99999999999999999999 hkv=2 m=5 n=33 d=64 dv=64": "hq=99999999999999999999: allowed is an integer from 0 to 65536",
            "run attention hq=4 hkv=2 m=5 n=any d=64 dv=64": "n=any: to run, give a number",
            f"run {attention} d=64": "field d is given twice",
            f"run {attention} D=64": "unknown field 'D': known are b, hq",
            f"run {attention} scale=": "scale=: allowed is a number, random or @file.npy",
            f"run {attention} q=@nosuch.npy": "nosuch.npy: cannot be read: No such file",
            f"run {attention} q=@folder": "folder: is not a regular file",
            f"run {attention} q=@/dev/zero": "/dev/zero: is not a regular file",
            f"run {attention} q=@empty.npy": "empty.npy: is not a .npy file",
            f"run {attention} q=@cut.npy": "cut.npy: is cut short",
            f"run {attention} q=@f32.npy": "f32.npy: has dtype '<f4'",
            f"run {attention} kv_len=@lengths.npy": "kv_len[0] is 34: allowed is 0 to n, 33",
            f"run {attention} device=cuda:300": "device=cuda:300: allowed is cpu, cuda or cuda:0 to cuda:255",
            "run Attention": "unknown op 'Attention': known are int8_mm",
            "run int8_linear": "int8_linear: field m is missing",
            "run int8_linear m=-1 n=33 k=70": "m=-1: allowed is an integer from 0",
            "run int8_linear m=5 n=33 k=9999999999": "k=9999999999: allowed is an integer from 0 to 2147483647",
            f"run {linear} x_dtype=s8": "x_dtype=s8: allowed is one of bf16, f16, f32",
            f"run {linear} bias=3": "bias=3: allowed is an integer from 0 to 1",
            f"run {linear} w=@q.npy": "tensor w has shape [1, 4, 5, 64]: int8_linear takes [33, 70]",
            "run fp8_block_bmm": "fp8_block_bmm: field b is missing: give an integer from 0 to 65535",
            "run fp8_block_bmm b=70000 m=5 n=136 k=144": "b=70000: allowed is an integer from 0 to 65535",
            "run fp8_block_bmm b=2 m=5 n=135 k=144": "n=135: allowed is a multiple of 8",
            "run fp8_block_bmm b=2 m=5 n=136 k=145": "k=145: allowed is a multiple of 16",
            f"run {bmm} z_dtype=e4m3": "z_dtype=e4m3: allowed is one of bf16, f16, f32",
            f"run {bmm} batch_invariant=maybe": "batch_invariant=maybe: allowed is an integer from 0 to 1",
            f"run {bmm} x=@q.npy": "tensor x has shape",
            "bench attention": "field hq is missing",
            "explain attention hq=4 hkv=3 m=1 n=1 d=8 dv=8": "hq=4: allowed is a multiple of hkv, 3",
            "disasm attention hq=4 hkv=2 m=1 n=1 d=9 dv=8": "d=9: allowed is a multiple of 8",
            f"warmup {attention} --target vax": "target 'vax': unknown name",
            f"warmup {attention} -j 0": "--jobs: Value 0 not in range 1 to 1024",
            "warmup --tune": "nothing to warm up: give a manifest",
            "warmup folder": "folder: cannot be read: it is a directory",
            "warmup empty.npy": "empty.npy:1: not JSON",
            model: "--scheme and --tokens go together: --scheme is missing",
            f"{model} --scheme attention": "go together: --tokens is missing",
            "warmup --scheme attention --tokens 1": "go together: --model is missing",
            f"{model} --scheme attention,foo --tokens 1": "--scheme foo: known are w8a8, w8a8-dynamic, fp8-block, attention",
            f"{model} --scheme attention --tokens 0": "--tokens: Value 0 not in range 1 to 2147483647",
            f"{model} --scheme attention --tokens x": "--tokens: Value x not in range",
            f"{model} --scheme attention --tokens 99999999999": "--tokens: Value 99999999999 not in range",
            "warmup --model folder --scheme attention --tokens 1": "folder: cannot be read: it is a directory",
            "warmup --model /dev/zero --scheme attention --tokens 1": "/dev/zero: is larger than 64 MiB",
        }.items():
            with self.subTest(words):
                self.refused(*words.split(), says=says)
        for words, says in {
            f"run {attention} out=@folder": "cannot write folder: it is not a regular file",
            f"run {attention} out=@nosuch/o.npy": "cannot write nosuch/o.npy: No such file",
            f"run {attention} out=@/dev/full": "cannot write /dev/full: it is not a regular file",
            "run int8_linear m=1 n=2147483647 k=1000000": "no memory for 2147483647000000 bytes",
            "run fp8_block_bmm b=65535 m=2147483647 n=8 k=16": "no memory for 2251765452898320 bytes",
            "cache export folder": "folder: cannot write: not a regular file",
            "cache import folder": "folder: not a regular file",
        }.items():
            with self.subTest(words):
                self.refused(*words.split(), says=says, expect=FAILED)
        done = self.kiln("warmup", *attention.split(), "--target", "sm_90a", expect=FAILED)
        self.assertIn("attention has no path for cuda devices", done.stderr)

    def test_a_full_or_read_only_cache_stops_warmup_and_no_run(self):
        probe = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m none "$1" && umount "$1"', "-", str(self.dir)]
        if EMULATED or subprocess.run(probe, capture_output=True).returncode != 0:
            self.skipTest("nothing can be mounted")
        (self.dir / "cache").mkdir(mode=0o700)
        for options, reason in (("size=4k", "No space left on device"), ("size=1m,ro", "Read-only file system")):
            mounted = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o mode=700,{options} none "$1" && shift && exec "$@"', "-", str(self.dir / "cache"), *KILN]
            with self.subTest(options):
                done = subprocess.run([*mounted, "run", *SHAPE, "--check"], env=self.env, cwd=self.dir, capture_output=True, text=True, timeout=60)
                self.assertEqual(OK, done.returncode, done.stderr)
                self.assertRegex(done.stderr, rf"^kiln: \[warn\] [^\n]*{reason}")
                done = subprocess.run([*mounted, "warmup", *SHAPE], env=self.env, cwd=self.dir, capture_output=True, text=True, timeout=60)
                self.assertEqual(FAILED, done.returncode, done.stderr)
                self.assertRegex(done.stderr, rf"could not be stored: [^\n]*{reason}")
                self.assertIn("1 failed", done.stdout + done.stderr)

    def test_too_large_for_memory(self):
        self.refused("run", "int8_mm", "m=1", "n=2147483647", "k=1000000", says=["tensor b", "no memory for 2147483647000000 bytes"], expect=FAILED)

    def test_toggles(self):
        for name, value, message in (
            ("KILN_CACHE", "maybe", "KILN_CACHE=maybe: allowed is rw, ro, off"),
            ("KILN_MISS", "maybe", "KILN_MISS=maybe: allowed is compile, error, fallback"),
            ("KILN_FORCE", "avx9", "KILN_FORCE=avx9: allowed is"),
            ("KILN_FORCE", "int9_mm:avx2", "int8_mm"),
            ("KILN_THREADS", "0", "KILN_THREADS=0: allowed is an integer from 1"),
            ("KILN_LOG", "loud", "KILN_LOG=loud: allowed is"),
            ("KILN_PERF", "fast", "KILN_PERF=fast: allowed is"),
            ("KILN_CACHE_MAX_MB", "x", "KILN_CACHE_MAX_MB=x: allowed is"),
        ):
            with self.subTest(name=name, value=value):
                self.refused("run", *SHAPE, env={name: value}, says=message)
        done = self.kiln("run", *SHAPE, env={"KILN_DISABLE": "avx9"})
        for word in ("avx9", "avx512vnni", "nvidia", "llvm", "disk"):
            self.assertIn(word, done.stderr)


if __name__ == "__main__":
    KILN = [*os.environ.get("TEST_EMULATOR", "").split(), str(pathlib.Path(sys.argv.pop(1)).resolve())]
    MODELS = pathlib.Path(sys.argv.pop(1)).resolve()
    unittest.main()
