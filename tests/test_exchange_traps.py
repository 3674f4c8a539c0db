"""What the frameworks' own importers get wrong, and that the driver catches it.

Most tests come in two halves. The first shows that the framework by itself does the wrong thing, so
that the second proves something, and so that a release which changes it is noticed.
"""

from __future__ import annotations

import sys
import types
import warnings

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import dlpack
from rlx_driver.backends import _numpy_pointer
from rlx_driver.registry import registry
from support import (
    COPIES,
    Exporter,
    address,
    aligned,
    each_way,
    frameworks,
    make,
    must_run,
    offset,
    pairs,
    python,
    read_bytes,
    refusal,
    write_bytes,
    x64,
)

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

WIDE = {"int64": 2**40 + 3, "uint64": 2**40 + 3, "float64": 1 + 2**-40, "complex128": 1 + 2**-40}


@pytest.fixture(autouse=True)
def no_lanes():
    """Lanes made while something was replaced must not outlive it."""
    yield
    registry.lanes.clear()


# --- narrowing: JAX without x64 ------------------------------------------------------------------


@pytest.mark.parametrize("source", frameworks("numpy", "torch"))
@pytest.mark.parametrize(("dtype", "value"), WIDE.items())
class TestNarrowing:
    @pytest.fixture
    def x(self, source, dtype, value):
        x = aligned(8, dtype)
        x[...] = value
        return x if source == "numpy" else torch.from_numpy(x)

    @pytest.mark.parametrize("copy", COPIES)
    def test_is_what_jax_does_without_a_word(self, x, copy):
        theirs = jnp.from_dlpack(x, copy=copy)
        assert theirs.dtype.itemsize == np.dtype(rlx.dtype(x.dtype)).itemsize // 2
        assert read_bytes(theirs) != read_bytes(x)
        assert not np.array_equal(np.asarray(theirs), np.asarray(x))

    @pytest.mark.parametrize("copy", COPIES)
    def test_is_refused(self, x, dtype, copy):
        before = read_bytes(x)
        for array in (x, x[1:], x[::2], Exporter(x)):
            text = refusal(array, "jax", copy)
            assert dtype in text
            assert "32 bits" in text
            assert "jax_enable_x64" in text
        assert read_bytes(x) == before

    def test_is_no_matter_with_x64(self, x, dtype, value):
        with x64():
            for y in each_way(x, "jax", False):
                assert address(y) == address(x)
                assert y.dtype == dtype
                assert y[0] == value
            for y in each_way(x, "jax", True):
                assert address(y) != address(x)
                assert y[0] == value
        refusal(x, "jax", None)

    def test_arrays_made_with_x64_leave_without_it(self, x, value):
        with x64():
            y = rlx.exchange(x, "jax", copy=False)
        for target in ("numpy", "torch"):
            for z in each_way(y, target, False):
                assert address(z) == address(x)
                assert z[0] == value


# --- alignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", frameworks("numpy", "torch"))
@pytest.mark.parametrize("start", [4, 8, 16, 32, 48, 60])
def test_jax_copies_what_is_not_aligned_to_64(source, start):
    x = offset(32, "float32", start)
    x[:] = np.arange(32)
    x = x if source == "numpy" else torch.from_numpy(x)
    assert address(jnp.from_dlpack(x)) != address(x)
    text = refusal(x, "jax", False)
    assert hex(address(x)) in text
    assert "64" in text
    assert "aligned" in text
    rlx.ledger.reset()
    for y in each_way(x, "jax", None):
        assert address(y) != address(x)
        assert read_bytes(y) == read_bytes(x)
    assert rlx.ledger.reasons["alignment (to jax)"].copies == 3
    assert rlx.ledger.reasons["alignment (to jax)"].bytes == 3 * 128


@pytest.mark.parametrize("start", [64, 128, 192])
def test_jax_shares_what_is_aligned_to_64(start):
    x = offset(32, "float32", start)
    for y in each_way(x, "jax", False):
        assert address(y) == address(x)


def test_a_copy_made_for_jax_is_aligned_and_shared_from_there_on():
    y = rlx.exchange(offset(32, "float32", 4), "jax")
    back = rlx.exchange(y, "numpy", copy=False)
    assert address(back) % 64 == 0
    assert address(rlx.exchange(back, "jax", copy=False)) == address(y)


