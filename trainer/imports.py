"""transformers, PEFT and accelerate, and torch under them, without the parts that no run of ours enters: 1.6 s instead of 5 s.

torch imports its exporter, its quantiser and its distributions, transformers its serving engine, PEFT forty kinds of adapter, whether or not
anything will use them, and transformers opens every model's source (2,500 files) to learn what is in it. Here the modules of TORCH, HUB and
OTHERS have stand-ins. Each gives way to the real module as soon as somebody asks it for more than its name, so nothing is missing for whoever
comes later.

A version of these packages that needs more than that gives an error here; then the process starts again with
MILKTEA_PLAIN_IMPORTS=1, and everything is imported as usual.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

PLAIN = "MILKTEA_PLAIN_IMPORTS"
PROBES = "transformers.utils.import_utils"
FOLDERS = ("auto", "bloom")  # of transformers/models: what we name, and what PEFT names when it is imported
COMPILER = "torch._dynamo"
MARKS = ("allow_in_graph", "assume_constant_result", "clear_lru_cache", "disable", "graph_break")
Late = dict[str, tuple[str, ...]]  # module -> names that others take from it while they are imported themselves

# for the compiler, for DTensors and for tensors without memory. They import each other in circles: whoever asks for one gets all, in torch's order
TOGETHER: Late = {
    "torch.nested": ("nested_tensor",),
    "torch.nested._internal": (),
    "torch.nested._internal.nested_tensor": ("NestedTensor",),
    "torch.export": (),
    "torch.func": ("vmap",),
    "torch._higher_order_ops": ("cond", "while_loop"),
    "torch._higher_order_ops.invoke_subgraph": ("NestedCompileRegionOptions",),
    "torch._subclasses": (),
    "torch._subclasses.fake_tensor": ("FakeTensor",),
    "torch.distributed._meta_registrations": (),
    "torch._meta_registrations": (),
}
# where those circles are entered too, by whoever comes later
CIRCLES = (
    "torch.fx.", "torch.distributed.tensor", "torch._decomp", "torch._dynamo", "torch._export", "torch._functorch", "torch._inductor", "torch._prims",
    "torch._refs",
)  # fmt: skip
TORCH: Late = TOGETHER | {
    "torch.ao": (),
    "torch.autograd.gradcheck": ("gradcheck", "gradgradcheck"),
    "torch.distributions": ("constraints",),
    "torch.distributions.wishart": ("Wishart",),
    "torch.masked": (),
    "torch.nn.intrinsic": (),
    "torch.nn.qat": (),
    "torch.nn.quantizable": (),
    "torch.nn.quantized": (),
    "torch.quantization": (),
    "torch.testing": (),
    "torch.testing._comparison": ("default_tolerances",),
    "torch.utils.checkpoint": ("checkpoint",),
    "torch.utils.data.graph_settings": (),
    "torchgen": (),
    "torchgen.model": (),
    "unittest": ("mock",),
    "unittest.mock": (),
}
# fmt: off
HUB: Late = {
    "huggingface_hub.hf_api": (
        "HfApi", "RepoFile", "create_branch", "create_commit", "create_repo", "file_exists", "get_repo_discussions", "list_repo_tree", "upload_file",
    ),
    "huggingface_hub.hf_file_system": ("HfFileSystem",),
}
# fmt: on
OTHERS: Late = {
    COMPILER: (),
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex", "trace_wrapped"),  # the second in torch 2.11
    "torch.nn.attention.flex_attention": ("BlockMask", "create_block_mask", "flex_attention", "_DEFAULT_SPARSE_BLOCK_SIZE", "AuxRequest"),
    "transformers.generation.continuous_batching": ("PagedAttentionCache", "ContinuousMixin", "ContinuousBatchingManager"),
    "transformers.generation.continuous_batching.cache": ("PagedAttentionCache",),
    "peft.tuners": (),
    "peft.tuners.adalora": ("AdaLoraLayer",),
}
SHELLS = {"peft.tuners": "peft.tuners.lora"}  # package -> the module of it that is wanted: all of them are found, and the package never runs
# to be imported before torch's libraries are loaded in a thread: the system loads one library at a time, and Python would wait for its turn
EXTENSIONS = ("_asyncio", "_ssl", "unicodedata", "regex", "yaml", "markupsafe")


def unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stands in for MARKS, as a decorator, plain or with arguments, or as a call. They tell the compiler what to leave alone; it never comes."""
    return function if callable(function) else unmarked


class _Name:
    """Stands in for what `module` calls `name`. Called or looked into, it is the real one; as a base it is nothing; what nobody has imported
    has no instances."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _real(self) -> Any:
        return getattr(real(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __instancecheck__(self, instance: object) -> bool:
        return self._module in sys.modules and not stands_in(self._module) and isinstance(instance, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return ()

    def __or__(self, other: Any) -> Any:  # in an annotation
        return self

    __ror__ = __or__


class _Late(ModuleType):
    """Gives way to the real module when something is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(self.__name__, name) if name in FINDER.names.get(self.__name__, ()) else getattr(real(self.__name__), name)


