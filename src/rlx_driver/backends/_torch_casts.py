"""Casts by torch, where they agree with ml_dtypes: on the host, and on a device.

torch's own casts differ from ml_dtypes here and there, and from version to version (float8_e4m3fn
saturates where ml_dtypes gives NaN). So nothing is taken on trust: the first use of a dtype tries
every input that could tell, and what does not agree is put right or done another way.
"""

from __future__ import annotations

import functools
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlx_driver._casts_numpy import is_integer, read_table, reader, saturation, write_table
from rlx_driver._casts_probe import differ, expected, probe_bytes, probe_values
from rlx_driver.backends._numpy_pointer import pointer
from rlx_driver.backends._torch_tensors import TO_TORCH

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlx_driver._casts_numpy import Kernel

    Cast = Callable[[torch.Tensor, torch.Tensor], None]

__all__ = [
    "device_reader",
    "device_writer",
    "host_kernels",
    "host_tensor",
]

_BLOCK = 1 << 22  # elements that are mended at a time, for which there is temporary memory
_TIMED = 1 << 18
_HOST = torch.device("cpu")


def host_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """See host memory as a tensor, without a warning where it is read-only: it is only read."""
    if not array.flags.writeable:
        from rlx_driver.backends.numpy import array_at

        array = array_at(pointer(array), array.shape, array.dtype, array)
    return torch.from_numpy(array)


# --- the host ------------------------------------------------------------------------------------


@functools.cache
@np.errstate(all="ignore")
def host_kernels(dtype: np.dtype[Any]) -> tuple[Kernel | None, Kernel | None]:
    """Give torch's kernels for memory of the host, (to write, to read); None where NumPy's serve.

    They use torch's threads, and return False, nothing done, under a mode of torch in which there
    are no real tensors.
    """
    theirs = TO_TORCH.get(dtype)
    if theirs is None or is_integer(dtype) or dtype.kind in "bc" or dtype.itemsize > 4:
        return None, None
    with torch.inference_mode(False):
        return _host_writer(dtype, theirs), _host_reader(dtype, theirs)


def _host_writer(dtype: np.dtype[Any], theirs: torch.dtype) -> Kernel | None:
    values = probe_values(dtype)
    wanted = expected(dtype, values)
    wrong = np.zeros(values.size, np.bool_)
    for got in _both_ways(torch.from_numpy(values), theirs):
        wrong |= differ(got.numpy().view(dtype), wanted)
    if not wrong.any():
        return functools.partial(_write_host, theirs)
    bound = _bound(dtype, values, wanted, wrong)
    if bound is None:
        return None
    nan = int(np.array([np.nan], np.float32).astype(dtype).view(np.uint8)[0])
    return functools.partial(_write_host_bounded, theirs, bound, nan)


def _bound(
    dtype: np.dtype[Any],
    values: np.ndarray[Any, Any],
    wanted: np.ndarray[Any, Any],
    wrong: np.ndarray[Any, Any],
) -> float | None:
    """Give the magnitude from which a cast is wrong, where all is to be NaN from there on."""
    if dtype.itemsize > 1 or is_integer(dtype) or dtype.kind == "b":
        return None
    bound = float(np.abs(values[wrong]).min())
    beyond = ~(np.abs(values) < bound)  # NaN too
    return bound if bool(np.isnan(wanted[beyond].astype(np.float32)).all()) else None