def test_misaligned_copies_are_done_when_the_call_returns():
    def source():
        x = offset(1 << 24, "float32", 4)
        x[:] = 1
        return x

    def spoiled(give):
        x = source()
        y = give(x)
        x[:] = 0
        return not bool((np.asarray(y) == 1).all())

    if jax.__version_info__ < (0, 11):
        assert any(spoiled(jnp.from_dlpack) for _ in range(6)), "JAX copies at once by now"
    for copy in (None, True):
        for _ in range(3):
            assert not spoiled(lambda x, copy=copy: rlx.exchange(x, "jax", copy=copy))


# --- strides -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[::2], id="rows"),
        pytest.param(lambda x: x[:, ::2], id="columns"),
        pytest.param(lambda x: x[:, 1:], id="tail"),
    ],
)
@pytest.mark.parametrize("source", frameworks("numpy", "torch"))
def test_jax_refuses_gaps(view, source):
    x = view(make(source))
    with pytest.raises(Exception, match=r"(?i)strid|compact|align"):
        jnp.from_dlpack(x, copy=False)
    refusal(x, "jax", False)
    for y in each_way(x, "jax", None):
        assert read_bytes(y) == read_bytes(x)


def test_jax_refuses_what_repeats():
    x = make("torch", shape=(1, 6)).expand(4, 6)
    with pytest.raises(RuntimeError, match="strid"):
        jnp.from_dlpack(x)
    assert "repeat" in refusal(x, "jax", False)
    for y in each_way(x, "jax", None):
        assert read_bytes(y) == read_bytes(x)