class _Compiler(_Late):
    """torch asks it in every optimizer step to look away, and to forget its rules when processes meet."""

    def __getattr__(self, name: str) -> Any:
        if self.__name__ == COMPILER and name == "trace_rules":
            return _Compiler(f"{COMPILER}.trace_rules")
        return unmarked if name in MARKS else super().__getattr__(name)


class _Shell(_Late):
    """One of SHELLS. While `giving`, a name is that of the wanted module, or late."""

    giving = True

    def __getattr__(self, name: str) -> Any:
        if not self.giving or name.startswith("__"):
            return super().__getattr__(name)
        return vars(sys.modules[SHELLS[self.__name__]]).get(name) or _Name(self.__name__, name)


class _Finder:
    """Answers for modules of `names`, once each, and for what lies in them; hands out transformers' own module of probes with some of them
    answered beforehand."""

    def __init__(self) -> None:
        self.names: Late = {}
        self.answered: set[str] = set()
        self._specs: dict[str, ModuleSpec] = {}
        self._whole = False

    def expect(self, names: Late, whole: bool = False) -> None:
        self.names |= {name: given for name, given in names.items() if name not in sys.modules}
        self._whole = whole
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in self.names and name not in self.answered:
            self.answered.add(name)  # when it was put away, the next import means the real one
            spec = ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
            found = PathFinder.find_spec(name, path) if name in SHELLS else None
            spec.submodule_search_locations = found.submodule_search_locations if found else []
            return spec
        parent = name.rpartition(".")[0]
        if stands_in(parent) and parent not in SHELLS:
            real(parent)
        elif not (name.startswith(CIRCLES) and together()):
            return self._probes(path, target) if name == PROBES else None
        there = importlib.import_module(name)
        spec = ModuleSpec(name, self, loader_state=there)  # type: ignore[arg-type]
        with suppress(AttributeError):  # torch's modules of settings have none
            self._specs[name], there.__spec__ = there.__spec__, spec  # type: ignore[assignment]  # importlib runs again what this one says
        return spec

    def _probes(self, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(PROBES, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def answered(module: ModuleType) -> None:
                run(module)
                answer(module, self._whole)

            spec.loader.exec_module = answered  # type: ignore[method-assign]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.loader_state is not None:
            there: ModuleType = spec.loader_state
            return there
        kind = _Compiler if spec.name == COMPILER else _Shell if spec.name in SHELLS else _Late
        return kind(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        own = self._specs.pop(getattr(module, "__name__", ""), None)
        if own is not None:
            module.__spec__ = own


FINDER = _Finder()


def stands_in(name: str) -> bool:
    return isinstance(sys.modules.get(name), _Late)


def put_away(name: str) -> None:
    """Takes a stand-in from sys.modules and from its parent, so that the next import finds the real module."""
    if not stands_in(name):
        return
    module = sys.modules.pop(name)
    parent, _, last = name.rpartition(".")
    if vars(sys.modules.get(parent, ModuleType(""))).get(last) is module:
        delattr(sys.modules[parent], last)


def real(name: str) -> ModuleType:
    """The module itself, after putting away the stand-in that is in front of it."""
    if name in TOGETHER or name in (COMPILER, "torch.distributed.tensor"):
        together()
    put_away(name)
    return importlib.import_module(name)


def together() -> bool:
    """Imports what was left out of TOGETHER; whether there was anything. Never while torch itself is at it."""
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", True):
        return False
    left_out = [name for name in TOGETHER if stands_in(name)]
    FINDER.answered |= TOGETHER.keys()
    for name in left_out:
        put_away(name)
    for name in left_out:
        importlib.import_module(name)
    return bool(left_out)


class _NoTensors(ModuleType):
    """torch.distributed.tensor before anybody imported it: nothing can be a DTensor yet. PEFT asks that of every weight."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing if name == "DTensor" else getattr(real("torch.distributed.tensor"), name)


class _Nothing:
    """Has no instances."""


def answer(probes: ModuleType, whole: bool) -> None:
    """Tells transformers that nobody can read pictures here, and, unless the job spreads one model over processes (`whole`), that there are no
    distributed tensors. The folders of models are not read, but for FOLDERS."""
    for name in ("is_vision_available", "is_torchvision_available"):  # torchvision asks for torch's compiler
        setattr(probes, name, lambda: False)
    if not whole:
        probes.is_torch_distributed_available = lambda: False  # type: ignore[attr-defined]
    read = probes.create_import_structure_from_path

    def read_some(path: str | Path) -> dict[str, Any]:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        if folder.name != "models":
            return read(path)
        return {name: read(folder / name) for name in FOLDERS if (folder / name).is_dir()}

    probes.create_import_structure_from_path = read_some  # type: ignore[attr-defined]
    probes.read_all_models = read  # type: ignore[attr-defined]


class LatePattern:
    """re.Pattern, compiled when something is asked of it."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self._asked_for = (pattern, flags)
        self._compiled: re.Pattern[str] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._compiled is None:
            self._compiled = re.compile(*self._asked_for)
        return getattr(self._compiled, name)


def compile_late() -> None:
    """transformers compiles 900 patterns, by which checkpoints of all its models are renamed, to load one model: 0.2 s."""
    loading = sys.modules.get("transformers.core_model_loading")
    if vars(loading or ModuleType("")).get("re") is re:
        late = ModuleType("re")
        vars(late).update(vars(re) | {"compile": LatePattern})
        loading.re = late  # type: ignore[union-attr]


def find_late(probes: ModuleType) -> None:
    """A name that `transformers` is asked for and does not know is looked for in all models' folders then, once."""
    import transformers

    if not hasattr(probes, "read_all_models"):
        return

    lazy: Any = type(transformers)

    class Late(lazy):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_") or self.__dict__.get("_all_models"):
                    raise
            self._all_models = True
            vars(probes)["create_import_structure_from_path"] = probes.read_all_models
            probes.define_import_structure.cache_clear()
            models = Path(self.__file__).parent / "models"
            every = lazy(self.__name__, self.__file__, probes.define_import_structure(models, prefix="models"))
            self._modules |= every._modules
            self._object_missing_backend |= every._object_missing_backend
            self._class_to_module.update({k: v for k, v in every._class_to_module.items() if k not in self._class_to_module})
            return getattr(self, name)

    transformers.__class__ = Late


def begin(quantised: bool, whole: bool) -> None:
    """The part of `lean` that goes without torch, while a thread has the system load torch's libraries (0.3 s; more where they are on a cold
    disk). Call when the environment is as torch should find it: OMP_NUM_THREADS counts when they are loaded."""
    if os.environ.get(PLAIN):
        return
    for name in EXTENSIONS:
        with suppress(ImportError):
            importlib.import_module(name)
    libraries = threading.Thread(target=load_libraries, name="libraries")
    libraries.start()
    if not quantised and not whole and "torch" not in sys.modules:
        FINDER.expect(TORCH)
    try:
        _names(quantised, whole)
    except (ImportError, AttributeError, TypeError) as error:
        plainly(error)
    libraries.join()


def load_libraries() -> None:
    """torch's libraries, as `import torch` will load them again at no cost. Where they are elsewhere it will find them by itself."""
    spec = PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    load = ctypes.CDLL(None).dlopen  # ctypes.CDLL would hold Python's lock while it loads
    load.restype = ctypes.c_void_p
    for name, mode in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch.so", 0)):
        load(bytes(Path(spec.origin).parent / "lib" / name), os.RTLD_NOW | mode)


def lean(quantised: bool, whole: bool) -> None:
    """Imports what a run needs. `quantised`: with bitsandbytes. `whole`: with torch's distributed tensors, for one model in parts. Safe to
    call again, and where transformers' models are imported already it changes nothing."""
    if not quantised:
        without_bitsandbytes()
    if "transformers.modeling_utils" in sys.modules or os.environ.get(PLAIN):
        return
    try:
        _names(quantised, whole)
        FINDER.expect(OTHERS, whole)
        with without_collection():
            import peft  # noqa: F401
            import torch
            import transformers.models.auto.modeling_auto  # noqa: F401
    except (ImportError, AttributeError, TypeError) as error:
        plainly(error)
    for shell in SHELLS:
        vars(sys.modules[shell])["giving"] = False
    if "torch.distributed.tensor" not in sys.modules and torch.distributed.is_available():
        torch.distributed.tensor = _NoTensors("torch.distributed.tensor")
    find_late(sys.modules[PROBES])
    compile_late()


def _names(quantised: bool, whole: bool) -> None:
    if not quantised:
        without_bitsandbytes()
    FINDER.expect(HUB, whole)
    import transformers  # noqa: F401


def without_bitsandbytes() -> None:
    """PEFT imports bitsandbytes wherever it is installed, and with it torch's compiler: 2 s of start-up, for nothing unless it quantises."""
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


@contextmanager
def without_collection() -> Iterator[None]:
    """Imports make a million objects that stay: looking through them for garbage is a tenth of the time. Afterwards they are never looked at."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def plainly(error: Exception) -> NoReturn:
    """Starts this process again, so that nothing half-imported is left, without stand-ins."""
    print(f"transformers could not be imported without its unused parts ({error}): importing all of it", file=sys.stderr, flush=True)
    os.environ[PLAIN] = "1"
    os.execv(sys.executable, sys.orig_argv)
