"""libkiln through ctypes: the structs and functions of kiln.h that the package uses, declared once."""
import ctypes
import os
import pathlib
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

CPU, CUDA = 0, 1
ANY = -1
DTYPES = {"s8": 0, "u8": 1, "s32": 2, "f32": 3, "bf16": 4, "f16": 5, "e4m3": 6, "e5m2": 7}
B_LAYOUTS = {"kn": 0, "nk": 1}
RESCALES = {None: 0, "scale": 1, "q_scale": 2, "shift_right": 3, "shift_left": 4}
PER_TENSOR, PER_CHANNEL = 0, 1
ROUNDINGS = {"zero": 0, "away": 1, "minus_inf": 2, "plus_inf": 3, "even": 4, "odd": 5}
ACTS = {None: 0, "relu": 1, "leaky_relu": 2}
ABSENT, ONE, EACH = 0, 1, 2
OP_INT8_MM, OP_INT8_LINEAR, OP_INT4_MM, OP_FP8_BLOCK_BMM, OP_ATTENTION = 1, 2, 3, 4, 5
CAUSAL = ("none", "top_left", "bottom_right")
SOURCES = ("memory", "disk", "compiled", "builtin", "remote")  # kiln_source


class Error(Exception):
    """A call that failed. `status`: the name of its kiln_status, "invalid_argument" and so on."""

    def __init__(self, status, message):
        super().__init__(f"{status}: {message}")
        self.status = status