@pytest.mark.parametrize("axes", [(2, 1, 0), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("source", frameworks("numpy", "torch"))
def test_transposed_arrays_are_shared_with_jax_and_come_back_the_same(axes, source):
    x = make(source, shape=(2, 3, 4))
    x = x.transpose(axes) if source == "numpy" else x.permute(axes)
    for y in each_way(x, "jax", False):
        assert address(y) == address(x)
        assert tuple(y.shape) == tuple(x.shape)
        assert read_bytes(y) == read_bytes(x)
        for target in ("numpy", "torch"):
            for z in each_way(y, target, False):
                assert address(z) == address(x)
                assert tuple(z.shape) == tuple(x.shape)
                assert read_bytes(z) == read_bytes(x)


NEGATIVE = """
import numpy as np
x = np.arange(6.0)[::-1]
"""


def test_negative_strides_abort_the_process_in_torch_and_not_here():
    theirs = python(NEGATIVE + "import torch; torch.from_dlpack(x); print('survived')")
    assert theirs.returncode != 0
    assert "survived" not in theirs.stdout
    must_run(
        NEGATIVE
        + """
import rlx_driver as rlx
from support import Exporter
for x in (x, Exporter(x)):
    for copy in (False, None, None, True):
        try:
            t = rlx.exchange(x, "torch", copy=copy)
        except rlx.ZeroCopyError as error:
            assert copy is False and "negative" in str(error)
        else:
            assert copy is not False and t.tolist() == [5, 4, 3, 2, 1, 0]
"""
    )


@pytest.mark.parametrize("target", frameworks("torch", "jax"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_negative_strides_are_materialised(target, dtype):
    x = make("numpy", dtype)[::-1, ::-1]
    assert str(x.strides) in refusal(x, target, False)
    for copy in (None, True):
        for y in each_way(x, target, copy):
            assert read_bytes(y) == read_bytes(x)
            assert not np.shares_memory(rlx.exchange(y, "numpy"), x)


# --- copies that are none ------------------------------------------------------------------------


def test_a_copy_by_jax_aliases_and_a_copy_by_the_driver_does_not():
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0, keep_unused=True)

    x = aligned(64)
    theirs = jnp.from_dlpack(x, copy=True)
    assert address(theirs) == address(x)
    add_one(theirs).block_until_ready()
    assert x[0] == 1, "donating JAX's copy wrote to the source"

    x = aligned(64)
    for ours in each_way(x, "jax", True):
        assert address(ours) != address(x)
        add_one(ours).block_until_ready()
        assert x[0] == 0
        x[:] = 0


def test_donating_a_shared_array_leaves_the_source_as_it_is():
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0, keep_unused=True)
    for x in (aligned(64), torch.zeros(64)):
        for copy in (False, None):
            for y in each_way(x, "jax", copy):
                assert float(add_one(y)[0]) == 1
                assert float(x[0]) == 0


def test_jnp_asarray_copies_what_exchange_shares():
    x = aligned(64)
    assert address(jnp.asarray(x)) != address(x)
    assert address(rlx.exchange(x, "jax")) == address(x)


class NewMemoryEveryTime:
    """An exporter from before `copy=`, which exports a fresh copy at every call."""

    def __init__(self):
        self.array = make("numpy")
        self.copies = []  # kept, so that no address comes back

    def __dlpack__(self, stream=None):
        self.copies.append(self.array.copy())
        return self.copies[-1].__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)


def test_torch_forgets_that_a_copy_was_forbidden_and_the_driver_compares():
    x = NewMemoryEveryTime()
    assert torch.from_dlpack(x, copy=False).data_ptr() != address(x.array)
    with pytest.raises(rlx.ZeroCopyError, match="address"):
        rlx.exchange(x, "torch", copy=False)


# --- read-only -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_read_only_arrays_never_become_writable_tensors(dtype):
    x = make("numpy", dtype)
    x.flags.writeable = False
    before = x.tobytes()
    if dtype == "float32":
        theirs = torch.from_dlpack(x)
        theirs[0, 0] = 5
        assert x.tobytes() != before, "torch wrote to a read-only array"
        before = x.tobytes()
    assert "read-only" in refusal(x, "torch", False)
    for copy in (None, True):
        for t in each_way(x, "torch", copy):
            assert read_bytes(t) == before
            t.view(torch.uint8).fill_(0)
            assert x.tobytes() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_read_only_arrays_are_shared_with_jax_which_refuses_them_itself(dtype):
    x = make("numpy", dtype)
    x.flags.writeable = False
    with pytest.raises(BufferError):
        jnp.from_dlpack(x)
    for y in each_way(x, "jax", False):
        assert address(y) == address(x)
        assert read_bytes(y) == read_bytes(x)


# --- what torch's tensors carry beside their memory ----------------------------------------------


@pytest.mark.parametrize("target", ["numpy", "jax", "module"])
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_requires_grad_is_refused_with_a_remedy(target, copy, grad_mode):
    target = _library() if target == "module" else target
    leaf = torch.ones(16, requires_grad=True)
    with torch.set_grad_enabled(grad_mode):
        for x in (leaf, leaf[2:], torch.nn.Parameter(torch.ones(3))):
            assert "detach" in refusal(x, target, copy)
    assert leaf.grad is None


def test_torch_itself_gives_away_a_gradient_under_no_grad():
    x = torch.ones(16, requires_grad=True)
    with torch.no_grad():
        alias = x.numpy()
    alias[:] = 7
    assert x.tolist() == [7] * 16


def test_detached_tensors_and_buffers_of_modules_are_shared():
    x = torch.ones(16, requires_grad=True).detach()
    frozen = torch.nn.Parameter(torch.ones(16), requires_grad=False)
    for array in (x, frozen):
        for target in ("numpy", "jax"):
            for y in each_way(array, target, False):
                assert address(y) == address(array)


def _library():
    module = types.ModuleType("somelib")
    module.from_dlpack = np.from_dlpack
    return module


@pytest.mark.parametrize("target", ["numpy", "jax", "module"])
@pytest.mark.parametrize("bit", ["conj", "neg"])
def test_lazy_bits_are_never_lost(target, bit):
    base = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    x = base.conj() if bit == "conj" else base.conj().imag
    right = [1 - 2j, 3 + 4j] if bit == "conj" else [-2, 4]
    if bit == "conj":
        with pytest.raises(BufferError):
            np.from_dlpack(x)
    else:
        assert np.from_dlpack(x).tolist() == [2, -4], "torch exports the wrong sign"
        assert jnp.from_dlpack(x[:1]).tolist() == [2]
    target = _library() if target == "module" else target
    text = refusal(x, target, False)
    assert f"resolve_{bit}" in text
    for copy in (None, True):
        for y in each_way(x, target, copy):
            assert y.tolist() == right
    assert base.tolist() == [1 + 2j, 3 - 4j]
    reason = next(r for r in rlx.ledger.reasons if "asked" not in r)
    assert reason.startswith(f"{bit} (to ")


def test_lazy_bits_do_not_hide_in_foreign_exporters():
    x = torch.tensor([1 + 2j, 3 - 4j]).conj().imag

    class Wrapper(Exporter):
        def is_neg(self):
            return self.array.is_neg()

    with pytest.raises(rlx.ZeroCopyError, match="neg"):
        rlx.exchange(Wrapper(x), "numpy")


@pytest.mark.parametrize("name", ["int4", "uint4"])
@pytest.mark.parametrize("target", ["numpy", "jax", "module"])
@pytest.mark.parametrize("copy", COPIES)
def test_four_bit_tensors_are_no_bytes(name, target, copy):
    x = torch.empty(4, dtype=getattr(torch, name))
    assert np.from_dlpack(x).dtype == name.replace("4", "8"), "torch exports them as bytes"
    target = _library() if target == "module" else target
    assert name in refusal(x, target, copy)


def test_four_bit_arrays_of_jax_are_refused():
    for name in ("int4", "uint4"):
        x = jnp.zeros(4, name)
        for target in ("numpy", "torch"):
            for copy in COPIES:
                assert name in refusal(x, target, copy)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("target", frameworks("numpy", "jax"))
def test_tensors_without_memory_are_refused(target, copy):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that compressed rows are in beta state
        compressed = torch.eye(4).to_sparse_csr()
    for x, says in (
        (fake, "FakeTensor"),
        (torch.ones(16, device="meta"), "meta"),
        (torch.eye(4).to_sparse(), "to_dense"),
        (compressed, "to_dense"),
        (torch.ones(4, 4).to_mkldnn(), "to_dense"),
    ):
        assert says in refusal(x, target, copy)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("target", frameworks("numpy", "jax"))
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_values_inside_a_transform_of_torch_are_refused(target, copy, transform):
    seen = []

    def look(x):
        seen.append(refusal(x, target, copy))
        return x.sum()

    if transform == "vmap":
        torch.func.vmap(look)(torch.ones(3, 4))
    elif transform == "grad":
        torch.func.grad(look)(torch.ones(4))
    else:
        torch.func.jvp(look, (torch.ones(4),), (torch.ones(4),))
    assert seen


@pytest.mark.parametrize("source", frameworks("numpy", "jax"))
@pytest.mark.parametrize("copy", COPIES)
def test_tensors_made_under_inference_mode_are_normal_ones(source, copy):
    with torch.inference_mode():
        assert torch.from_numpy(np.zeros(3)).is_inference()
        for t in each_way(make(source), "torch", copy):
            assert not t.is_inference()


@pytest.mark.parametrize("target", frameworks("numpy", "jax"))
def test_tensors_of_inference_mode_are_shared(target):
    with torch.inference_mode():
        x = torch.ones(16)
    for y in each_way(x, target, False):
        assert address(y) == address(x)


class Named(torch.Tensor):
    """A subclass that adds no more than a method."""

    def whoami(self):
        return "named"


@pytest.mark.parametrize("target", frameworks("numpy", "jax"))
def test_subclasses_that_only_add_methods_are_shared(target):
    x = torch.ones(16).as_subclass(Named)
    for y in each_way(x, target, False):
        assert address(y) == address(x)


# --- NumPy's arrays ------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("target", frameworks("torch", "jax"))
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.ones(16, ">f4"), "byte order"),
        (np.ones(16, ">i8"), "byte order"),
        (np.zeros(4, [("a", "f4"), ("b", "i4")]), "structured"),
        (np.array([1, None], object), "object"),
        (np.array(["a", "b"]), "text"),
        (np.zeros(4, "M8[s]"), "dates"),
    ],
    ids=lambda x: str(x.dtype) if isinstance(x, np.ndarray) else "",
)
def test_dtypes_of_numpy_alone_are_refused(x, says, target, copy):
    assert says in refusal(x, target, copy)


