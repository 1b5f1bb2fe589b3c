"""Kiln for Python: int4, int8 and float8 products, linear layers and attention on arrays of torch, NumPy and CuPy, in host memory
or on NVIDIA GPUs.

    import kiln
    engine = kiln.Engine()
    weights = engine.pack_int4(w, sz, group=128, device="cuda")   # w uint8 [n, k/2] or torch's int32 layout, sz bf16 [k/group, n, 2]
    engine.int4_mm(x, weights, out=y)                             # on torch's current stream; returns before the GPU is done

    weights = engine.pack_int8_linear(w)                          # int8 [n, k]
    engine.int8_linear(x, weights, ws, out=y, bias=bias)          # activations quantised row by row as they come

Arrays are anything with data_ptr() (torch) or an array interface (NumPy, CuPy); bfloat16 is torch's type, or uint16 bits. Nothing is copied.
libkiln.so.0 is found as KILN_LIBRARY says, beside this package, or by the system's loader. kiln.h is the manual of all behind it.
"""
from ctypes import byref, c_float, c_void_p

from . import _library as c
from . import _values as check
from ._arrays import as_array, current_stream, parse_device
from ._epilogue import Epilogue
from ._library import Error

__all__ = ["Engine", "Pack", "Error", "version", "int4_to_tensor_core", "int4_from_tensor_core"]

_loaded = None


def _lib():
    global _loaded
    if _loaded is None:
        _loaded = c.Library()
    return _loaded


def version():
    return _lib().version()


class Pack:
    """Weights rearranged once for a device. Immutable; any thread."""

    def __init__(self, handle, op, fields, device):
        self._handle, self.op, self.fields, self.device = handle, op, fields, device

    def __del__(self):
        if self._handle:
            _lib().kiln_pack_release(self._handle)

    def save(self, path):
        _lib().call("kiln_pack_save", self._handle, check.path("path", path))

    def info(self):
        info = c.PackInfo()
        _lib().call("kiln_pack_get_info", self._handle, byref(info))
        return {"op": info.op.decode(), "layout": info.layout.decode(), "n": info.n, "k": info.k, "bytes": info.bytes}


class Kernel:
    """One kernel, for whoever calls it often: Engine.int4_mm and int8_mm look it up on each call."""

    def __init__(self, handle):
        self._handle = handle

    def __del__(self):
        if self._handle:
            _lib().kiln_kernel_release(self._handle)

    def info(self):
        info = c.KernelInfo()
        _lib().call("kiln_kernel_get_info", self._handle, byref(info))
        text = {name: getattr(info, name).decode() for name in ("op", "desc", "isa", "backend", "generator", "key", "pack_layout",
                                                                 "configuration", "tuned_for")}
        return {**text, "source": c.SOURCES[info.source], "code_bytes": info.code_bytes, "m_min": info.m_min, "m_max": info.m_max,
                "compile_us": info.compile_us, "load_us": info.load_us}


