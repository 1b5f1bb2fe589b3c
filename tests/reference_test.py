"""The reference op against Python integers: `kiln run` on the `reference` path, and --check's own reference through it.

usage: reference_test.py KILN
"""
import json
import os
import random
import struct
import subprocess
import sys
import tempfile


def write_npy(path, descr, shape, data):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    header += " " * (63 - (10 + len(header)) % 64) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data)


def read_s32(path):
    with open(path, "rb") as f:
        raw = f.read()
    length = struct.unpack("<H", raw[8:10])[0]
    body = raw[10 + length:]
    return struct.unpack(f"<{len(body) // 4}i", body)


def wrapped(value):
    return (value + 2**31) % 2**32 - 2**31


def values(kind, count, rng):
    if kind == "random":
        return [rng.randint(-128, 127) for _ in range(count)]
    return [{"lowest": -128, "highest": 127}.get(kind, (-128, 127)[i % 2]) for i in range(count)]


def main():
    kiln = [*os.environ.get("TEST_EMULATOR", "").split(), sys.argv[1]]
    seed = 20
    rng = random.Random(seed)
    environment = dict(os.environ, KILN_CACHE="off", KILN_FORCE="reference")
    with tempfile.TemporaryDirectory() as folder:
        a_file, b_file, c_file = (os.path.join(folder, name + ".npy") for name in "abc")
        cases = 0
        for m, n, k in [(1, 1, 1), (3, 5, 7), (2, 17, 33), (16, 1, 64), (5, 16, 0), (4, 3, 131), (9, 33, 20)]:
            for kind in ["random", "lowest", "highest", "alternating"]:
                layout = rng.choice(["kn", "nk"])
                a, b = values(kind, m * k, rng), values(kind, n * k, rng)
                write_npy(a_file, "|i1", (m, k), struct.pack(f"{m * k}b", *a))
                write_npy(b_file, "|i1", (k, n) if layout == "kn" else (n, k), struct.pack(f"{n * k}b", *b))
                done = subprocess.run(
                    [*kiln, "run", "int8_mm", f"b_layout={layout}", f"a=@{a_file}", f"b=@{b_file}", f"out=@{c_file}", "--check", "--json",
                     f"m={m}", f"n={n}", f"k={k}"],
                    env=environment, capture_output=True, text=True)
                what = f"m={m} n={n} k={k} {layout} {kind} seed {seed}"
                assert done.returncode == 0, f"{what}: {done.stderr}"
                assert json.loads(done.stdout)["isa"] == "reference", what
                at = (lambda i, j: b[i * n + j]) if layout == "kn" else (lambda i, j: b[j * k + i])
                expected = tuple(wrapped(sum(a[i * k + p] * at(p, j) for p in range(k))) for i in range(m) for j in range(n))
                assert read_s32(c_file) == expected, what
                cases += 1
    print(f"{cases} passed, 0 failed")


if __name__ == "__main__":
    main()