@pytest.mark.parametrize("target", frameworks("torch", "jax"))
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_mapped_files_are_shared_and_never_written_when_read_only(tmp_path, target, mode):
    path = tmp_path / "array.bin"
    make("numpy").tofile(path)
    before = path.read_bytes()
    x = np.memmap(path, np.float32, mode)
    shares = mode != "r" or target == "jax"
    for y in each_way(x, target, None):
        assert read_bytes(y) == before
        assert (address(y) == address(x)) is shares
        if target == "torch":
            y.fill_(1)
            assert (path.read_bytes() == before) is (mode != "r+")
            y.copy_(torch.frombuffer(bytearray(before), dtype=torch.float32))


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("target", ["torch", "jax", "module"])
def test_masks_are_not_lost(target, copy):
    x = np.ma.masked_array(aligned(4), [0, 1, 0, 1])
    assert torch.from_dlpack(x).tolist() == [0, 0, 0, 0], "torch drops the mask"
    target = _library() if target == "module" else target
    assert "mask" in refusal(x, target, copy)


# --- JAX's arrays --------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("target", frameworks("numpy", "torch"))
class TestJaxArraysWithoutMemory:
    def test_deleted(self, target, copy):
        x = make("jax")
        x.delete()
        assert "deleted" in refusal(x, target, copy)

    def test_donated(self, target, copy):
        x = make("jax")
        jax.jit(lambda x: x + 1, donate_argnums=0)(x).block_until_ready()
        assert "donated" in refusal(x, target, copy)

    def test_keys(self, target, copy):
        assert "key_data" in refusal(jax.random.key(0), target, copy)
        assert "key_data" in refusal(jax.random.split(jax.random.key(0)), target, copy)

    @pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.make_jaxpr])
    def test_traced(self, target, copy, transform):
        seen = []

        def look(x):
            seen.append(refusal(x, target, copy))
            with pytest.raises(rlx.UnknownFrameworkError, match="traced"):
                rlx.Device.of(x)
            return x

        transform(look)(jnp.ones(4))
        assert "traced" in seen[0]

    def test_differentiated(self, target, copy):
        seen = []

        def look(x):
            seen.append(refusal(x, target, copy))
            return x.sum()

        jax.grad(look)(jnp.ones(4))
        assert seen


