"""A GPU for machines without one: tensors that say they are on `cuda:0` (or `mps:0`, Apple's), are refused beside those of the CPU as CUDA refuses them, and arrive late where nobody waits.

The numbers are computed on the CPU, so that what a program gives there and on the pretended GPU has to be equal to the bit. What this finds is what most often fails on a first GPU: tensors on two devices, an array made of a tensor on the GPU,
a copy that is read before it has come, memory that is changed while it is copied. What it can't find: kernels that do not exist or round otherwise, memory that does not suffice, speed."""
import contextlib
import warnings
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

class Here:
    "The pretended device, while there is one."
    device = torch.device("cuda", 0)


plainly = torch._C.DisableTorchFunctionSubclass


class OnGpu(Tensor):
    "A tensor that is said to be on the GPU."
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None): return compute(func, args, kwargs or {})


class Late:
    "Copies to the host that nobody has waited for (tensor, its values), and sources of copies to the GPU as they were."
    arriving, leaving, warn = [], [], False
    @classmethod
    def host_waits(cls, what):
        "An operation that waits for the GPU, and says so where `torch.cuda.set_sync_debug_mode` wants it."
        if cls.warn: warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)
        cls.wait()
    @classmethod
    def wait(cls):
        for host, values in cls.arriving: host.copy_(values)
        for source, before in cls.leaving: assert torch.equal(source, before), "pinned memory was changed while it was copied to the GPU"
        cls.arriving.clear(); cls.leaving.clear()


def is_gpu(x): return isinstance(x, OnGpu)


def moved(x: Tensor, there: bool) -> Tensor:
    "A new tensor, said to be on the GPU or on the CPU. (Not a view of it: autograd would go another way where that is changed in place.)"
    if there and Here.device.type == "mps" and x.dtype in (torch.float64, torch.complex128): raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    if is_gpu(x) != there: x.__class__ = OnGpu if there else Tensor
    return x


ACROSS = {Tensor.copy_, Tensor.to, Tensor.type_as, Tensor.grad.__get__, Tensor.data.__get__, Tensor.__deepcopy__, torch.as_tensor, torch.tensor, Tensor.new_tensor, torch.isin,
          torch.is_same_size, torch._has_compatible_shallow_copy_type} # may see tensors of both
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
JOINING = {torch.cat, torch.stack, torch.concat, torch.hstack, torch.vstack, torch.gather, Tensor.gather, torch.matmul, Tensor.matmul, Tensor.__matmul__}
ON_HOST = {Tensor.numpy, Tensor.__array__}
WAITS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, torch.equal, Tensor.equal, torch.nonzero, Tensor.nonzero,
         torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique, torch.repeat_interleave, torch.bincount}


def name_of(func): return getattr(func, "__name__", str(func))


def by_mask(index): return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(index))


