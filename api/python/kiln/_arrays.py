"""What the package needs to know of an array: torch tensors by their methods, all else by the array interfaces. Imports none of them."""
import re
import sys
from dataclasses import dataclass

from ._library import CPU, CUDA, Strides

# bfloat16 has no NumPy type: there it travels as its bits, uint16. Nor has float8: uint8, and the call says which it is.
_TORCH_TYPES = {"torch.bfloat16": "bf16", "torch.int8": "s8", "torch.uint8": "u8", "torch.int32": "s32", "torch.float32": "f32",
                "torch.uint16": "bf16", "torch.float16": "f16", "torch.float8_e4m3fn": "e4m3", "torch.float8_e5m2": "e5m2"}
_ARRAY_TYPES = {"u2": "bf16", "i1": "s8", "u1": "u8", "i4": "s32", "f4": "f32", "f2": "f16"}


@dataclass
class Array:
    owner: object  # kept alive as long as this
    pointer: int
    shape: tuple
    strides: tuple  # in elements
    dtype: str      # "bf16", "s8", …
    device: tuple   # (CPU, 0) or (CUDA, index)
    writable: bool = True

    def expect(self, name, dtype, shape, device=None):
        """Raises TypeError or ValueError that names the array. −1 in `shape`: any."""
        if self.dtype != dtype:
            raise TypeError(f"{name} is {self.dtype}: allowed is {dtype}")
        if len(self.shape) != len(shape) or any(want not in (-1, have) for have, want in zip(self.shape, shape)):
            wanted = ", ".join("any" if extent == -1 else str(extent) for extent in shape)
            raise ValueError(f"{name} has shape {self.shape}: allowed is ({wanted})")
        if device is not None and self.device != device:
            raise ValueError(f"{name} is on {device_text(self.device)}: allowed is {device_text(device)}")
        return self

    def expect_writable(self, name):
        if not self.writable:
            raise ValueError(f"{name} is read-only: allowed is an array that may be written")
        return self

    def row_stride(self, name):
        """Elements from one row of a matrix to the next."""
        rows, columns = self.shape
        if columns > 1 and self.strides[1] != 1:
            raise ValueError(f"{name} has strides {self.strides}: allowed is an innermost stride of 1")
        if columns == 0:
            return 0
        return self.strides[0] if rows > 1 else (columns + 15) // 16 * 16  # of a single row any will do, and GPUs want a multiple

    def head_strides(self, name):
        """Elements from one batch, head and row of a tensor [batch, head, row, column] to the next."""
        if self.shape[3] > 1 and self.strides[3] != 1:
            raise ValueError(f"{name} has strides {self.strides}: allowed is an innermost stride of 1")
        return Strides(*(stride if extent > 1 else 0 for stride, extent in zip(self.strides, self.shape[:3])))

    def as_float8(self, name, dtype):
        """This array, whose uint8 are bits of `dtype`."""
        if self.dtype == "u8" and dtype in ("e4m3", "e5m2"):
            self.dtype = dtype
        if self.dtype not in ("e4m3", "e5m2") or dtype not in (None, self.dtype):
            raise TypeError(f"{name} is {self.dtype} with {name}_dtype {dtype}: allowed is e4m3 or e5m2, or uint8 with {name}_dtype 'e4m3' or 'e5m2'")
        return self

    def batch_strides(self, name):
        """Elements from one matrix of a batch to the next, and from row to row."""
        batches, rows, columns = self.shape
        if columns > 1 and self.strides[2] != 1:
            raise ValueError(f"{name} has strides {self.strides}: allowed is an innermost stride of 1")
        row = self.strides[1] if rows > 1 else (columns + 15) // 16 * 16
        return self.strides[0] if batches > 1 else 0, row

    def expect_dense(self, name):
        stride = 1
        for extent, have in zip(reversed(self.shape), reversed(self.strides)):
            if extent > 1 and have != stride:
                raise ValueError(f"{name} has strides {self.strides}: allowed is a contiguous array")
            stride *= extent
        return self


def device_text(device):
    return "cpu" if device[0] == CPU else f"cuda:{device[1]}"


def parse_device(text):
    """Of "cpu", "cuda" and "cuda:1"."""
    found = re.fullmatch("cpu|cuda(?::([0-9]{1,3}))?", str(text))
    index = int(found[1] or 0) if found else -1
    if not 0 <= index <= 255:
        raise ValueError(f"device '{text}': allowed is cpu, cuda or cuda:N with N from 0 to 255")
    return (CUDA if str(text).startswith("cuda") else CPU, index)


def as_array(value, name="array"):
    if isinstance(value, Array):
        return value
    if hasattr(value, "data_ptr"):
        dtype = _TORCH_TYPES.get(str(value.dtype))
        if dtype is None:
            raise TypeError(f"{name} is {value.dtype}: allowed are {', '.join(_TORCH_TYPES)}")
        device = (CUDA, value.device.index or 0) if value.device.type == "cuda" else (CPU, 0)
        if value.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} is on {value.device}: allowed is cpu or cuda")
        return Array(value, value.data_ptr(), tuple(value.shape), tuple(value.stride()), dtype, device)
    on_gpu = hasattr(value, "__cuda_array_interface__")
    interface = getattr(value, "__cuda_array_interface__" if on_gpu else "__array_interface__", None)
    if interface is None:
        raise TypeError(f"{name} is {type(value).__name__}: allowed is anything with data_ptr() or an array interface")
    kind = interface["typestr"]
    dtype = _ARRAY_TYPES.get(kind[1:]) if kind[0] in "<|=" else None
    if dtype is None:
        raise TypeError(f"{name} has type '{kind}': allowed are {', '.join(_ARRAY_TYPES)} of little-endian order")
    size = int(kind[2:])
    shape = tuple(interface["shape"])
    if interface.get("strides") is None:
        strides, step = [], 1
        for extent in reversed(shape):
            strides.insert(0, step)
            step *= extent
    else:
        if any(stride % size for stride in interface["strides"]):
            raise ValueError(f"{name} has strides {interface['strides']} in bytes: allowed are whole elements")
        strides = [stride // size for stride in interface["strides"]]
    device = (CUDA, getattr(getattr(value, "device", None), "id", 0)) if on_gpu else (CPU, 0)
    address, read_only = interface.get("data") or (0, False)
    return Array(value, address or 0, shape, tuple(strides), dtype, device, not read_only)


def current_stream(array):
    """torch's current stream for a torch tensor on a GPU; else CUDA's default stream."""
    if array.device[0] == CUDA and hasattr(array.owner, "data_ptr") and "torch" in sys.modules:
        return sys.modules["torch"].cuda.current_stream(array.device[1]).cuda_stream
    return 0