def test_jax_itself_keeps_what_numpy_was_shown_of_narrow_floats():
    """The array then refuses donation for as long as it lives."""
    x = jnp.array(np.ones(64, rlx.dtype("bf16")))
    np.asarray(x)
    jax.jit(lambda x: x, donate_argnums=0, keep_unused=True)(x)
    assert x.is_deleted() is (jax.__version_info__ < (0, 11))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("target", frameworks("numpy", "torch"))
@pytest.mark.parametrize("copy", COPIES)
def test_looking_at_an_array_does_not_hold_it(dtype, target, copy):
    for way in range(3):
        x = make("jax", dtype)
        rlx.explain(x, target)
        y = each_way(x, target, copy)[way]
        assert read_bytes(y) == read_bytes(x)
        del y
        jax.jit(lambda x: x, donate_argnums=0, keep_unused=True)(x)
        assert x.is_deleted()


@pytest.mark.parametrize("source", frameworks("numpy", "torch"))
@pytest.mark.parametrize("copy", COPIES)
def test_arrays_from_outside_a_trace_may_be_exchanged_inside(source, copy):
    x = make(source)
    seen = []

    @jax.jit
    def function(y):
        seen.extend(each_way(x, "jax", copy))
        return y

    function(jnp.ones(3))
    for y in seen:
        assert read_bytes(y) == read_bytes(x)
        assert (address(y) == address(x)) is (copy is not True)


