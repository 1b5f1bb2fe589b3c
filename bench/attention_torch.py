#!/usr/bin/env python3
"""Kiln's attention against PyTorch's scaled_dot_product_attention on this machine's CPU: one process, the same tensors, interleaved samples.

    bench/attention_torch.py [--threads 1,16] [--rounds N] [--only NAME,…] [--limits build/release/bench/bench_attention] [--json FILE]

Needs torch, and libkiln as the Python package finds it (KILN_LIBRARY, else the system's loader). Each round takes a sample of every contender
in turn; a sample is the mean of some calls after one that is not counted, with a pause before it, so that the other's threads sleep. Told is
the median over the rounds. All pages are warm: inputs are written first, and freed memory stays in the process, so that the outputs
which torch allocates on each call reuse it. Of torch the fastest way counts that a user has: enable_gqa, K and V expanded to all query
heads before the clock starts, or, for one query, the heads of a group as its rows. --limits names bench_attention, whose `--limits` tells
each round what the multiply-add instruction of Kiln's path can do at that moment on one thread.

Exit code: 0 all figures reached and the results agree, 1 not, 2 usage."""
import argparse
import ctypes
import json
import pathlib
import statistics
import subprocess
import sys
import time
from ctypes import byref, c_float, c_int32, c_int64, c_uint64, c_void_p

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "api" / "python"))
from kiln import _library as c  # noqa: E402

OP_ATTENTION = 5
NONE, TOP_LEFT = 0, 1


class AttentionDesc(ctypes.Structure):
    _fields_ = [("base", c.Desc), ("b", c_int64), ("hq", c_int64), ("hkv", c_int64), ("m", c_int64), ("n", c_int64), ("d", c_int64),
                ("dv", c_int64), ("causal", c_int32), ("lse", c_int32), ("batch_invariant", c_int32), ("reserved", c_int32)]


