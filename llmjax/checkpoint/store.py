"""Checkpoints of a run: the whole train state and a little JSON per step, through Orbax (asynchronous, sharded, atomic, the newest N kept).

`CheckpointManager` of Orbax's v0 interface is used behind this small one, so that a change of theirs is a change here alone. A state is stored flat,
{"params/cycle/0/mixer/q": array}, with its names, shapes and dtypes beside it: so any pytree can be stored, a checkpoint of another model is told by name, and it is restored
onto any mesh, bit for bit.
"""
from __future__ import annotations

import logging
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.checkpoint.safetensors_file import is_full
from llmjax.core.distributed import barrier
from llmjax.core.errors import CheckpointError
from llmjax.core.tree import path_name

TEMPORARY = re.compile(r".*\.orbax-checkpoint-tmp.*")


def flat_state(tree: Any) -> dict[str, Any]:
    """Every array of a state by its path; random keys as their numbers."""
    return {path_name(path): raw(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def raw(x: Any) -> Any:
    """A typed random key as the uint32 array it is made of (abstract or real); anything else as it is."""
    if not jnp.issubdtype(getattr(x, "dtype", None) or jnp.asarray(x).dtype, jax.dtypes.prng_key):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, x)
    return jax.random.key_data(x)


def typed(x: jax.Array, like: Any) -> Any:
    """The inverse of `raw`: a random key again where `like` is one."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return x
    impl: list[Any] = []
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(x, impl=impl[0])


def describe(flat: dict[str, Any]) -> dict[str, list]:
    return {name: [list(jnp.shape(x)), str(x.dtype if hasattr(x, "dtype") else jnp.asarray(x).dtype)] for name, x in flat.items()}


class Store:
    """The checkpoints of one run in `folder`; the newest `keep` stay. One writer at a time."""

    def __init__(self, folder: str | pathlib.Path, keep: int = 3):
        import orbax.checkpoint as ocp
        logging.getLogger("absl").setLevel(logging.CRITICAL)      # what fails in its threads is raised here too, once and by name
        self.folder = pathlib.Path(folder).absolute()
        self._ocp = ocp
        with full_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for left in self.folder.iterdir():         # what a killed run was writing
                if TEMPORARY.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True)
        barrier("store")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "extra"))

    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return max(self._manager.all_steps(), default=None)

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None, wait: bool = False) -> None:
        """Stores a pytree of arrays and a JSON dictionary (a step that is there already stays as it is).

        Returns once the arrays are copied off the devices; the writing goes on behind, and an error of it comes at the next call.
        Raises CheckpointError where the disk is full; what was stored before stays.
        """
        if step in self._manager.all_steps():
            return self.wait() if wait else None
        flat = flat_state(state)
        flat = {name: x if isinstance(x, jax.Array) else jnp.asarray(x) for name, x in flat.items()}
        args = self._ocp.args.Composite(state=self._ocp.args.StandardSave(flat), extra=self._ocp.args.JsonSave({"arrays": describe(flat), "extra": extra or {}}))
        with full_disk(self.folder):
            self._manager.check_for_errors()
            self._manager.save(step, args=args, force=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when everything is written. Raises CheckpointError where it could not be."""
        with full_disk(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        with full_disk(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._manager.close()

    def extra(self, step: int) -> dict[str, Any]:
        """The JSON stored with a step. Raises CheckpointError for a damaged one."""
        self.wait()
        return self._json(step)["extra"]

    def arrays(self, step: int) -> dict[str, list]:
        """Every stored array of a step: name -> [shape, dtype]."""
        self.wait()
        return self._json(step)["arrays"]

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, extra) of a step, bit for bit, on whatever mesh `like` says.

        like: the state as arrays or ShapeDtypeStructs, with the shardings wanted.
        Raises CheckpointError for another model's checkpoint (naming the first array that differs) and for a damaged one (naming the one before it).
        """
        self.wait()
        if step not in self.steps():
            raise CheckpointError(f"{self.folder}: there is no checkpoint of step {step}; there are {', '.join(map(str, self.steps())) or 'none'}")
        stored = self._json(step)
        paths, tree = jax.tree_util.tree_flatten_with_path(like)
        wanted = flat_state(like)
        self._compare(step, stored["arrays"], describe(wanted))
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(x, original)) for (name, x), (_, original) in zip(wanted.items(), paths)}
        try:
            flat = self._manager.restore(step, args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(abstract)))["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        return jax.tree.unflatten(tree, [typed(flat[path_name(path)], x) for path, x in paths]), stored["extra"]

    def restore_part(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Some arrays of a step by their names in it ("params/embed/table"), in the dtypes and on the shardings of `like` (ShapeDtypeStructs); nothing else is read.

        Raises CheckpointError for a name or a shape the checkpoint has not, and for a damaged one.
        """
        stored = self._json(step)["arrays"]
        for name, x in like.items():
            found = tuple(stored[name][0]) if name in stored else "absent"
            if found != tuple(x.shape):
                raise CheckpointError(f"{self.folder / str(step)}: a checkpoint of another model: {name!r} is {found}, its configuration makes it {tuple(x.shape)}")
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(x, x)) for name, x in like.items()}
        from etils import epath
        handler = self._ocp.PyTreeCheckpointHandler()
        places = self._ocp.checkpoint_utils.construct_restore_args(abstract)
        try:
            return handler.restore(epath.Path(self.folder / str(step) / "state"), args=self._ocp.args.PyTreeRestore(abstract, restore_args=places, partial_restore=True))
        except Exception as error:
            raise self._damaged(step, error) from error

    def _json(self, step: int) -> dict[str, Any]:
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(extra=self._ocp.args.JsonRestore()))["extra"]
        except Exception as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> CheckpointError:
        older = [s for s in self.steps() if s < step]
        way = f"remove that folder to go on from step {older[-1]}" if older else "there is no earlier one; start again in another folder"
        return CheckpointError(f"{self.folder / str(step)}: the checkpoint is damaged ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}); {way}")

    def _compare(self, step: int, stored: dict[str, list], wanted: dict[str, list]) -> None:
        where, way = f"{self.folder / str(step)}: a checkpoint of another model or optimiser", "use another folder, or the configuration it was made with"
        for name, (shape, dtype) in wanted.items():
            if name not in stored:
                raise CheckpointError(f"{where}: it has no {name!r} {tuple(shape)}; {way}")
            if stored[name] != [shape, dtype]:
                raise CheckpointError(f"{where}: {name!r} is {tuple(stored[name][0])} {stored[name][1]}, this run wants {tuple(shape)} {dtype}; {way}")
        for name in stored:
            if name not in wanted:
                raise CheckpointError(f"{where}: it has {name!r} {tuple(stored[name][0])}, which this run has not; {way}")


def placed(x: Any, original: Any) -> Any:
    """Where a restored array goes: the sharding asked for, else the first device."""
    sharding = getattr(x, "sharding", None) or getattr(original, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.Sharding) else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


class full_disk:
    """Turns errors of a full disk into one clear line that names the folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        cause = error
        while cause is not None:
            if is_full(cause):
                raise CheckpointError(f"{self.folder}: the disk is full, this checkpoint could not be written; the earlier ones are intact. Free some space") from error
            cause = cause.__cause__ or cause.__context__