SHARDED = """
import jax, numpy as np, pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import rlx_driver as rlx
from support import COPIES, address, each_way, make, read_bytes, refusal

devices = jax.devices()
assert len(devices) == 4
mesh = Mesh(np.array(devices), ("x",))
for spec in (PartitionSpec("x"), PartitionSpec()):
    x = jax.device_put(jax.numpy.arange(64.0), NamedSharding(mesh, spec))
    np.asarray(x)  # JAX gathers it, copies, and keeps the copy
    for target in ("numpy", "torch"):
        for copy in COPIES:
            text = refusal(x, target, copy)
            assert "4 devices" in text and "addressable_shards" in text, text
        assert not rlx.explain(x, target)
        for shard in x.addressable_shards:
            for y in each_way(shard.data, target, False):
                assert address(y) == address(shard.data)
    assert rlx.Device.of(x) == rlx.Device("cpu")
for index, device in enumerate(devices):
    x = jax.device_put(jax.numpy.arange(16.0), device)
    assert rlx.Device.of(x) == rlx.Device("cpu", index) == rlx.Device(device)
    for target in ("numpy", "torch"):
        for copy in COPIES:
            for y in each_way(x, target, copy):
                assert read_bytes(y) == read_bytes(x)
                assert (address(y) == address(x)) is (copy is not True)
    assert rlx.exchange(x, "jax", copy=True).devices() == {device}
"""