class Engine:
    """An engine of kiln.h. Any thread."""

    def __init__(self, cache_dir=None, cache=None, threads=0):
        if cache is not None and not isinstance(cache, str):
            raise TypeError(f"cache is {cache!r}: allowed is None, 'rw', 'ro' or 'off'")
        options = c.EngineOptions(cache_dir=None if cache_dir is None else check.path("cache_dir", cache_dir),
                                  cache_mode=None if cache is None else check.path("cache", cache),
                                  threads=check.integer("threads", threads, 0, 4096))
        self._handle = c_void_p()
        _lib().call("kiln_engine_create", byref(options), byref(self._handle))

    def __del__(self):
        if getattr(self, "_handle", None):
            _lib().kiln_engine_destroy(self._handle)

    # ---- int4_mm

    def pack_int4(self, w, sz, group, device=None, stream=None):
        """w: uint8 [n, k/2], the even k in the high nibble, or the tensor-core layout int32 [n/8, k/(T·16), 32, T/2]; sz: bf16
        [k/group, n, 2]. On the host, or on the GPU that the pack is for. device: default that of w. Returns when the pack is there."""
        w, sz = as_array(w, "w").expect_dense("w"), as_array(sz, "sz").expect_dense("sz")
        tiles = 0
        if w.dtype == "s32":
            w.expect("w", "s32", (-1, -1, 32, -1))
            tiles = 2 * w.shape[3]
            if tiles not in (2, 4, 8):
                raise ValueError(f"w has shape {w.shape}: allowed is (n/8, k/(T·16), 32, T/2) with T = 2, 4 or 8")
            n, k = 8 * w.shape[0], 16 * tiles * w.shape[1]
        else:
            w.expect("w", "u8", (-1, -1))
            n, k = w.shape[0], 2 * w.shape[1]
        group = check.integer("group", group, check.S32_MIN, check.S32_MAX)
        if group <= 0 or k % group:
            raise ValueError(f"group is {group}: allowed is 32, 64, 128 or 256, and a divisor of k = {k}")
        sz.expect("sz", "bf16", (k // group, n, 2), w.device)
        target = w.device if device is None else parse_device(device)
        desc = self._int4_desc(c.ANY, n, k, group, target, False, tiles)
        weights = c.Int4MmWeights(w=w.pointer, sz=sz.pointer, device=w.device[0], stream=current_stream(w) if stream is None else check.stream(stream))
        handle = c_void_p()
        _lib().call("kiln_int4_mm_pack_create", self._handle, byref(desc), byref(weights), byref(handle))
        return Pack(handle, "int4_mm", {"n": n, "k": k, "group": group}, target)

    def int4_mm(self, x, weights, out, batch_invariant=False, stream=None):
        """out[m, n] = x[m, k] · weights, bf16. On a GPU the product is on `stream` (a CUstream; default torch's current one) when it
        returns. Returns `out`."""
        n, k, group = self._fields_of(weights, "int4_mm", "n", "k", "group")
        xa = as_array(x, "x").expect("x", "bf16", (-1, k), weights.device)
        ya = as_array(out, "out").expect("out", "bf16", (xa.shape[0], n), weights.device).expect_writable("out")
        stream = current_stream(xa) if stream is None else check.stream(stream)
        kernel = self._get(self._int4_desc(xa.shape[0], n, k, group, weights.device, batch_invariant, 0), weights.device, stream)
        args = c.make_args(c.Int4MmArgs, c.OP_INT4_MM, m=xa.shape[0], x=xa.pointer, ldx=xa.row_stride("x"), w_pack=weights._handle,
                           y=ya.pointer, ldy=ya.row_stride("out"), stream=stream)
        _lib().call("kiln_run", kernel._handle, byref(args))
        return out

    def int4_kernel(self, m, weights, batch_invariant=False):
        n, k, group = self._fields_of(weights, "int4_mm", "n", "k", "group")
        return self._get(self._int4_desc(m, n, k, group, weights.device, batch_invariant, 0), weights.device, 0)

    # ---- int8_mm

    def pack_int8(self, b, layout="nk", device="cpu"):
        """b: int8 or uint8, [n, k] (nk) or [k, n] (kn), on the host."""
        b = as_array(b, "b")
        n, k = self._weight_shape("b", b, ("s8", "u8"), layout)
        target = parse_device(device)
        desc = c.make_desc(c.Int8MmDesc, c.OP_INT8_MM, target, m=c.ANY, n=n, k=k, b_layout=c.B_LAYOUTS[layout],
                           c_dtype=c.DTYPES["s32"], rescale_per=c.PER_CHANNEL, b_dtype=c.DTYPES[b.dtype])
        return self._pack(desc, "int8_mm", b, "b", {"n": n, "k": k, "b_dtype": b.dtype}, target)

    def int8_mm(self, a, weights, out, scale=None, stream=None, **stages):
        """out[m, n] = a[m, k] · weights, with the stages of kiln.h's epilogue that are given, in its order; a int8 or uint8.

        a_zp, b_zp: zero points, an integer or int32 [m], [n];   bias: int32 [n]
        mult and shift (q_scale), shift_right, shift_left: integers or int32 [n];   scale: a number or float32 [n]
        rounding: of integer stages, "zero", "away", "minus_inf", "plus_inf", "even" or "odd"
        act: "relu" or "leaky_relu", the second with slope after scale, else slope_mult and slope_shift
        c_zp: an integer;   clamp: (lo, hi)
        out is int8, uint8 or int32; after scale float32, float16 or bfloat16 too. On a GPU a is int8 and scale, an array there, the only
        stage. Stream and return as in int4_mm."""
        n, k, b_dtype = self._fields_of(weights, "int8_mm", "n", "k", "b_dtype")
        aa = as_array(a, "a")
        if aa.dtype not in ("s8", "u8"):
            raise TypeError(f"a is {aa.dtype}: allowed is s8 or u8")
        aa.expect("a", aa.dtype, (-1, k), weights.device)
        ca = as_array(out, "out")
        ca.expect("out", ca.dtype, (aa.shape[0], n), weights.device).expect_writable("out")
        epilogue = Epilogue(aa.shape[0], n, weights.device, scale=scale, **stages)
        stream = current_stream(aa) if stream is None else check.stream(stream)
        desc = c.make_desc(c.Int8MmDesc, c.OP_INT8_MM, weights.device, m=aa.shape[0], n=n, k=k, b_layout=c.B_LAYOUTS["nk"],
                           a_dtype=c.DTYPES[aa.dtype], b_dtype=c.DTYPES[b_dtype], c_dtype=c.DTYPES[ca.dtype], **epilogue.desc)
        kernel = self._get(desc, weights.device, stream)
        args = c.make_args(c.Int8MmArgs, c.OP_INT8_MM, m=aa.shape[0], a=aa.pointer, lda=aa.row_stride("a"), b_pack=weights._handle,
                           b_layout=c.B_LAYOUTS["nk"], c=ca.pointer, ldc=ca.row_stride("out"), stream=stream, **epilogue.args)
        _lib().call("kiln_run", kernel._handle, byref(args))
        return out

    # ---- int8_linear

    def pack_int8_linear(self, w, layout="nk"):
        """w: int8 [n, k] (nk) or [k, n] (kn), on the host."""
        w = as_array(w, "w")
        n, k = self._weight_shape("w", w, ("s8",), layout)
        desc = c.make_desc(c.Int8LinearDesc, c.OP_INT8_LINEAR, (c.CPU, 0), m=c.ANY, n=n, k=k, x_dtype=c.DTYPES["bf16"],
                           y_dtype=c.DTYPES["bf16"], w_layout=c.B_LAYOUTS[layout])
        return self._pack(desc, "int8_linear", w, "w", {"n": n, "k": k}, (c.CPU, 0))

    def int8_linear(self, x, weights, ws, out, bias=None):
        """out[m, n] = dequant(quant(x[m, k]) · weights) + bias, activations quantised row by row (kiln.h says how). x and out: bfloat16,
        float16 or float32, each its own; ws, bias: float32 [n]. CPUs only. Returns `out`."""
        n, k = self._fields_of(weights, "int8_linear", "n", "k")
        xa, ya = as_array(x, "x"), as_array(out, "out")
        for name, array, columns in (("x", xa, k), ("out", ya, n)):
            if array.dtype not in ("bf16", "f16", "f32"):
                raise TypeError(f"{name} is {array.dtype}: allowed is bf16, f16 or f32")
            array.expect(name, array.dtype, (-1 if array is xa else xa.shape[0], columns), weights.device)
        ya.expect_writable("out")
        vectors = {}
        for name, vector in (("ws", ws), ("bias", bias)):
            if vector is not None or name == "ws":
                vectors[name] = as_array(vector, name).expect(name, "f32", (n,), weights.device).expect_dense(name).pointer
        desc = c.make_desc(c.Int8LinearDesc, c.OP_INT8_LINEAR, weights.device, m=xa.shape[0], n=n, k=k, x_dtype=c.DTYPES[xa.dtype],
                           y_dtype=c.DTYPES[ya.dtype], bias=int(bias is not None), w_layout=c.B_LAYOUTS["nk"])
        kernel = self._get(desc, weights.device, 0)
        args = c.make_args(c.Int8LinearArgs, c.OP_INT8_LINEAR, m=xa.shape[0], x=xa.pointer, ldx=xa.row_stride("x"),
                           w_pack=weights._handle, y=ya.pointer, ldy=ya.row_stride("out"), **vectors)
        _lib().call("kiln_run", kernel._handle, byref(args))
        return out

    # ---- attention

    def attention(self, q, k, v, out, causal="none", kv_len=None, scale=None, lse=None, batch_invariant=False):
        """out[b, hq, m, dv] = softmax(scale · q[b, hq, m, d] · k[b, hkv, n, d]ᵀ) · v[b, hkv, n, dv], bf16, on the host, any strides but an innermost one
        of 1. causal: "none", "top_left" or "bottom_right"; kv_len: s32 [b], the keys that each batch has; scale: default 1/√d; lse: f32
        [b, hq, m] for the logarithms of the sums. Returns `out`."""
        host = (c.CPU, 0)
        check.chosen("causal", causal, c.CAUSAL)
        if scale is not None and c_float(check.number("scale", scale)).value == 0:
            raise ValueError(f"scale is {scale}, in f32 0: allowed is a number above 0, or None for 1/√d")
        qa = as_array(q, "q").expect("q", "bf16", (-1, -1, -1, -1), host)
        b, hq, m, d = qa.shape
        ka = as_array(k, "k").expect("k", "bf16", (b, -1, -1, d), host)
        hkv, n = ka.shape[1:3]
        va = as_array(v, "v").expect("v", "bf16", (b, hkv, n, -1), host)
        dv = va.shape[3]
        oa = as_array(out, "out").expect("out", "bf16", (b, hq, m, dv), host).expect_writable("out")
        la = None if lse is None else as_array(lse, "lse").expect("lse", "f32", (b, hq, m), host).expect_dense("lse").expect_writable("lse")
        na = None if kv_len is None else as_array(kv_len, "kv_len").expect("kv_len", "s32", (b,), host).expect_dense("kv_len")
        desc = c.make_desc(c.AttentionDesc, c.OP_ATTENTION, host, b=b, hq=hq, hkv=hkv, m=m, n=n, d=d, dv=dv, causal=c.CAUSAL.index(causal),
                           lse=int(la is not None), batch_invariant=check.flag("batch_invariant", batch_invariant))
        kernel = self._get(desc, host, 0)
        args = c.make_args(c.AttentionArgs, c.OP_ATTENTION, b=b, hq=hq, hkv=hkv, m=m, n=n, q=qa.pointer, q_strides=qa.head_strides("q"),
                           k=ka.pointer, k_strides=ka.head_strides("k"), v=va.pointer, v_strides=va.head_strides("v"), o=oa.pointer,
                           o_strides=oa.head_strides("out"), lse=la.pointer if la else None, kv_len=na.pointer if na else None,
                           scale=0.0 if scale is None else scale)
        _lib().call("kiln_run", kernel._handle, byref(args))
        return out

    # ---- fp8_block_bmm

    def fp8_block_bmm(self, x, y, xs, ys, out, x_dtype=None, y_dtype=None, batch_invariant=False, stream=None):
        """out[b, m, n] = x[b, m, k] · y[b, n, k]ᵀ with the scales xs f32 [b, m, ⌈k/128⌉] of any strides and ys f32 [b, ⌈n/128⌉, ⌈k/128⌉]: see
        kiln.h. x and y: torch's float8 types, or uint8 bits with `x_dtype` and `y_dtype` "e4m3" or "e5m2"; y and ys are contiguous. out: bf16,
        f16 or f32. On a GPU the product is on `stream` when it returns, as in int4_mm. Returns `out`."""
        xa = as_array(x, "x").as_float8("x", x_dtype)
        ya = as_array(y, "y").as_float8("y", y_dtype)
        xa.expect("x", xa.dtype, (-1, -1, -1))
        (b, m, k), blocks = xa.shape, lambda size: (size + 127) // 128
        ya.expect("y", ya.dtype, (b, -1, k), xa.device).expect_dense("y")
        n = ya.shape[1]
        sa = as_array(xs, "xs").expect("xs", "f32", (b, m, blocks(k)), xa.device)
        ta = as_array(ys, "ys").expect("ys", "f32", (b, blocks(n), blocks(k)), xa.device).expect_dense("ys")
        za = as_array(out, "out")
        if za.dtype not in ("bf16", "f16", "f32"):
            raise TypeError(f"out is {za.dtype}: allowed is bf16, f16 or f32")
        za.expect("out", za.dtype, (b, m, n), xa.device).expect_writable("out")
        stream = current_stream(xa) if stream is None else check.stream(stream)
        kernel = self._get(self._fp8_desc(b, m, n, k, xa.dtype, ya.dtype, za.dtype, batch_invariant, xa.device), xa.device, stream)
        (x_stride_b, ldx), (z_stride_b, ldz) = xa.batch_strides("x"), za.batch_strides("out")
        strides = [stride if extent > 1 else 0 for extent, stride in zip(sa.shape, sa.strides)]
        args = c.make_args(c.Fp8BlockBmmArgs, c.OP_FP8_BLOCK_BMM, m=m, x=xa.pointer, x_stride_b=x_stride_b, ldx=ldx, y=ya.pointer,
                           xs=sa.pointer, xs_stride_b=strides[0], xs_stride_m=strides[1], xs_stride_k=strides[2], ys=ta.pointer,
                           z=za.pointer, z_stride_b=z_stride_b, ldz=ldz, stream=stream)
        _lib().call("kiln_run", kernel._handle, byref(args))
        return out

    def fp8_kernel(self, b, m, n, k, x_dtype="e4m3", y_dtype="e4m3", z_dtype="bf16", batch_invariant=False, device="cpu"):
        target = parse_device(device)
        return self._get(self._fp8_desc(b, m, n, k, x_dtype, y_dtype, z_dtype, batch_invariant, target), target, 0)

    # ---- inside

    @staticmethod
    def _fp8_desc(b, m, n, k, x_dtype, y_dtype, z_dtype, batch_invariant, device):
        dtypes = {"x_dtype": check.chosen("x_dtype", x_dtype, ("e4m3", "e5m2")), "y_dtype": check.chosen("y_dtype", y_dtype, ("e4m3", "e5m2")),
                  "z_dtype": check.chosen("z_dtype", z_dtype, ("bf16", "f16", "f32"))}
        sizes = {name: check.integer(name, size, c.ANY if name == "m" else 0, check.S64_MAX) for name, size in (("b", b), ("m", m), ("n", n), ("k", k))}
        return c.make_desc(c.Fp8BlockBmmDesc, c.OP_FP8_BLOCK_BMM, device, **sizes, **{name: c.DTYPES[dtype] for name, dtype in dtypes.items()},
                           batch_invariant=check.flag("batch_invariant", batch_invariant))

    @staticmethod
    def _int4_desc(m, n, k, group, device, batch_invariant, tiles):
        return c.make_desc(c.Int4MmDesc, c.OP_INT4_MM, device, m=check.integer("m", m, c.ANY, check.S64_MAX), n=n, k=k, group=group, inner_k_tiles=tiles,
                           batch_invariant=check.flag("batch_invariant", batch_invariant))

    @staticmethod
    def _fields_of(weights, op, *names):
        if not isinstance(weights, Pack) or weights.op != op:
            given = f"a pack of {weights.op}" if isinstance(weights, Pack) else type(weights).__name__
            raise TypeError(f"weights is {given}: allowed is a pack of {op}")
        return tuple(weights.fields[name] for name in names)

    @staticmethod
    def _weight_shape(name, array, dtypes, layout):
        """n and k."""
        if array.dtype not in dtypes:
            raise TypeError(f"{name} is {array.dtype}: allowed is {' or '.join(dtypes)}")
        array.expect(name, array.dtype, (-1, -1), (c.CPU, 0))
        check.chosen("layout", layout, c.B_LAYOUTS)
        return array.shape if layout == "nk" else array.shape[::-1]

    def _pack(self, desc, op, array, name, fields, device):
        handle = c_void_p()
        _lib().call("kiln_pack_create", self._handle, byref(desc), array.pointer, array.row_stride(name), byref(handle))
        return Pack(handle, op, fields, device)

    def _get(self, desc, device, stream):
        handle = c_void_p()
        if device[0] == c.CUDA:
            _lib().call("kiln_get_for_stream", self._handle, byref(desc), stream, byref(handle))
        else:
            _lib().call("kiln_get", self._handle, byref(desc), byref(handle))
        return Kernel(handle)


def _convert(function, source, name, out, shape_to, dtype_to, n, k, tiles):
    source.expect_dense(name)
    target = as_array(out, "out").expect("out", dtype_to, shape_to, (c.CPU, 0)).expect_dense("out").expect_writable("out")
    _lib().call(function, source.pointer, n, k, tiles, target.pointer)
    return out


def int4_to_tensor_core(plain, inner_k_tiles, out):
    """uint8 [n, k/2] → int32 [n/8, k/(T·16), 32, T/2], both on the host. Returns `out`."""
    source = as_array(plain, "plain").expect("plain", "u8", (-1, -1), (c.CPU, 0))
    n, k = source.shape[0], 2 * source.shape[1]
    inner_k_tiles = check.integer("inner_k_tiles", inner_k_tiles, check.S32_MIN, check.S32_MAX)
    if inner_k_tiles not in (2, 4, 8):
        raise ValueError(f"inner_k_tiles is {inner_k_tiles}: allowed is 2, 4 or 8")
    shape = (n // 8, k // (16 * inner_k_tiles), 32, inner_k_tiles // 2)
    return _convert("kiln_int4_to_tensor_core", source, "plain", out, shape, "s32", n, k, inner_k_tiles)


def int4_from_tensor_core(packed, out):
    """The way back."""
    source = as_array(packed, "packed").expect("packed", "s32", (-1, -1, 32, -1), (c.CPU, 0))
    tiles = 2 * source.shape[3]
    n, k = 8 * source.shape[0], 16 * tiles * source.shape[1]
    return _convert("kiln_int4_from_tensor_core", source, "packed", out, (n, k // 2), "u8", n, k, tiles)
