"""Tensors in and out: by DLPack with numpy and mlx, by buffers, as Python's own numbers; what is refused, and who keeps what."""

import array
import ctypes
import gc
import pickle
import threading
import weakref

import a2a
import ml_dtypes
import numpy as np
import pytest
from a2a import _dlpack

try:
    import mlx.core as mx
except ImportError:
    mx = None

needs_mlx = pytest.mark.skipif(mx is None, reason="mlx is not installed: not every platform has a wheel")


@pytest.fixture(autouse=True)
def nothing_is_given_any_more():
    """Whatever a test took by DLPack is let go when it ends."""
    yield
    gc.collect()
    _dlpack.sweep()
    assert not _dlpack._offered and not _dlpack._given


def counted(shape, dtype):
    tensor = a2a.empty(shape, dtype)
    view = np.from_dlpack(tensor)
    view[...] = np.arange(view.size).reshape(view.shape)
    return tensor


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 4), (2, 0)])
def test_numpy_and_python_see_the_same(shape, dtype):
    tensor = counted(shape, dtype)
    wanted = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    assert (tensor.shape, tensor.dtype.name, tensor.device) == (shape, dtype, (1, 0))
    assert tensor.address % 64 == 0 and tensor.nbytes == wanted.nbytes
    assert tensor.tolist() == wanted.tolist()
    assert tensor.tobytes() == wanted.tobytes() == tensor.copy().tobytes() == tensor.memoryview().tobytes()
    assert a2a.from_list(wanted.tolist(), dtype).tobytes() == wanted.tobytes()
    if 0 not in shape and dtype != "float16":  # which memoryview has not
        assert tensor.memoryview().tolist() == wanted.tolist()


def test_a_memoryview_writes_into_the_memory():
    tensor = a2a.empty((2, 3), "float32")
    tensor.memoryview()[1, 2] = 7
    assert tensor.tolist() == [[0, 0, 0], [0, 0, 7]]