class Sized(Structure):
    """A struct of kiln.h: begins with its size."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.size = ctypes.sizeof(self)


class EngineOptions(Sized):
    _fields_ = [("size", c_size_t), ("cache_dir", c_char_p), ("cache_mode", c_char_p), ("threads", c_int32), ("reserved", c_int32),
                ("parallel_for", c_void_p), ("parallel_context", c_void_p), ("log_sink", c_void_p), ("log_context", c_void_p),
                ("max_code_bytes", c_uint64)]


class Desc(Structure):
    _fields_ = [("size", c_size_t), ("op", c_int32), ("device", c_int32), ("device_index", c_int32), ("reserved", c_int32)]


class Int8MmDesc(Structure):
    _fields_ = [("base", Desc), ("m", c_int64), ("n", c_int64), ("k", c_int64), ("b_layout", c_int32), ("a_dtype", c_int32),
                ("c_dtype", c_int32), ("reserved", c_int32), ("rescale", c_int32), ("rescale_per", c_int32), ("b_dtype", c_int32),
                ("a_zp", c_int32), ("b_zp", c_int32), ("bias", c_int32), ("rounding", c_int32), ("act", c_int32), ("c_zp", c_int32),
                ("clamp", c_int32)]


class Int8LinearDesc(Structure):
    _fields_ = [("base", Desc), ("m", c_int64), ("n", c_int64), ("k", c_int64), ("x_dtype", c_int32), ("y_dtype", c_int32),
                ("bias", c_int32), ("w_layout", c_int32)]


class Int4MmDesc(Structure):
    _fields_ = [("base", Desc), ("m", c_int64), ("n", c_int64), ("k", c_int64), ("group", c_int32), ("inner_k_tiles", c_int32),
                ("batch_invariant", c_int32), ("reserved", c_int32)]


class Fp8BlockBmmDesc(Structure):
    _fields_ = [("base", Desc), ("b", c_int64), ("m", c_int64), ("n", c_int64), ("k", c_int64), ("x_dtype", c_int32), ("y_dtype", c_int32),
                ("z_dtype", c_int32), ("batch_invariant", c_int32)]


class Int4MmWeights(Sized):
    _fields_ = [("size", c_size_t), ("w", c_void_p), ("sz", c_void_p), ("device", c_int32), ("reserved", c_int32), ("stream", c_void_p)]


class Args(Structure):
    _fields_ = [("size", c_size_t), ("op", c_int32), ("threads", c_int32)]


class Int8MmArgs(Structure):
    _fields_ = [("base", Args), ("m", c_int64), ("a", c_void_p), ("lda", c_int64), ("b_pack", c_void_p), ("b", c_void_p), ("ldb", c_int64),
                ("b_layout", c_int32), ("reserved", c_int32), ("c", c_void_p), ("ldc", c_int64), ("workspace", c_void_p),
                ("workspace_bytes", c_uint64), ("scale", c_void_p), ("stream", c_void_p), ("a_zp", c_void_p), ("b_zp", c_void_p),
                ("bias", c_void_p), ("mult", c_void_p), ("shift", c_void_p), ("slope_mult", c_int32), ("slope_shift", c_int32),
                ("slope", c_float), ("c_zp", c_int32), ("lo", c_double), ("hi", c_double)]


class Int8LinearArgs(Structure):
    _fields_ = [("base", Args), ("m", c_int64), ("x", c_void_p), ("ldx", c_int64), ("w_pack", c_void_p), ("ws", c_void_p),
                ("bias", c_void_p), ("y", c_void_p), ("ldy", c_int64), ("workspace", c_void_p), ("workspace_bytes", c_uint64)]


class Int4MmArgs(Structure):
    _fields_ = [("base", Args), ("m", c_int64), ("x", c_void_p), ("ldx", c_int64), ("w_pack", c_void_p), ("y", c_void_p), ("ldy", c_int64),
                ("stream", c_void_p), ("workspace", c_void_p), ("workspace_bytes", c_uint64)]


class Fp8BlockBmmArgs(Structure):
    _fields_ = [("base", Args), ("m", c_int64), ("x", c_void_p), ("x_stride_b", c_int64), ("ldx", c_int64), ("y", c_void_p), ("xs", c_void_p),
                ("xs_stride_b", c_int64), ("xs_stride_m", c_int64), ("xs_stride_k", c_int64), ("ys", c_void_p), ("z", c_void_p),
                ("z_stride_b", c_int64), ("ldz", c_int64), ("stream", c_void_p)]


class AttentionDesc(Structure):
    _fields_ = [("base", Desc), *((name, c_int64) for name in ("b", "hq", "hkv", "m", "n", "d", "dv")), ("causal", c_int32), ("lse", c_int32),
                ("batch_invariant", c_int32), ("reserved", c_int32)]


class Strides(Structure):
    _fields_ = [("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class AttentionArgs(Structure):
    _fields_ = [("base", Args), ("b", c_int64), ("hq", c_int64), ("hkv", c_int64), ("m", c_int64), ("n", c_int64), ("q", c_void_p),
                ("q_strides", Strides), ("k", c_void_p), ("k_strides", Strides), ("v", c_void_p), ("v_strides", Strides), ("o", c_void_p),
                ("o_strides", Strides), ("lse", c_void_p), ("kv_len", c_void_p), ("scale", c_float), ("reserved", c_int32),
                ("workspace", c_void_p), ("workspace_bytes", c_uint64)]


class KernelInfo(Sized):
    _fields_ = [("size", c_size_t), ("op", c_char_p), ("desc", c_char_p), ("isa", c_char_p), ("backend", c_char_p),
                ("generator", c_char_p), ("features", c_char_p), ("key", c_char_p), ("pack_layout", c_char_p), ("source", c_int32),
                ("vector_registers", c_uint32), ("general_registers", c_uint32), ("reserved", c_uint32), ("code_bytes", c_uint64),
                ("m_min", c_int64), ("m_max", c_int64), ("compile_us", c_int64), ("load_us", c_int64),
                ("configuration", c_char_p), ("tuned_for", c_char_p)]


class PackInfo(Sized):
    _fields_ = [("size", c_size_t), ("op", c_char_p), ("layout", c_char_p), ("n", c_int64), ("k", c_int64), ("bytes", c_uint64)]


def make_desc(kind, op, device, **fields):
    desc = kind(**fields)
    desc.base = Desc(size=ctypes.sizeof(kind), op=op, device=device[0], device_index=device[1], reserved=0)
    return desc


def make_args(kind, op, **fields):
    args = kind(**fields)
    args.base = Args(size=ctypes.sizeof(kind), op=op, threads=0)
    return args


_SIGNATURES = {
    "kiln_engine_create": [c_void_p, POINTER(c_void_p)],
    "kiln_get": [c_void_p, c_void_p, POINTER(c_void_p)],
    "kiln_get_for_stream": [c_void_p, c_void_p, c_void_p, POINTER(c_void_p)],
    "kiln_kernel_get_info": [c_void_p, POINTER(KernelInfo)],
    "kiln_pack_create": [c_void_p, c_void_p, c_void_p, c_int64, POINTER(c_void_p)],
    "kiln_int4_mm_pack_create": [c_void_p, c_void_p, c_void_p, POINTER(c_void_p)],
    "kiln_pack_save": [c_void_p, c_char_p],
    "kiln_pack_load": [c_void_p, c_void_p, c_char_p, POINTER(c_void_p)],
    "kiln_pack_get_info": [c_void_p, POINTER(PackInfo)],
    "kiln_run": [c_void_p, c_void_p],
    "kiln_workspace_bytes": [c_void_p, c_void_p, POINTER(c_uint64)],
    "kiln_int4_to_tensor_core": [c_void_p, c_int64, c_int64, c_int32, c_void_p],
    "kiln_int4_from_tensor_core": [c_void_p, c_int64, c_int64, c_int32, c_void_p],
}
_RELEASES = ("kiln_engine_destroy", "kiln_kernel_release", "kiln_pack_release")


def _open():
    """KILN_LIBRARY names the file; else it lies beside this package, or where the system's loader looks."""
    named = os.environ.get("KILN_LIBRARY")
    beside = pathlib.Path(__file__).parent / "libkiln.so.0"
    return ctypes.CDLL(named if named else str(beside) if beside.exists() else "libkiln.so.0")


class Library:
    """Every function raises Error instead of returning a status."""

    def __init__(self):
        self._library = _open()
        self._library.kiln_status_name.restype = c_char_p
        self._library.kiln_last_error.restype = c_char_p
        self._library.kiln_version.restype = c_char_p
        for name, parameters in _SIGNATURES.items():
            getattr(self._library, name).argtypes = parameters
        for name in _RELEASES:
            function = getattr(self._library, name)
            function.argtypes, function.restype = [c_void_p], None
            setattr(self, name, function)

    def call(self, name, *arguments):
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise Error(self._library.kiln_status_name(status).decode(), self._library.kiln_last_error().decode())

    def version(self):
        return self._library.kiln_version().decode()