def test_sharded_arrays_are_refused_and_their_shards_shared():
    must_run(SHARDED, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4")


# --- zero-size -----------------------------------------------------------------------------------


def test_empty_tensors_have_no_address_and_are_exchanged_all_the_same():
    assert torch.from_numpy(np.zeros((0, 3), np.float32)).data_ptr() == 0
    for source, target in (p.values for p in pairs()):
        x = make(source, "bfloat16", (0, 3))
        for copy in COPIES:
            for y in each_way(x, target, copy):
                assert tuple(y.shape) == (0, 3)
                assert rlx.dtype(y.dtype) == rlx.dtype("bf16")


# --- importers that lie: what is verified --------------------------------------------------------


def lying(monkeypatch, target):
    """Make every importer of a framework copy without a word."""
    if target == "torch":
        real = torch.from_dlpack
        holders = [m for name, m in sys.modules.items() if name.startswith(("torch", "rlx_driver"))]
        for module in holders:
            if vars(module).get("from_dlpack") is real:
                monkeypatch.setattr(module, "from_dlpack", lambda *a, **k: real(*a, **k).clone())
        real_numpy = torch.from_numpy
        monkeypatch.setattr(torch, "from_numpy", lambda x: real_numpy(x).clone())
        return
    if target == "numpy":
        real = dlpack.as_numpy
        monkeypatch.setattr(dlpack, "as_numpy", lambda *a, **k: real(*a, **k).copy())
        monkeypatch.setattr(torch.Tensor, "numpy", lambda t: np.array(t.tolist(), np.float32))
        return
    real = jnp.from_dlpack
    monkeypatch.setattr(jnp, "from_dlpack", lambda *a, **k: jnp.array(real(*a, **k), copy=True))
    backend = registry.get("jax")
    if backend._private is not None:
        importer = backend._private.import_capsule
        private = backend._private._replace(
            import_capsule=lambda *a: jnp.array(importer(*a), copy=True)
        )
        monkeypatch.setattr(backend, "_private", private)


@pytest.mark.parametrize(
    ("source", "target"), [p.values for p in pairs() if p.values != ("jax", "numpy")]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_importer_that_copies_is_found_out(monkeypatch, source, target, wrapped):
    registry.get(target)
    registry.lanes.clear()
    lying(monkeypatch, target)
    x = make(source)
    x = Exporter(x) if wrapped else x
    for _ in range(2):
        with pytest.raises(rlx.ZeroCopyError, match="address"):
            rlx.exchange(x, target, copy=False)


@pytest.mark.parametrize("source", frameworks("numpy", "jax"))
def test_an_importer_is_verified_without_the_probe_for_transforms(monkeypatch, source):
    monkeypatch.setattr("rlx_driver.backends._torch_tensors._is_wrapped", None)
    lying(monkeypatch, "torch")
    registry.lanes.clear()
    with pytest.raises(rlx.ZeroCopyError, match="address"):
        rlx.exchange(make(source), "torch", copy=False)


# --- private interfaces: probed, and done without ------------------------------------------------


def test_the_fast_pointer_is_the_documented_one():
    from rlx_driver.backends._numpy_pointer import choose, pointer, slow_pointer

    base = np.arange(24.0).reshape(4, 6)
    for x in (base, base.T, base[::-1], base[1:, 2:], np.zeros(()), np.zeros((0, 3)), base[2, 3:3]):
        assert pointer(x) == slow_pointer(x) == x.__array_interface__["data"][0]
    assert choose() is pointer


@pytest.mark.parametrize(
    "wrong",
    [
        lambda array: 0,
        lambda array: id(array),
        lambda array: _numpy_pointer.slow_pointer(array) + (array.ndim == 0),
        lambda array: _numpy_pointer.slow_pointer(array.base if array.base is not None else array),
    ],
)
def test_a_wrong_pointer_falls_back_to_the_documented_one(wrong):
    assert _numpy_pointer.choose(wrong) is _numpy_pointer.slow_pointer


def test_a_right_pointer_is_taken():
    def right(array):
        return _numpy_pointer.slow_pointer(array)

    assert _numpy_pointer.choose(right) is right


def test_other_pythons_have_the_documented_pointer(monkeypatch):
    implementation = types.SimpleNamespace(**vars(sys.implementation))
    implementation.name = "pypy"
    monkeypatch.setattr(sys, "implementation", implementation)
    assert _numpy_pointer.choose() is _numpy_pointer.slow_pointer


def _native():
    from jax._src.lib import _jax

    return _jax


def _broken(**changes):
    native = _native()
    names = ("dlpack_managed_tensor_to_buffer", "buffer_to_dlpack_managed_tensor")
    return types.SimpleNamespace(**{name: getattr(native, name) for name in names} | changes)


def _raises(error):
    def function(*args, **options):
        raise error

    return function


def test_jax_private_dlpack_works_as_probed():
    from rlx_driver.backends import _jax_dlpack

    private = _jax_dlpack.probe()
    assert private is not None
    assert _jax_dlpack.probe(_broken()) is not None
    device = jax.devices("cpu")[0]
    x = aligned(16)
    shared = private.import_capsule(x.__dlpack__(), device, None)
    assert address(shared) == address(x)
    assert torch.from_dlpack(private.export(shared)).data_ptr() == address(x)


@pytest.mark.parametrize(
    "broken",
    [
        types.SimpleNamespace(),
        types.SimpleNamespace(dlpack_managed_tensor_to_buffer=None),
        _broken(dlpack_managed_tensor_to_buffer=_raises(TypeError("arguments"))),
        _broken(dlpack_managed_tensor_to_buffer=_raises(RuntimeError("gone"))),
        _broken(dlpack_managed_tensor_to_buffer=lambda *a: None),
        _broken(dlpack_managed_tensor_to_buffer=lambda *a: jnp.zeros(16)),
        _broken(dlpack_managed_tensor_to_buffer=lambda *a: np.zeros(16, np.float32)),
        _broken(buffer_to_dlpack_managed_tensor=_raises(TypeError("arguments"))),
        _broken(
            buffer_to_dlpack_managed_tensor=lambda x, stream=None: jnp.array(
                x, copy=True
            ).__dlpack__()
        ),
    ],
    ids=[
        "nothing",
        "none",
        "arguments",
        "gone",
        "no-array",
        "other-values",
        "no-jax-array",
        "export-arguments",
        "export-copies",
    ],
)
def test_a_changed_private_dlpack_is_not_used(broken):
    from rlx_driver.backends import _jax_dlpack

    assert _jax_dlpack.probe(broken) is None


def test_an_importer_that_copies_is_not_used():
    from rlx_driver.backends import _jax_dlpack

    importer = _native().dlpack_managed_tensor_to_buffer
    for copies in ((None,), (True,)):

        def copying(capsule, device, x, copy, *rest, copies=copies):
            array = importer(capsule, device, x, copy, *rest)
            return jnp.array(array, copy=True) if copy in copies else array

        assert _jax_dlpack.probe(_broken(dlpack_managed_tensor_to_buffer=copying)) is None


@pytest.fixture
def public_jax_only(monkeypatch):
    monkeypatch.setattr(registry.get("jax"), "_private", None)
    registry.lanes.clear()


@pytest.fixture
def no_transform_probe(monkeypatch):
    monkeypatch.setattr("rlx_driver.backends._torch_tensors._is_wrapped", None)
    registry.lanes.clear()


@pytest.mark.parametrize("without", ["public_jax_only", "no_transform_probe"])
@pytest.mark.parametrize(("source", "target"), pairs())
class TestWithoutPrivateInterfaces:
    @pytest.fixture(autouse=True)
    def _without(self, request, without):
        request.getfixturevalue(without)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "bool"])
    def test_memory_is_shared(self, source, target, dtype):
        x = make(source, dtype)
        for copy in (False, None):
            for y in each_way(x, target, copy):
                assert address(y) == address(x)
                assert rlx.dtype(y.dtype) == dtype
                assert read_bytes(y) == read_bytes(x)

    def test_copies_are_copies(self, source, target):
        x = make(source)
        for y in each_way(x, target, True):
            assert address(y) != address(x)
            assert read_bytes(y) == read_bytes(x)

    def test_traps_stay_closed(self, source, target):
        if source == "numpy":
            x = make("numpy")
            x.flags.writeable = False
            y = rlx.exchange(x, target)
            assert (address(y) == address(x)) is (target == "jax")
            assert read_bytes(y) == read_bytes(x)
            refusal(make("numpy")[::-1], target, False)
        if target == "jax":
            for copy in COPIES:
                refusal(make(source, "int64"), "jax", copy)
            x = make(source, shape=(64,))[1:]
            refusal(x, "jax", False)
            assert read_bytes(rlx.exchange(x, "jax")) == read_bytes(x)
        if source == "torch":
            refusal(torch.ones(3, requires_grad=True), target, None)
            neg = torch.tensor([1 + 2j]).conj().imag
            assert rlx.exchange(neg, target).tolist() == [-2]
        if source == "jax":
            x = make("jax")
            x.delete()
            refusal(x, target, None)