def test_strides():
    wide = np.arange(24, dtype=np.int32).reshape(4, 6)
    for narrow in (wide[:, :3], wide[1:3], wide.T, wide[:, 2:4].T, wide[::2]):
        tensor = a2a.as_tensor(narrow)
        assert tensor.strides == tuple(step // 4 for step in narrow.strides)
        assert tensor.tolist() == narrow.tolist() and tensor.tobytes() == narrow.tobytes()
        assert (np.from_dlpack(tensor) == narrow).all() and np.shares_memory(np.from_dlpack(tensor), wide)
    with pytest.raises(BufferError, match="compact"):
        a2a.as_tensor(wide.T).memoryview()
    with pytest.raises(BufferError, match="compact"):
        a2a.as_tensor(wide.T).copy_from(wide.T)
    with pytest.raises(ValueError, match="does not fit"):
        a2a.as_tensor(wide).copy_from(wide.T)
    assert a2a.empty((6, 4), "int32").copy_from(wide.T).tolist() == wide.T.tolist()


def test_buffers_of_python():
    numbers = array.array("f", [1, 2, 3])
    tensor = a2a.as_tensor(numbers)
    numbers[1] = 5
    assert tensor.tolist() == [1, 5, 3]
    assert a2a.as_tensor(((ctypes.c_int32 * 2) * 3)()).shape == (3, 2)
    frozen = a2a.as_tensor(b"abc")
    assert frozen.readonly and frozen.tolist() == [97, 98, 99] and not a2a.as_tensor(bytearray(3)).readonly
    assert a2a.as_tensor(memoryview(b"")).shape == (0,)
    for wrong, error in [(3, TypeError), ([1], TypeError), (None, TypeError), (memoryview(bytes(8))[::2], ValueError)]:
        with pytest.raises(error, match="tensor"):
            a2a.as_tensor(wrong)


def test_names_of_types():
    for dtype in ("float32", "f32", "torch.float32", np.float32, np.dtype("float32"), a2a.float32, a2a.Dtype.F32):
        assert a2a.element_type(dtype) == a2a.float32
    with pytest.raises(ValueError, match="complex64.*known are.*bfloat16"):
        a2a.element_type("complex64")
    with pytest.raises(ValueError, match="2 bytes, uint8 has 1"):
        a2a.empty(4, "bfloat16").view("uint8")


def test_floats_that_python_has_not():
    tensor = a2a.empty(4, "bfloat16")
    np.from_dlpack(tensor.view("uint16"))[:] = [0x3F80, 0xC000, 0x0000, 0x7F80]
    assert tensor.tolist() == [1, -2, 0, float("inf")]
    assert tensor.memoryview().tolist() == [0x3F80, 0xC000, 0, 0x7F80]
    codes = a2a.empty(5, a2a.float8_e4m3fn)
    np.from_dlpack(codes.view("uint8"))[:] = [0x38, 0xB9, 0x7E, 0x01, 0x7F]
    assert codes.tolist()[:4] == [1, -1.125, 448, 2.0**-9] and codes.tolist()[4] != codes.tolist()[4]
    with pytest.raises(TypeError, match="float8_e5m2"):
        a2a.empty(1, "float8_e5m2").tolist()
    with pytest.raises(TypeError, match="bfloat16"):
        a2a.from_list([1.0], "bfloat16")
    with pytest.raises(ValueError, match="different lengths"):
        a2a.from_list([[1, 2], [3]], "int32")


def test_what_numpy_has_not_is_refused_by_numpy():
    """With numpy's own exception: the capsule dies with it pending, which a destructor of ours would lose."""
    for _ in range(3):
        with pytest.raises(RuntimeError, match="[Uu]nsupported dtype"):
            np.from_dlpack(a2a.empty(4, "bfloat16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_the_types_of_ml_dtypes(dtype):
    values = np.array([[0.5, 1, 2], [4, 8, 16]], getattr(ml_dtypes, dtype))
    tensor = a2a.as_tensor(values)
    assert (tensor.dtype.name, tensor.address) == (dtype, values.ctypes.data)
    back = tensor.numpy()
    assert back.dtype == values.dtype and np.shares_memory(back, values) and (back == values).all()
    assert np.asarray(tensor, np.float32).tolist() == values.astype(np.float32).tolist()
    with pytest.raises(BufferError):
        a2a.as_tensor(np.zeros(2, "datetime64[s]"))  # neither numpy nor we have a way for it


def test_arrays_of_numpy():
    tensor = counted((2, 3), "int32")
    assert np.shares_memory(np.asarray(tensor), tensor.numpy()) and np.asarray(tensor).tolist() == tensor.tolist()
    assert not np.shares_memory(np.array(tensor), tensor.numpy())
    assert np.asarray(tensor, "float64").dtype == np.float64
    with pytest.raises(ValueError, match="without a copy"):
        np.array(tensor, "float64", copy=False)


@needs_mlx
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32"])
def test_mlx(dtype):
    values = mx.array([[1, 2, 3], [4, 5, 6]]).astype(getattr(mx, dtype))
    mx.eval(values)
    tensor = a2a.as_tensor(values)
    assert (tensor.dtype.name, tensor.tolist()) == (dtype, [[1, 2, 3], [4, 5, 6]])
    back = mx.from_dlpack(tensor.copy())
    assert back.dtype == values.dtype and (back == values).all().item()
    del back, tensor


# ----------------------------------------------------------------------------------------------------- the rules of DLPack


def test_read_only():
    frozen = np.arange(3, dtype=np.float32)
    frozen.flags.writeable = False
    tensor = a2a.as_tensor(frozen)
    assert tensor.readonly and tensor.view("uint32").readonly and tensor.memoryview().readonly
    assert not np.from_dlpack(tensor).flags.writeable
    assert np.from_dlpack(tensor, copy=True).flags.writeable
    with pytest.raises(BufferError, match="max_version"):
        tensor.__dlpack__()
    with pytest.raises(BufferError, match="read-only"):
        tensor.copy_from(frozen)


def test_what_the_protocol_asks():
    tensor = counted((2, 2), "float32")
    with pytest.raises(ValueError, match="stream is 1.*must be None"):
        tensor.__dlpack__(stream=1)
    with pytest.raises(BufferError, match=r"\(2, 0\)"):
        tensor.__dlpack__(dl_device=(2, 0))
    copied = np.from_dlpack(tensor, copy=True)
    copied[...] = 0
    assert tensor.tolist() == [[0, 1], [2, 3]]
    for max_version, name in [(None, "dltensor"), ((0, 8), "dltensor"), ((1, 0), "dltensor_versioned"), ((1, 3), "dltensor_versioned")]:
        assert f'"{name}"' in repr(tensor.__dlpack__(max_version=max_version))


class Old:
    """An array whose framework knows no DLPack 1.0."""

    def __init__(self, array):
        self.array, self.calls = array, 0

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, *, stream=None):
        self.calls += 1
        return self.array.__dlpack__(stream=stream)


def test_producers_before_dlpack_1():
    old = Old(np.arange(4, dtype=np.int32))
    for i in range(3):
        assert a2a.as_tensor(old).tolist() == [0, 1, 2, 3]
    assert old.calls == 3


def test_a_later_dlpack_is_refused():
    class Late:
        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **_):
            capsule = counted(2, "int32").__dlpack__(max_version=(1, 0))
            pointer = ctypes.pythonapi.PyCapsule_GetPointer
            pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            _dlpack.ManagedVersioned.from_address(pointer(capsule, b"dltensor_versioned")).major = 2
            return capsule

    with pytest.raises(BufferError, match="DLPack 2.0"):
        a2a.as_tensor(Late())


# --------------------------------------------------------------------------------------------------------------- lifetimes


class Watched(np.ndarray):
    """An array that can be watched."""


def watched(*values):
    made = np.array(values, np.float32).view(Watched)
    return made, weakref.ref(made)


def test_a_tensor_keeps_its_array_and_no_longer():
    values, alive = watched(1, 2)
    tensor = a2a.as_tensor(values)
    view, taken = tensor.view("int32"), np.from_dlpack(tensor)
    del values, tensor
    gc.collect()
    assert alive() is not None and taken.tolist() == [1, 2]
    del view
    assert alive() is not None
    del taken
    gc.collect()
    assert alive() is None


def test_memory_of_ones_own_lives_as_long_as_it_is_seen():
    seen = [np.from_dlpack(a2a.from_list([i] * 1000, "int32")) for i in range(50)]
    views = [a2a.from_list([i] * 1000, "int32").memoryview() for i in range(50)]
    gc.collect()
    for i in range(50):
        assert (seen[i] == i).all() and set(views[i]) == {i}


def test_a_capsule_that_nobody_takes_is_taken_back():
    values, alive = watched(1)
    capsule = a2a.as_tensor(values).__dlpack__()
    del values
    _dlpack.sweep()
    assert alive() is not None  # whoever has the capsule may still take it
    del capsule
    _dlpack.sweep()
    gc.collect()
    assert alive() is None


def test_threads_take_and_let_go():
    failures = []

    def run(number):
        for i in range(200):
            values = np.from_dlpack(a2a.from_list([number, i], "int32"))
            if values.tolist() != [number, i]:
                failures.append((number, i, values.tolist()))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


def test_errors_travel():
    error = a2a.PeerLostError(17, "rank 1 is gone", (1,))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.status, again.ranks, str(again)) == (type(error), 17, (1,), "A2A_PEER_LOST: rank 1 is gone")
    assert isinstance(a2a.error_of(1, "x"), ValueError) and isinstance(a2a.error_of(4, "x"), MemoryError)
    assert str(a2a.error_of(99, "x")) == "unknown status: x"