class Strides(ctypes.Structure):
    _fields_ = [("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class AttentionArgs(ctypes.Structure):
    _fields_ = [("base", c.Args), ("b", c_int64), ("hq", c_int64), ("hkv", c_int64), ("m", c_int64), ("n", c_int64),
                ("q", c_void_p), ("q_strides", Strides), ("k", c_void_p), ("k_strides", Strides), ("v", c_void_p), ("v_strides", Strides),
                ("o", c_void_p), ("o_strides", Strides), ("lse", c_void_p), ("kv_len", c_void_p), ("scale", c_float),
                ("reserved", c_int32), ("workspace", c_void_p), ("workspace_bytes", c_uint64)]


class Shape:
    def __init__(self, name, hq, hkv, m, n, causal, reach):
        """reach: by the number of threads, torch's time over Kiln's; that of the greatest number below holds for others."""
        self.name, self.hq, self.hkv, self.m, self.n, self.causal, self.reach = name, hq, hkv, m, n, causal, reach
        self.d = 128

    def operations(self):
        pairs = self.m * (self.m + 1) / 2 + self.m * (self.n - self.m) if self.causal else self.m * self.n
        return 4.0 * self.hq * pairs * self.d

    def kv_bytes(self):
        return 4.0 * self.hkv * self.n * self.d

    def reach_of(self, threads):
        return self.reach[max(t for t in self.reach if t <= threads)]


SHAPES = [
    Shape("prefill 16 heads 512x512", 16, 16, 512, 512, False, {1: 2.0, 2: 1.4}),
    Shape("prefill 32/8 heads 2048x2048 causal", 32, 8, 2048, 2048, True, {1: 2.0, 2: 1.4}),
    Shape("decode 32/8 heads M=1 N=8192", 32, 8, 1, 8192, False, {1: 1.5}),
]


class Kiln:
    def __init__(self, threads):
        self.lib = c.Library()
        self.engine = c_void_p()
        options = c.EngineOptions(cache_mode=b"off", threads=threads)
        self.lib.call("kiln_engine_create", byref(options), byref(self.engine))

    def prepare(self, shape, q, k, v, o):
        desc = c.make_desc(AttentionDesc, OP_ATTENTION, (c.CPU, 0), b=1, hq=shape.hq, hkv=shape.hkv, m=shape.m, n=shape.n, d=shape.d,
                           dv=shape.d, causal=TOP_LEFT if shape.causal else NONE)
        kernel = c_void_p()
        self.lib.call("kiln_get", self.engine, byref(desc), byref(kernel))
        info = c.KernelInfo()
        self.lib.call("kiln_kernel_get_info", kernel, byref(info))

        def strides(t):
            return Strides(*t.stride()[:3])

        args = c.make_args(AttentionArgs, OP_ATTENTION, b=1, hq=shape.hq, hkv=shape.hkv, m=shape.m, n=shape.n, q=q.data_ptr(),
                           q_strides=strides(q), k=k.data_ptr(), k_strides=strides(k), v=v.data_ptr(), v_strides=strides(v),
                           o=o.data_ptr(), o_strides=strides(o))

        def run():
            self.lib.call("kiln_run", kernel, byref(args))

        return run, info.isa.decode()


def keep_freed_memory():
    """glibc: freed memory is neither unmapped nor given back, so that the next allocation finds warm pages."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def torch_ways(torch, shape, q, k, v):
    """Names and functions that compute the shape."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    group = shape.hq // shape.hkv
    if group == 1:
        return {"sdpa": lambda: sdpa(q, k, v, is_causal=shape.causal)}
    wide_k, wide_v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    ways = {"enable_gqa": lambda: sdpa(q, k, v, is_causal=shape.causal, enable_gqa=True),
            "expanded K, V": lambda: sdpa(q, wide_k, wide_v, is_causal=shape.causal)}
    if shape.m == 1:
        rows = q.view(1, shape.hkv, group, shape.d)
        ways["heads as rows"] = lambda: sdpa(rows, k, v).view(1, shape.hq, 1, shape.d)
    return ways


def sample(run, calls):
    time.sleep(0.02)
    run()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def calls_for(run, seconds):
    run()
    begin = time.perf_counter()
    run()
    return max(1, int(seconds / max(time.perf_counter() - begin, 1e-7)))


def read_limits(program):
    lines = subprocess.run([program, "--limits"], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: float(gflops) for name, gflops in (line.split() for line in lines)}


def compare(torch, shape, threads, options):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)

    def normal(heads, rows):
        return torch.randn(1, heads, rows, shape.d, generator=generator).to(torch.bfloat16)

    q, k, v = normal(shape.hq, shape.m), normal(shape.hkv, shape.n), normal(shape.hkv, shape.n)
    o = torch.zeros_like(q)
    kiln_run, isa = Kiln(threads).prepare(shape, q, k, v, o)
    runs = {**torch_ways(torch, shape, q, k, v), "Kiln": kiln_run}

    kiln_run()
    wide_k, wide_v = (t.repeat_interleave(shape.hq // shape.hkv, dim=1).float() for t in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), wide_k, wide_v, is_causal=shape.causal)
    error = float((o.float() - expected).norm() / expected.norm())
    del wide_k, wide_v, expected

    calls = {name: calls_for(run, options.sample_seconds) for name, run in runs.items()}
    seconds, limits = {name: [] for name in runs}, []
    for _ in range(options.rounds):
        if options.limits:
            limits.append(read_limits(options.limits).get(isa, 0.0))
        for name, run in runs.items():
            seconds[name].append(sample(run, calls[name]))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ours = medians.pop("Kiln")
    best = min(medians, key=medians.get)
    ratio, reach = medians[best] / ours, shape.reach_of(threads)
    row = {"shape": shape.name, "threads": threads, "path": isa, "kiln_ms": ours * 1e3, "torch_ms": {n: s * 1e3 for n, s in medians.items()},
           "ratio": ratio, "reach": reach, "relative_error": error, "gflops": shape.operations() / ours / 1e9,
           "kv_gbps": shape.kv_bytes() / ours / 1e9, "limit_gflops": max(limits, default=0.0)}
    text = f"{shape.name}, {threads} thread{'s' if threads > 1 else ''}: Kiln ({isa}) {ours * 1e3:.3f} ms, torch ({best}) "
    text += f"{medians[best] * 1e3:.3f} ms, ratio {ratio:.2f} (>= {reach:g} {'yes' if ratio >= reach else 'NO'})"
    text += f"; {row['gflops']:.0f} GFLOP/s"
    if row["limit_gflops"]:
        text += f", {row['gflops'] / row['limit_gflops'] / threads:.2f} of {row['limit_gflops']:.0f} a thread"
    text += f"; K and V at {row['kv_gbps']:.1f} GB/s; off by {error:.1e}; torch's others: "
    text += (", ".join(f"{n} {s * 1e3:.3f}" for n, s in medians.items() if n != best) or "none")
    print(text, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = len(__import__("os").sched_getaffinity(0))
    parser.add_argument("--threads", default=",".join(str(t) for t in sorted({1, cores})), help="comma list")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sample-seconds", type=float, default=0.03)
    parser.add_argument("--only", default="", help="shapes whose name holds one of these words")
    parser.add_argument("--limits", help="the program bench_attention")
    parser.add_argument("--json")
    options = parser.parse_args()
    import torch

    keep_freed_memory()
    torch.set_grad_enabled(False)
    print(f"torch {torch.__version__}, Kiln {c.Library().version()}, {cores} cores", flush=True)
    words = [w for w in options.only.split(",") if w]
    rows = [compare(torch, shape, threads, options) for threads in map(int, options.threads.split(","))
            for shape in SHAPES if not words or any(w in shape.name for w in words)]
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(r["ratio"] >= r["reach"] and r["relative_error"] < 6e-3 for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