@pytest.mark.parametrize("how", ["private", "public"])
def test_a_trace_is_noticed(how):
    from rlx_driver.backends._jax_arrays import slow_trace_state_clean

    clean = registry.get("jax").trace_state_clean if how == "private" else slow_trace_state_clean
    seen = []

    def look(x):
        seen.append(clean())
        return x

    assert clean()
    jax.jit(look)(1.0)
    jax.eval_shape(look, 1.0)
    jax.make_jaxpr(look)(1.0)
    jax.lax.scan(lambda carry, x: (look(carry), x), 0.0, jnp.ones(2))
    assert set(seen) == {False}
    assert clean()
    with pytest.raises(ZeroDivisionError):
        jax.jit(lambda x: 1 // 0)(1.0)
    assert clean()


@pytest.mark.parametrize("change", ["gone", "always", "never", "arguments"])
def test_a_changed_trace_state_is_not_used(monkeypatch, change):
    from jax._src import core

    from rlx_driver.backends._jax_arrays import probe_trace_state, slow_trace_state_clean

    if change == "gone":
        monkeypatch.delattr(core, "trace_state_clean")
    else:
        wrong = {"always": lambda: True, "never": lambda: False, "arguments": lambda x: x}[change]
        monkeypatch.setattr(core, "trace_state_clean", wrong)
    assert probe_trace_state() is slow_trace_state_clean


# --- pinned memory -------------------------------------------------------------------------------


@pytest.mark.cuda
def test_pinned_memory_is_host_memory():
    x = torch.arange(64, dtype=torch.float32).pin_memory()
    assert rlx.Device.of(x) == rlx.Device("cpu")
    for target in ("numpy", "jax"):
        shares = rlx.explain(x, target).shares
        for y in each_way(x, target, None):
            assert read_bytes(y) == read_bytes(x)
            assert rlx.Device.of(y) == rlx.Device("cpu")
            assert (address(y) == address(x)) is shares
    view = rlx.exchange(x, "numpy", copy=False)
    write_bytes(view, bytes(view.nbytes))
    assert float(x.sum()) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("copy", [None, True])
def test_gpu_memory_reaches_the_host_by_copy_only(copy):
    x = torch.arange(64, dtype=torch.float32, device="cuda")
    assert "cuda:0" in refusal(x, "numpy", False)
    for y in each_way(x, "numpy", copy):
        assert y.tolist() == x.tolist()


@pytest.mark.parametrize("copy", [None, False])
def test_an_import_without_memory_of_its_own_is_refused(copy):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = make("numpy")
    with FakeTensorMode(), pytest.raises(rlx.ZeroCopyError, match="mode or a transform"):
        rlx.exchange(x, "torch", copy=copy)
    assert address(rlx.exchange(x, "torch", copy=copy)) == address(x)
