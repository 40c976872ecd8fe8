"""Runs the ranks of a collective from one thread: on several GPUs, or several of them on one GPU.

Used by test_all_reduce.py and bench_all_reduce.py. Ranks on one GPU need launches of few blocks:
all blocks of all of its ranks must fit on it at once, since they wait for each other. All memory
must be there and all kernels loaded before a collective is launched, because allocating, freeing
and loading may wait for the kernels that run.
"""

import ctypes
import os
from contextlib import contextmanager

# Before CUDA starts: ranks must not share hardware queues.
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"

import torch

from driver import Kernels, check, cuda

MAX_RANKS = 8
SLOTS = 32768
PEER_ACCESS_ALREADY_ENABLED = 704


class Peers(ctypes.Structure):
    """The parameter of that name in peers.cuh."""

    _fields_ = [
        ("workspaces", ctypes.c_void_p * MAX_RANKS),
        ("error", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_uint64),
        ("slot_bytes", ctypes.c_int64),
        ("rank", ctypes.c_int),
        ("world_size", ctypes.c_int),
    ]


class Outputs(ctypes.Structure):
    """The parameter of that name in all_gather.cu."""

    _fields_ = [("rows", ctypes.c_void_p * MAX_RANKS)]


def enable_peer_access(devices):
    """Lets all devices read and write each other's plain allocations."""
    contexts = {}
    for device in devices:
        with torch.cuda.device(device):
            torch.zeros(1, device="cuda")
            contexts[device] = ctypes.c_void_p()
            check(cuda.cuCtxGetCurrent(ctypes.byref(contexts[device])), "context")
    for device in devices:
        with torch.cuda.device(device):
            for other in devices:
                if other == device:
                    continue
                can = ctypes.c_int()
                check(cuda.cuDeviceCanAccessPeer(ctypes.byref(can), device, other), "peer access")
                if not can.value:
                    raise RuntimeError(f"GPU {device} cannot access GPU {other}")
                result = cuda.cuCtxEnablePeerAccess(contexts[other], 0)
                if result != PEER_ACCESS_ALREADY_ENABLED:
                    check(result, "cuCtxEnablePeerAccess")


class Ranks:
    """One stream, workspace and error word a rank; rank r is on devices[r]."""

    def __init__(self, kernels, devices, slot_bytes, timeout_s=10.0):
        self.kernels = kernels  # Of each device.
        self.devices = devices
        self.world_size = len(devices)
        self.streams = [torch.cuda.Stream(device=device) for device in devices]
        self.workspaces = [
            torch.full((SLOTS + 2 * slot_bytes,), 255, dtype=torch.uint8, device=f"cuda:{device}")
            for device in devices
        ]
        self.errors = torch.zeros(self.world_size, dtype=torch.int32).pin_memory()
        self.peers = [self._peers(rank, slot_bytes, timeout_s) for rank in range(self.world_size)]
        self.synchronize()

    def _peers(self, rank, slot_bytes, timeout_s):
        pointers = [workspace.data_ptr() for workspace in self.workspaces]
        return Peers((ctypes.c_void_p * MAX_RANKS)(*pointers), self.errors[rank:].data_ptr(),
                     int(timeout_s * 1e9), slot_bytes, rank, self.world_size)

    def synchronize(self):
        for device in sorted(set(self.devices)):
            torch.cuda.synchronize(device)

    @contextmanager
    def on(self, rank):
        with torch.cuda.device(self.devices[rank]), torch.cuda.stream(self.streams[rank]):
            yield

    def empty(self, rank, *shape, dtype):
        return torch.empty(shape, dtype=dtype, device=f"cuda:{self.devices[rank]}")

    def launch(self, rank, name, grid, block, *args, shared_bytes=0):
        """Call inside on(rank). `args` end before the kernel's parameter `peers`."""
        self.kernels[self.devices[rank]].launch(name, [grid], block, *args, self.peers[rank],
                                                shared_bytes=shared_bytes)

    def capture(self, run):
        """A graph a rank of what run(rank) launches."""
        self.synchronize()
        graphs = [torch.cuda.CUDAGraph() for _ in range(self.world_size)]
        for rank, graph in enumerate(graphs):
            with self.on(rank):
                graph.capture_begin(capture_error_mode="thread_local")
                run(rank)
                graph.capture_end()
        self.synchronize()
        return graphs

    def replay(self, graphs, order=None):
        for rank in order or range(self.world_size):
            with self.on(rank):
                graphs[rank].replay()

    def assert_no_error(self):
        assert not self.errors.any(), f"a rank gave up: errors {self.errors.tolist()}"


def load_kernels(folder, devices):
    """The kernels of a folder of cubins on each device."""
    kernels = {}
    for device in devices:
        with torch.cuda.device(device):
            kernels[device] = Kernels(folder)
    return kernels
