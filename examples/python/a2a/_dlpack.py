"""DLPack by ctypes: what an array says of itself, and capsules that say it of a tensor of ours."""

import ctypes
import sys
from ctypes import c_char_p, c_int, c_int64, c_uint32, c_uint64, c_void_p, py_object
from typing import Any

from . import _abi

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
ON_STREAMS = (CUDA, CUDA_MANAGED)
NAME, NAME_VERSIONED = b"dltensor", b"dltensor_versioned"
VERSION = (1, 0)
READ_ONLY, IS_COPIED = 1, 2  # flags

DELETER = ctypes.CFUNCTYPE(None, c_void_p)


class Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [("tensor", _abi.Tensor), ("context", c_void_p), ("deleter", DELETER)]


class ManagedVersioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = [
        ("major", c_uint32), ("minor", c_uint32), ("context", c_void_p), ("deleter", DELETER), ("flags", c_uint64),
        ("tensor", _abi.Tensor),
    ]


# Capsules go by their address here, as c_void_p does not keep what it names.
_new = ctypes.PYFUNCTYPE(py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_is_valid = ctypes.PYFUNCTYPE(c_int, py_object, c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


def read(capsule: Any) -> tuple[_abi.Tensor, bool]:
    """The tensor that a capsule holds, as long as the capsule lives, and whether it is read-only."""
    if _is_valid(capsule, NAME_VERSIONED):
        managed = ManagedVersioned.from_address(_pointer(capsule, NAME_VERSIONED))
        if managed.major != VERSION[0]:
            raise BufferError(f"the array is of DLPack {managed.major}.{managed.minor}, known is {VERSION[0]}.x")
        return managed.tensor, bool(managed.flags & READ_ONLY)
    return Managed.from_address(_pointer(capsule, NAME)).tensor, False


# What is given out: by the address of its managed tensor, that and what keeps its memory. It goes when the consumer deletes it.
_given: dict[int, tuple[Any, Any]] = {}
# Capsules that nobody may have taken yet. They have no destructor: it would be called from C with an exception pending (numpy
# drops the capsule of a type it does not know like that), and a callback of ctypes loses such an exception.
_offered: list[tuple[int, bytes, Any]] = []


def _forget(address: int, given: dict[int, Any] = _given) -> None:
    given.pop(address, None)


# Arrays may outlive this module when the interpreter ends: what they call then must not go.
_delete = DELETER(_forget)
ctypes.pythonapi.Py_IncRef(py_object(_delete))


def give(tensor: _abi.Tensor, keeper: Any, flags: int | None) -> Any:
    """A capsule with a tensor, whose memory, shape and strides `keeper` keeps. flags: None = as before DLPack 1.0."""
    sweep()
    managed: Any
    if flags is None:
        managed, name = Managed(tensor, None, _delete), NAME
    else:
        managed, name = ManagedVersioned(*VERSION, None, _delete, flags, tensor), NAME_VERSIONED
    address = ctypes.addressof(managed)
    _given[address] = managed, keeper
    capsule = _new(address, name, None)
    _offered.append((address, name, capsule))
    return capsule


def sweep() -> None:
    """Takes back what was offered and let go without being taken."""
    for entry in tuple(_offered):
        taken = not _is_valid(entry[2], entry[1])  # a consumer renames it
        if taken or _references(entry) == _ALONE:
            try:
                _offered.remove(entry)
            except ValueError:  # another thread was here
                continue
            if not taken:
                _given.pop(entry[0], None)


def _references(entry: tuple[int, bytes, Any]) -> int:
    return sys.getrefcount(entry[2])


# How many there are to what nobody has but an entry; not the same in every Python.
_ALONE = _references((0, b"", object()))