def check(func, args, kwargs):
    "Raises what CUDA raises where tensors of both devices meet. A number of the CPU may; an index of the CPU, too."
    if func in ACROSS: return
    if func in INDEXING: # a tensor on the CPU may be an index of one on the GPU, not the other way round
        of, index, *value = args
        indices = [x for x in tree_leaves(index) if isinstance(x, Tensor)]
        if not is_gpu(of) and any(map(is_gpu, indices)): raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if not value or not isinstance(value[0], Tensor) or not indices or value[0].dim() == 0: return     # without index tensors it is a copy
        args, kwargs = (of, value[0]), {}
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(map(is_gpu, tensors)) and any(not is_gpu(x) and (x.dim() or func in JOINING) for x in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {Here.device} and cpu! (when checking {name_of(func)})")


def target(func, args, kwargs):
    "Where the result is wanted (None: not said), and the arguments without that."
    name, found = name_of(func), None
    if kwargs.get("device") is not None: found, kwargs = torch.device(kwargs["device"]), kwargs | dict(device=torch.device("cpu"))
    elif func is Tensor.to:
        where = [x for x in args[1:] if isinstance(x, (str, torch.device))]
        other = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else kwargs.get("other")
        found = torch.device(where[0]) if where else other.device if other is not None else None
        args = args[:1] + tuple(torch.device("cpu") if isinstance(x, (str, torch.device)) else x for x in args[1:])
    elif func is Tensor.type_as: found = args[1].device
    elif func is Tensor.cuda: found = torch.device("cuda")
    elif func is Tensor.cpu: found = torch.device("cpu")
    elif name in ("tensor", "as_tensor", "from_numpy"): found = torch.device("cpu")
    if found is not None and found.type not in ("cpu", Here.device.type, "meta"): raise RuntimeError(f"there is no {found}")
    return found, args, kwargs


def compute(func, args, kwargs):
    "What every function of PyTorch goes through."
    name = name_of(func)
    if func == Tensor.device.__get__: return Here.device if is_gpu(args[0]) else moved_property(func, args)
    if func in (Tensor.is_cuda.__get__, Tensor.is_mps.__get__): return is_gpu(args[0]) and Here.device.type == ("cuda" if func == Tensor.is_cuda.__get__ else "mps")
    if func == Tensor.is_cpu.__get__: return not is_gpu(args[0])
    if func in (Tensor.get_device, torch.get_device): return 0 if is_gpu(args[0]) else -1
    if func is Tensor.pin_memory: return pinned(args[0])
    if func is Tensor.is_pinned: return getattr(args[0], "is_page_locked", False)
    if func in ON_HOST and is_gpu(args[0]): raise TypeError(f"can't convert {Here.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
    if func is Tensor.__deepcopy__ and is_gpu(args[0]): return copied(*args)
    if func in (Tensor.__reduce_ex__, Tensor.__reduce__) and is_gpu(args[0]): return getattr(args[0].detach().cpu(), name)(*args[1:])
    pin = kwargs.pop("pin_memory", False)
    check(func, args, kwargs)
    if any(map(is_gpu, args[:1])) and (func in WAITS or func in INDEXING and by_mask(args[1])): Late.host_waits(name)
    there, args, kwargs = target(func, args, kwargs)
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if func in (Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.copy_): return transferred(func, args, kwargs, there)
    with plainly(): result = cast(func, args, kwargs)
    gpu = there.type == Here.device.type if there is not None else any(map(is_gpu, given[:1] if func in INDEXING else given))
    result = tree_map(lambda x: x if not isinstance(x, Tensor) or any(x is y for y in given) else moved(x, gpu), result)
    return pinned(result) if pin else result


def cast(func, args, kwargs):
    "Autocast of the GPU, by that of the CPU."
    kind = Here.device.type
    if not torch.is_autocast_enabled(kind) or torch.is_autocast_enabled("cpu"): return func(*args, **kwargs)
    with torch.autocast("cpu", torch.get_autocast_dtype(kind)): return func(*args, **kwargs)


def moved_property(func, args):
    with plainly(): return func(*args)


def pinned(x: Tensor) -> Tensor:
    if is_gpu(x): raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    with plainly(): x = x.clone()
    x.is_page_locked = True
    return x


def copied(x, memo):
    "A deep copy."
    if id(x) in memo: return memo[id(x)]
    memo[id(x)] = new = x.detach().clone().requires_grad_(x.requires_grad)
    if hasattr(x, "_is_param"): new._is_param = True
    return new


def transferred(func, args, kwargs, there):
    "A copy between the devices. Without waiting, one to the host has other numbers until somebody waits; the source of one to the GPU must stay as it is until then."
    source = args[1] if func is Tensor.copy_ else args[0]
    with plainly(): result = cast(func, args, kwargs)
    to_gpu = is_gpu(args[0]) if func is Tensor.copy_ else there.type == Here.device.type if there is not None else is_gpu(source)
    if func is not Tensor.copy_:
        if result is source and to_gpu != is_gpu(source):
            with plainly(): result = source.clone() # its own memory
        if result is not source: moved(result, to_gpu)
    if to_gpu == is_gpu(source): return result
    if not kwargs.get("non_blocking"): Late.host_waits(name_of(func)); return result
    if to_gpu:
        if getattr(source, "is_page_locked", False): Late.leaving.append((source, source.clone()))
        return result
    with plainly(), torch.no_grad():
        Late.arriving.append((result, result.clone()))
        result.fill_(-77)
    return result


class Gpu(TorchFunctionMode):
    "While it lasts there is a GPU."
    def __torch_function__(self, func, types, args=(), kwargs=None): return compute(func, args, kwargs or {})


class Event:
    "Of a stream: waiting for it is waiting for all copies."
    def __init__(self, *args, **kwargs): pass
    def record(self, *args): pass
    def synchronize(self): Late.wait()
    def query(self): Late.wait(); return True
    def elapsed_time(self, other): return 1.


def pretend_cuda(patch):
    "`torch.cuda` as on a machine with a GPU."
    stream = SimpleNamespace(synchronize=Late.wait, wait_stream=lambda s: None, record_event=lambda: Event(), is_capturing=lambda: False)
    answers = dict(is_available=True, is_initialized=True, device_count=1, current_device=0, get_device_name="pretended GPU", get_device_capability=(9, 0), is_bf16_supported=True, max_memory_allocated=1 << 30,
                   memory_allocated=1 << 20, max_memory_reserved=1 << 30, mem_get_info=(60 << 30, 80 << 30), reset_peak_memory_stats=None, empty_cache=None, set_device=None, is_current_stream_capturing=False,
                   manual_seed=None, manual_seed_all=None, set_rng_state=None, get_device_properties=SimpleNamespace(total_memory=80 << 30, name="pretended GPU"))
    for name, answer in answers.items(): patch.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    patch.setattr(torch.cuda, "get_rng_state", lambda *args: torch.zeros(16, dtype=torch.uint8))
    patch.setattr(torch.cuda, "get_sync_debug_mode", lambda: int(Late.warn))
    patch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(Late, "warn", mode in ("warn", 1)))
    patch.setattr(torch.cuda, "synchronize", lambda *args: Late.wait())
    patch.setattr(torch.cuda, "current_stream", lambda *args: stream)
    patch.setattr(torch.accelerator, "current_stream", lambda *args: stream)
    patch.setattr(torch.accelerator, "is_available", lambda *args: True)   # a loader pins its batches
    patch.setattr(torch.cuda, "device", lambda *args: contextlib.nullcontext())
    patch.setattr(torch.cuda, "Event", Event)


def pretend_mps(patch):
    "`torch.mps` as on a Mac."
    patch.setattr(torch.backends.mps, "is_available", lambda: True)
    patch.setattr(torch.mps, "synchronize", Late.wait)
    patch.setattr(torch.mps, "get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8))
    patch.setattr(torch.mps, "set_rng_state", lambda state: None)
    patch.setattr(torch.accelerator, "current_stream", lambda *args: SimpleNamespace(is_capturing=lambda: False))
    for name in ("current_allocated_memory", "driver_allocated_memory"): patch.setattr(torch.mps, name, lambda: 1 << 30)


@contextlib.contextmanager
def gpu(patch, kind="cuda"):
    "A pretended GPU, \"cuda\" or \"mps\"; `patch` is pytest's MonkeyPatch. Real ones are not used."
    Here.device = torch.device(kind, 0)
    (pretend_cuda if kind == "cuda" else pretend_mps)(patch)
    groups = torch._C._group_tensors_by_device_and_dtype # of optimisers; it is not a function of PyTorch that a mode sees
    def by_device(lists, *args):
        with plainly(): found = groups(lists, *args)
        return {(Here.device if is_gpu(kinds[0][0]) else device, dtype): (kinds, numbers) for (device, dtype), (kinds, numbers) in found.items()}
    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", by_device)
    old = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Late.arriving.clear(); Late.leaving.clear()
    try:
        with Gpu(): yield Here.device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(old)
        Late.arriving.clear(); Late.leaving.clear()
