"""Memory of one GPU that the processes of other GPUs write to: CUDA's inter-process handles, by the driver.

Plain loads and stores over NVLink or PCIe; no multicast. The memory lives as long as its process.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("opaque", ctypes.c_char * 64),)


class _Bytes:
    """Device memory, as torch takes it in."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def can_share(size: int) -> bool:
    """Whether the first `size` GPUs reach each other's memory."""
    pairs = ((a, b) for a in range(size) for b in range(size) if a != b)
    return all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)


def allocate(num_bytes: int, device: torch.device) -> Tensor:
    """uint8 [num_bytes] that `share` can share. Never freed."""
    torch.cuda.synchronize(device)  # makes the device's context the driver's current one
    address = ctypes.c_uint64()
    driver("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
    return torch.as_tensor(_Bytes(address.value, num_bytes), device=device)


def share(memory: Tensor, rank: int, size: int, store: Any) -> list[int]:
    """Addresses, in this process, of every rank's `memory`, in rank order. All ranks call it.

    Args:
        memory: of `allocate`. What this rank has written to it before is there for the others.
        store: a torch.distributed store that the ranks have in common.
    """
    torch.cuda.synchronize(memory.device)
    handle = _Handle()
    driver("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(memory.data_ptr()))
    store.set(f"peer memory {rank}", bytes(handle).hex())
    return [
        memory.data_ptr() if peer == rank else _open(bytes.fromhex(store.get(f"peer memory {peer}").decode()))
        for peer in range(size)
    ]


def _open(handle: bytes) -> int:
    address = ctypes.c_uint64()
    flags = ctypes.c_uint(_ENABLE_PEER_ACCESS)
    driver("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), flags)
    return address.value


def device_attribute(attribute: int) -> int:
    """Of the current context's device, by the driver's number."""
    device, value = ctypes.c_int(), ctypes.c_int()
    driver("cuCtxGetDevice", ctypes.byref(device))
    driver("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
    return value.value


def driver(name: str, *arguments: Any) -> None:
    """Call a function of CUDA's driver, in the current context."""
    code = getattr(_library(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name} failed with CUDA error {code}")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