def _host_reader(dtype: np.dtype[Any], theirs: torch.dtype) -> Kernel | None:
    raw = probe_bytes(dtype)
    wanted = np.empty(raw.size // dtype.itemsize, np.float32)
    reader(dtype, wanted.size)(raw, wanted)
    for got in _both_ways(torch.from_numpy(raw).view(theirs), torch.float32):
        if differ(got.view(torch.float32).numpy(), wanted).any():
            return None
    kernel = functools.partial(_read_host, theirs)
    # torch reads some of these one by one: slower than a table on few cores, not on many.
    if dtype.itemsize == 1 and _seconds(kernel, dtype) > _seconds(reader(dtype, _TIMED), dtype):
        return None
    return kernel


def _seconds(kernel: Kernel, dtype: np.dtype[Any]) -> float:
    raw, out = np.zeros(_TIMED * dtype.itemsize, np.uint8), np.zeros(_TIMED, np.float32)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        kernel(raw, out)
        best = min(best, time.perf_counter() - start)
    return best


def _both_ways(source: torch.Tensor, target: torch.dtype) -> list[torch.Tensor]:
    """Convert as a run and with gaps: whole vectors and single elements are cast by other code."""
    run = torch.empty(source.numel(), dtype=target, device=_HOST).copy_(source)
    gaps = torch.empty(2 * source.numel(), dtype=target, device=_HOST)[::2].copy_(source)
    return [found.contiguous().view(torch.uint8) for found in (run, gaps)]


def _write_host(
    theirs: torch.dtype, raw: np.ndarray[Any, Any], source: np.ndarray[Any, Any]
) -> bool:
    memory = torch.from_numpy(raw)
    if type(memory) is not torch.Tensor:
        return False
    values = torch.from_numpy(source) if source.flags.writeable else host_tensor(source)
    memory.view(theirs).copy_(values)
    return True


def _write_host_bounded(
    theirs: torch.dtype,
    bound: float,
    nan: int,
    raw: np.ndarray[Any, Any],
    source: np.ndarray[Any, Any],
) -> bool:
    """Convert by a cast that is right below `bound`; from there on, and for NaN, it is NaN."""
    memory, values = torch.from_numpy(raw), host_tensor(source)
    if type(memory) is not torch.Tensor:
        return False
    # All at once: at each call torch's threads meet, which takes long on cores that are shared.
    memory.view(theirs).copy_(values)
    if not _within(values, bound):
        for start in range(0, source.size, _BLOCK):
            part = values[start : start + _BLOCK]
            if not _within(part, bound):
                beyond = (part.abs() < bound).logical_not_()
                memory[start : start + _BLOCK].masked_fill_(beyond, nan)
    return True


def _within(values: torch.Tensor, bound: float) -> bool:
    low, high = torch.aminmax(values)
    return -bound < float(low) and float(high) < bound  # false for NaN


def _read_host(theirs: torch.dtype, raw: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> bool:
    result = torch.from_numpy(out)
    if type(result) is not torch.Tensor:
        return False
    result.copy_(host_tensor(raw).view(theirs))
    return True


# --- a device ------------------------------------------------------------------------------------


@functools.cache
@np.errstate(all="ignore")
def device_writer(dtype: np.dtype[Any], device: torch.device) -> Cast | None:
    """Give a cast on a device: ``cast(target, values)``, bytes of one axis and float32.

    None where no way of torch there gives what the host gives.
    """
    with torch.inference_mode(False):  # tables are kept
        return _find_writer(dtype, device)


def _find_writer(dtype: np.dtype[Any], device: torch.device) -> Cast | None:
    values = probe_values(dtype)
    wanted = expected(dtype, values)
    theirs = host_tensor(values).to(device)
    candidates = _write_candidates(dtype, device)
    for cast in candidates:
        target = torch.zeros(values.size * dtype.itemsize, dtype=torch.uint8, device=device)
        try:
            cast(target, theirs)
            wrong = differ(target.cpu().numpy().view(dtype), wanted)
        except (RuntimeError, OverflowError):  # torch has no such kernel
            continue
        if not wrong.any():
            return cast
        bound = _bound(dtype, values, wanted, wrong)
        if bound is not None and len(candidates) < 3:
            candidates.insert(1, functools.partial(_write_bounded, TO_TORCH[dtype], bound))
    return None


@functools.cache
@np.errstate(all="ignore")
def device_reader(dtype: np.dtype[Any], device: torch.device) -> Cast | None:
    """Give a cast on a device: ``cast(values, source)``, float32 and bytes of one axis."""
    with torch.inference_mode(False):
        return _find_reader(dtype, device)


def _find_reader(dtype: np.dtype[Any], device: torch.device) -> Cast | None:
    raw = probe_bytes(dtype)
    wanted = np.empty(raw.size // dtype.itemsize, np.float32)
    reader(dtype, wanted.size)(raw, wanted)
    theirs = torch.from_numpy(raw).to(device)
    for cast in _read_candidates(dtype, device):
        values = torch.zeros(wanted.size, dtype=torch.float32, device=device)
        try:
            cast(values, theirs)
            got = values.cpu().numpy()
        except (RuntimeError, OverflowError):
            continue
        if not differ(got, wanted).any():
            return cast
    return None


def _write_candidates(dtype: np.dtype[Any], device: torch.device) -> list[Cast]:
    theirs = TO_TORCH.get(dtype)
    if dtype.kind == "b":
        return [lambda target, values: _keep(torch.ne(values, 0, out=target.view(torch.bool)))]
    if is_integer(dtype) and dtype.kind in "iu" and theirs is not None:
        return [functools.partial(_saturate, theirs, *saturation(dtype))]
    found: list[Cast] = []
    if theirs is not None:
        found.append(lambda target, values: _keep(target.view(theirs).copy_(values)))
    if dtype.itemsize == 1:
        table = host_tensor(write_table(dtype)).to(device)
        found.append(functools.partial(_write_by_table, table))
    return found


def _read_candidates(dtype: np.dtype[Any], device: torch.device) -> list[Cast]:
    theirs = TO_TORCH.get(dtype)
    found: list[Cast] = []
    if theirs is not None and dtype.kind == "c":
        found.append(lambda values, raw: _keep(values.copy_(raw.view(theirs).real)))
    elif theirs is not None and dtype.kind != "b":
        found.append(lambda values, raw: _keep(values.copy_(raw.view(theirs))))
    if dtype.itemsize == 1:
        table = host_tensor(read_table(dtype)).to(device)
        found.append(lambda values, raw: _keep(torch.index_select(table, 0, raw.int(), out=values)))
    return found


def _saturate(
    theirs: torch.dtype,
    low: float,
    high: float,
    above: float | None,
    largest: int,
    target: torch.Tensor,
    values: torch.Tensor,
) -> None:
    whole = values.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).clamp_(low, high)
    if above is not None:  # in int64, for torch fills no uint32
        whole = whole.to(torch.int64).masked_fill_(values >= above, largest)
    target.view(theirs).copy_(whole)


def _write_bounded(
    theirs: torch.dtype, bound: float, target: torch.Tensor, values: torch.Tensor
) -> None:
    target.view(theirs).copy_(torch.where(values.abs() < bound, values, math.nan))


def _write_by_table(table: torch.Tensor, target: torch.Tensor, values: torch.Tensor) -> None:
    bits = values.view(torch.int32)
    sticky = (bits & 0xFFFF) != 0
    index = ((bits >> 16) & 0xFFFF).bitwise_or_(sticky)
    torch.index_select(table, 0, index, out=target)


def _keep(_: torch.Tensor) -> None:
    """Make nothing of a result that was written in place."""
