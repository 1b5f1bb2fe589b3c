"""int8_mm's epilogue on the `reference` path against OPS.md in Python integers (and rounded fractions for `scale`).

The sums are chosen: K = 2, so that a · b reaches small values exactly, and a bias [N] that takes them anywhere in s32, ties and edges
included. Values are compared element by element; nothing is shared with the library.

usage: int8_mm_epilogue_test.py KILN
"""
import fractions
import os
import random
import struct
import subprocess
import sys
import tempfile

SEED = 2031
ROUNDINGS = ["zero", "away", "minus_inf", "plus_inf", "even", "odd"]
RANGES = {"s8": (-128, 127), "u8": (0, 255), "s32": (-2**31, 2**31 - 1)}
FORMATS = {"|i1": "b", "|u1": "B", "<i4": "i", "<f4": "f", "<f2": "H", "<u2": "H"}
DESCRS = {"s8": "|i1", "u8": "|u1", "s32": "<i4", "f32": "<f4", "bf16": "<u2", "f16": "<f2"}


def write_npy(path, descr, shape, values):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    header += " " * (63 - (10 + len(header)) % 64) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
        f.write(struct.pack(f"<{len(values)}{FORMATS[descr]}", *values))


def read_npy(path, kind):
    with open(path, "rb") as f:
        raw = f.read()
    body = raw[10 + struct.unpack("<H", raw[8:10])[0]:]
    size = struct.calcsize(FORMATS[kind])
    return struct.unpack(f"<{len(body) // size}{FORMATS[kind]}", body)


def wrapped(value):
    return (value + 2**31) % 2**32 - 2**31


def rounded_shift(v, s, rounding):
    """OPS.md, stage 3: the exact integer."""
    if s <= 0:
        return v << -s
    h, odd = 1 << (s - 1), (abs(v) >> s) & 1
    nudge = {"zero": -1, "away": 0, "minus_inf": -int(v >= 0), "plus_inf": -int(v <= 0), "even": odd - 1, "odd": -odd}[rounding]
    magnitude = (abs(v) + h + nudge) >> s
    return -magnitude if v < 0 else magnitude


def by_definition(v, s, rounding):
    """The same by fractions: to nearest, and what the rule's name says where there are two. Guards the formula itself."""
    if s <= 0:
        return v << -s
    x = fractions.Fraction(v, 1 << s)
    low = x.numerator // x.denominator
    if x - low != fractions.Fraction(1, 2):
        return low if x - low < fractions.Fraction(1, 2) else low + 1
    high = low + 1
    return {"zero": low if v > 0 else high, "away": high if v > 0 else low, "minus_inf": low, "plus_inf": high,
            "even": low if low % 2 == 0 else high, "odd": low if low % 2 else high}[rounding]


def half_even(x):
    """Of a fraction."""
    low = x.numerator // x.denominator
    rest = x - low
    return low + int(rest > fractions.Fraction(1, 2) or (rest == fractions.Fraction(1, 2) and low % 2 == 1))


def float_bits(x, negative, mantissa, min_exponent, max_exponent):
    """|x| rounded to nearest even with `mantissa` stored bits: (biased exponent, stored bits); an overflow is infinity."""
    sign = int(negative)
    bias = max_exponent
    width = {23: 31, 7: 15, 10: 15}[mantissa]
    x = abs(x)
    if x == 0:
        return sign << width
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if x < fractions.Fraction(2)**exponent:
        exponent -= 1
    exponent = max(exponent, min_exponent)
    units = half_even(x / fractions.Fraction(2)**(exponent - mantissa))
    if units == 0:
        return sign << width
    bits = units if exponent == min_exponent and units < 1 << mantissa else ((exponent + bias - 1) << mantissa) + units
    infinity = (2 * bias + 1) << mantissa
    return sign << width | min(bits, infinity)


def f32_bits(x, negative):
    return float_bits(x, negative, 23, -126, 127)


