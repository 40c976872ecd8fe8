"""Loads cubins and launches their kernels on torch tensors, through the CUDA driver alone.

Used by the tests and benchmarks beside it and by ranks.py. Needs torch with a GPU; knows nothing of any kernel.
"""

import ctypes
import statistics
from pathlib import Path

import torch

cuda = ctypes.CDLL("libcuda.so.1")
_MAX_DYNAMIC_SHARED = 8
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


def check(result, what):
    if result != 0:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what}: {text.value.decode() if text.value else result}")


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


def int64(value):
    """Marks a kernel's 64-bit integer parameter."""
    return ctypes.c_int64(value)


class TensorMap(ctypes.Structure):
    """A CUtensorMap, which kernels take by value."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


def tensor_map(tensor, sizes, strides, box):
    """Describes a tensor of 16-bit elements for copies with the 128-byte swizzle: sizes and box
    innermost first, strides of all dimensions but the innermost, in elements; zeros outside."""
    assert tensor.element_size() == 2
    uint16, no_interleave, swizzle_128b, promote_256b, fill_zero = 1, 0, 3, 3, 0
    rank = len(sizes)
    room = ctypes.create_string_buffer(256)
    start = -(-ctypes.addressof(room) // 128) * 128
    check(cuda.cuTensorMapEncodeTiled(
        ctypes.c_void_p(start), uint16, ctypes.c_uint(rank), ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*[2 * stride for stride in strides]),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank), no_interleave,
        swizzle_128b, promote_256b, fill_zero), f"cuTensorMapEncodeTiled {sizes} {box}")
    return TensorMap.from_buffer_copy(ctypes.string_at(start, 128))


def matrix_map(matrix, rows):
    """Describes a row-major matrix in boxes of 64 columns of `rows` rows."""
    assert matrix.is_contiguous()
    height, width = matrix.shape
    return tensor_map(matrix, (width, height), (width,), (64, rows))


def _argument(value):
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_int32(value)
    return value


class Kernels:
    """All kernels of a folder of cubins, by entry point. Launches go to torch's stream."""

    def __init__(self, folder):
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.functions = {}
        for path in sorted(Path(folder).glob("*.cubin")):
            self._load(path)
        # Launches carry the attribute that lets a kernel start before its predecessor ends.
        self.overlap = False

    def _load(self, path):
        module, count, name = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_char_p()
        check(cuda.cuModuleLoadData(ctypes.byref(module), path.read_bytes()), path.name)
        check(cuda.cuModuleGetFunctionCount(ctypes.byref(count), module), path.name)
        functions = (ctypes.c_void_p * count.value)()
        check(cuda.cuModuleEnumerateFunctions(functions, count, module), path.name)
        for function in functions:
            function = ctypes.c_void_p(function)
            check(cuda.cuFuncGetName(ctypes.byref(name), function), path.name)
            # Otherwise the first launch does, which waits for kernels that may wait for it.
            check(cuda.cuFuncLoad(function), "cuFuncLoad")
            self.functions[name.value.decode()] = [function, 0]

    def _function(self, name, shared_bytes):
        entry = self.functions[name]
        if shared_bytes > max(entry[1], 48 * 1024 - 1):
            attribute = _MAX_DYNAMIC_SHARED
            check(cuda.cuFuncSetAttribute(entry[0], attribute, shared_bytes), f"{name}: shared")
            entry[1] = shared_bytes
        return entry[0]

    def launch(self, name, grid, block, *args, shared_bytes=0):
        function = self._function(name, shared_bytes)
        grid = tuple(grid) + (1,) * (3 - len(grid))
        values = [_argument(value) for value in args]
        pointers = (ctypes.c_void_p * len(values))(
            *[ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values]
        )
        attribute = _LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        config = _LaunchConfig(
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(block, 1, 1),
            shared_bytes,
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ctypes.pointer(attribute),
            1 if self.overlap else 0,
        )
        check(cuda.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), name)


def relative_error(got, want):
    """‖got − want‖ / ‖want‖; NaN never compares below a bound."""
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def median_us(calls, repeats=7):
    """Median time of one of `calls`, which are captured in one graph and replayed, in µs."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)