def f32(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def f32_product(a, b):
    """Of finite floats; the result may be infinite."""
    negative = (struct.pack("<f", a)[3] ^ struct.pack("<f", b)[3]) & 0x80 != 0
    return f32(f32_bits(fractions.Fraction(a) * fractions.Fraction(b), negative))


def is_negative(y):
    return struct.pack("<f", y)[3] & 0x80 != 0


def encode(y, kind):
    """A float that is no NaN as the bits of f32, bf16 or f16."""
    parameters = {"f32": (23, -126, 127), "bf16": (7, -126, 127), "f16": (10, -14, 15)}[kind]
    if y in (float("inf"), float("-inf")):
        infinity = (2 * parameters[2] + 1) << parameters[0]
        return infinity | int(y < 0) << {"f32": 31, "bf16": 15, "f16": 15}[kind]
    return float_bits(fractions.Fraction(y), is_negative(y), *parameters)


def element(case, sum_, a_sum, b_sum, m, n):
    e, v = case["fields"], case["values"]
    pick = lambda name, per, i: v[name][i if per else 0]
    a_zp = pick("a_zp", e["a_zp"] == "row", m) if e["a_zp"] != "none" else 0
    b_zp = pick("b_zp", e["b_zp"] == "channel", n) if e["b_zp"] != "none" else 0
    acc = wrapped(sum_ - a_zp * b_sum - b_zp * a_sum + case["k"] * a_zp * b_zp)
    if e["bias"] != "none":
        acc = wrapped(acc + v["bias"][n])
    per = e["rescale_per"] == "channel"
    kind = e["c_dtype"]
    if e["rescale"] == "scale":
        y = f32_product(f32(f32_bits(fractions.Fraction(acc), acc < 0)), pick("scale", per, n))
        if e["act"] == "relu":
            y = y if y > 0 else 0.0
        elif e["act"] == "leaky_relu" and y < 0:
            slope = v["slope"][0]
            if y == float("-inf"):
                y = float("nan") if slope == 0 else float("-inf") if slope > 0 else float("inf")
            else:
                y = f32_product(y, slope)
        if kind not in RANGES:
            if e["clamp"] != "none":
                lo, hi = v["lo"][0], v["hi"][0]
                y = y if y > lo else lo
                y = y if y < hi else hi
            if y != y:
                return {"f32": 0x7FC00000, "bf16": 0x7FC0, "f16": 0x7E00}[kind]
            return encode(y, kind)
        infinities = {float("inf"): 2**31 - 1, float("-inf"): -2**31}
        value = 0 if y != y else infinities[y] if y in infinities else half_even(fractions.Fraction(y))
        value = max(-2**31, min(2**31 - 1, value))
    else:
        value = acc
        if e["rescale"] == "q_scale":
            value = wrapped(rounded_shift(acc * pick("mult", per, n), 31 + pick("shift", per, n), e["rounding"]))
        elif e["rescale"] != "none":
            s = pick("shift", per, n)
            value = wrapped(rounded_shift(acc, s if e["rescale"] == "shift_right" else -s, e["rounding"]))
        if value < 0 and e["act"] == "relu":
            value = 0
        elif value < 0 and e["act"] == "leaky_relu":
            value = wrapped(rounded_shift(value * v["slope_mult"][0], 31 + v["slope_shift"][0], e["rounding"]))
    value += v["c_zp"][0] if e["c_zp"] != "none" else 0
    lo, hi = (v["lo"][0], v["hi"][0]) if e["clamp"] != "none" else RANGES[kind]
    return max(lo, min(hi, value))


EDGES = [0, 1, -1, 2, -2, 3, -3, 5, -7, 127, -128, 255, 2**15, -2**15, 2**24 + 1, 2**30, -2**30, 2**31 - 1, -2**31, -2**31 + 1, 2**31 - 64]


def random_s32(rng):
    return rng.choice([rng.choice(EDGES), rng.randint(-2**31, 2**31 - 1), rng.randint(-300, 300), wrapped(rng.choice([1, -1, 3]) << rng.randint(0, 31))])


def random_float(rng):
    x = rng.choice([1.0, 0.5, 0.25, 0.0, -0.0, 2.0**-31, 2.0**-149, 2.0**-126, 3e38, -1.5, rng.uniform(-1, 1), rng.uniform(-1, 1) * 2.0**rng.randint(-60, 60)])
    return f32(struct.unpack("<I", struct.pack("<f", x))[0])


def random_q_shift(rng):
    return rng.choice([0, 0, 1, -1, -30, -31, -32, -62, 31, 30, rng.randint(-62, 31), rng.randint(-10, 10)])


def random_case(rng, rescale, rounding):
    m, n, k = rng.choice([(3, 40, 2), (2, 17, 5), (5, 24, 1), (1, 33, 0)])
    fields = {"rescale": rescale, "rounding": rounding, "a_dtype": rng.choice(["s8", "u8"]), "b_dtype": rng.choice(["s8", "u8"]),
              "a_zp": rng.choice(["none", "tensor", "row"]), "b_zp": rng.choice(["none", "tensor", "channel"]),
              "bias": rng.choice(["channel", "channel", "none"]), "rescale_per": rng.choice(["tensor", "channel"]),
              "act": rng.choice(["none", "relu", "leaky_relu"]), "c_zp": rng.choice(["none", "tensor"]), "clamp": rng.choice(["none", "tensor"]),
              "b_layout": rng.choice(["kn", "nk"])}
    fields["c_dtype"] = rng.choice(["s8", "u8", "s32"] + (["f32", "bf16", "f16"] if rescale == "scale" else ["s32"]))
    is_float = fields["c_dtype"] not in RANGES
    if is_float:
        fields["c_zp"] = "none"
    many = n if fields["rescale_per"] == "channel" else 1
    s32s = lambda count: [random_s32(rng) for _ in range(count)]
    values = {}
    if fields["a_zp"] != "none":
        values["a_zp"] = s32s(m if fields["a_zp"] == "row" else 1)
    if fields["b_zp"] != "none":
        values["b_zp"] = s32s(n if fields["b_zp"] == "channel" else 1)
    if fields["bias"] != "none":
        values["bias"] = s32s(n)
    if rescale == "scale":
        values["scale"] = [random_float(rng) for _ in range(many)]
    if rescale == "q_scale":
        values["mult"] = [rng.choice([1, 2, 3, 2**30, 2**31 - 1, rng.randint(1, 2**31 - 1), 1 << rng.randint(0, 30)]) for _ in range(many)]
        values["shift"] = [random_q_shift(rng) for _ in range(many)]
    if rescale == "shift_right":
        values["shift"] = [rng.choice([0, 1, 2, 7, 31, 32, 33, 62, rng.randint(0, 62), rng.randint(0, 20)]) for _ in range(many)]
    if rescale == "shift_left":
        values["shift"] = [rng.randint(0, 31) for _ in range(many)]
    if fields["act"] == "leaky_relu":
        if rescale == "scale":
            values["slope"] = [random_float(rng)]
        else:
            values["slope_mult"] = [rng.choice([1, 2**30, 2**31 - 1, rng.randint(1, 2**31 - 1)])]
            values["slope_shift"] = [random_q_shift(rng)]
    if fields["c_zp"] != "none":
        values["c_zp"] = [rng.choice([0, 3, -7, -128, 255, 2**31 - 1, -2**31, random_s32(rng)])]
    if fields["clamp"] != "none":
        if is_float:
            bounds = sorted(f32(struct.unpack("<I", struct.pack("<f", rng.choice([-1.5, 0.0, 6.0, 100.0, -3000.0, rng.uniform(-9, 9)])))[0]) for _ in range(2))
            if rng.random() < 0.2:
                bounds[1] = float("inf")
        else:
            bounds = sorted(rng.randint(*RANGES[fields["c_dtype"]]) for _ in range(2))
        values["lo"], values["hi"] = [bounds[0]], [bounds[1]]
    bytes_of = lambda dtype, count: [rng.choice([RANGES[dtype][0], RANGES[dtype][1], 0, 1, rng.randint(*RANGES[dtype])]) for _ in range(count)]
    return {"m": m, "n": n, "k": k, "fields": fields, "values": values, "a": bytes_of(fields["a_dtype"], m * k), "b": bytes_of(fields["b_dtype"], n * k)}


def run(kiln, folder, case, environment):
    fields, m, n, k = case["fields"], case["m"], case["n"], case["k"]
    words = [f"{key}={value}" for key, value in fields.items()] + [f"m={m}", f"n={n}", f"k={k}"]
    path = lambda name: os.path.join(folder, name + ".npy")
    write_npy(path("a"), DESCRS[fields["a_dtype"]], (m, k), case["a"])
    write_npy(path("b"), DESCRS[fields["b_dtype"]], (k, n) if fields["b_layout"] == "kn" else (n, k), case["b"])
    floats = {"scale", "slope"} | ({"lo", "hi"} if fields["c_dtype"] not in RANGES else set())
    for name, values in case["values"].items():
        write_npy(path(name), "<f4" if name in floats else "<i4", (len(values),), values)
    words += [f"{name}=@{path(name)}" for name in ["a", "b", *case["values"]]]
    return subprocess.run([*kiln, "run", "int8_mm", *words, f"out=@{path('c')}", "--check"], env=environment, capture_output=True, text=True)


def check(kiln, folder, case, environment):
    fields, m, n, k = case["fields"], case["m"], case["n"], case["k"]
    done = run(kiln, folder, case, environment)
    what = f"seed {SEED}: {case}"
    assert done.returncode == 0, f"{what}: {done.stderr}{done.stdout}"
    a = lambda i, p: case["a"][i * k + p]
    b = lambda p, j: case["b"][p * n + j] if fields["b_layout"] == "kn" else case["b"][j * k + p]
    expected = [element(case, wrapped(sum(a(i, p) * b(p, j) for p in range(k))), sum(a(i, p) for p in range(k)), sum(b(p, j) for p in range(k)), i, j)
                for i in range(m) for j in range(n)]
    kind = DESCRS[fields["c_dtype"]]
    got = list(read_npy(os.path.join(folder, "c.npy"), kind))
    if fields["c_dtype"] == "f32":
        got = [struct.unpack("<I", struct.pack("<f", y))[0] for y in got]
    for index, (is_, should) in enumerate(zip(got, expected)):
        assert is_ == should, f"element {index // n}, {index % n}: {is_} instead of {should}: {what}"
    assert len(got) == len(expected), what


def check_refusals(kiln, folder, environment):
    """Each bad value is named with its value and what is allowed."""
    rng = random.Random(SEED)
    base = {"rescale": "q_scale", "rounding": "even", "a_dtype": "s8", "b_dtype": "s8", "a_zp": "none", "b_zp": "none", "bias": "none",
            "rescale_per": "channel", "act": "none", "c_zp": "none", "clamp": "none", "b_layout": "nk", "c_dtype": "s8"}
    good = {"mult": [1 << 30] * 4, "shift": [0] * 4}
    scaled = {"rescale": "scale"}

    def refused(message, fields=None, values=None):
        case = {"m": 2, "n": 4, "k": 3, "fields": base | (fields or {}), "values": good | (values or {}), "a": [1] * 6, "b": [1] * 12}
        case["values"] = {name: value for name, value in case["values"].items() if value is not None}
        done = run(kiln, folder, case, environment)
        assert done.returncode != 0 and message in done.stderr, f"'{message}' is not in: {done.stderr}"

    refused("mult[2] is 0: allowed is 1 to 2147483647", values={"mult": [1, 1, 0, 1]})
    refused("mult[3] is -5: allowed is 1 to 2147483647", values={"mult": [1, 1, 1, -5]})
    refused("mult is 0: allowed is 1 to 2147483647", {"rescale_per": "tensor"}, {"mult": [0], "shift": [0]})
    refused("shift[1] is 32: allowed is -62 to 31", values={"shift": [0, 32, 0, 0]})
    refused("shift[0] is -63: allowed is -62 to 31", values={"shift": [-63, 0, 0, 0]})
    refused("shift[0] is 63: allowed is 0 to 62", {"rescale": "shift_right"}, {"mult": None, "shift": [63, 0, 0, 0]})
    refused("shift[3] is 32: allowed is 0 to 31", {"rescale": "shift_left"}, {"mult": None, "shift": [0, 0, 0, 32]})
    refused("tensor mult has shape [3]", values={"mult": [1] * 3})
    refused("tensor bias has shape [5]", {"bias": "channel"}, {"bias": [1] * 5})
    refused("tensor a_zp has shape [4]", {"a_zp": "row"}, {"a_zp": [1] * 4})
    refused("rounding=up: allowed is one of zero, away, minus_inf, plus_inf, even, odd", {"rounding": "up"})
    refused("c_dtype=f32 rescale=q_scale: allowed is rescale=scale", {"c_dtype": "f32"})
    refused("c_zp=tensor c_dtype=bf16: allowed is c_zp=none", scaled | {"c_dtype": "bf16", "c_zp": "tensor"})
    refused("lo is 5: allowed is at most hi, 4", {"clamp": "tensor"}, {"lo": [5], "hi": [4]})
    refused("lo is -129: allowed is an integer from -128 to 127", {"clamp": "tensor"}, {"lo": [-129], "hi": [4]})
    refused("hi is 256: allowed is an integer from 0 to 255", {"clamp": "tensor", "c_dtype": "u8"}, {"lo": [0], "hi": [256]})
    refused("hi is 70000: allowed is a float from -65504 to 65504", scaled | {"clamp": "tensor", "c_dtype": "f16"},
            {"mult": None, "shift": None, "scale": [1.0] * 4, "lo": [0.0], "hi": [70000.0]})
    refused("scale[2] is inf: allowed is a finite number", scaled, {"mult": None, "shift": None, "scale": [1.0, 1.0, float("inf"), 1.0]})
    refused("slope is nan: allowed is a finite number", scaled | {"act": "leaky_relu"},
            {"mult": None, "shift": None, "scale": [1.0] * 4, "slope": [float("nan")]})
    refused("slope_mult is 0: allowed is 1 to 2147483647", {"act": "leaky_relu"}, {"slope_mult": [0], "slope_shift": [0]})
    refused("slope_shift is 32: allowed is -62 to 31", {"act": "leaky_relu"}, {"slope_mult": [1], "slope_shift": [32]})
    refused("has none", values={"bias": [rng.randint(0, 1)] * 4})


def main():
    rng = random.Random(SEED)
    for _ in range(20000): # the formula is what the names of the rules say
        v, s = rng.choice([random_s32(rng), random_s32(rng) * rng.randint(1, 2**31 - 1)]), rng.randint(-31, 62)
        for rounding in ROUNDINGS:
            assert rounded_shift(v, s, rounding) == by_definition(v, s, rounding), (v, s, rounding)
    kiln = [*os.environ.get("TEST_EMULATOR", "").split(), sys.argv[1]]
    environment = dict(os.environ, KILN_CACHE="off", KILN_FORCE=os.environ.get("KILN_FORCE", "reference"))
    repeats = int(os.environ.get("KILN_TEST_SAMPLES", "120")) // 30
    cases = 0
    with tempfile.TemporaryDirectory() as folder:
        for rescale in ["none", "scale", "q_scale", "q_scale", "shift_right", "shift_left"]:
            for rounding in ROUNDINGS:
                for _ in range(repeats):
                    check(kiln, folder, random_case(rng, rescale, rounding), environment)
                    cases += 1
        check_refusals(kiln, folder, environment)
    print(f"{cases} passed, 0 failed")


if __name__ == "__main__":
    main()
