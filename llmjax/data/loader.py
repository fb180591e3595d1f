"""The training loader: Grain reads whole batches ahead in a thread (an element costs Grain about 40 µs, so an element is a batch; a second
thread made it slower). Its state is one step number."""
from llmjax.core.errors import DataError


class _Steps:
    """Grain's random-access source: step -> this process' batch."""

    def __init__(self, split, batch_size: int, process_index: int, process_count: int):
        self._args = split, batch_size, process_index, process_count

    def __len__(self) -> int:
        return 1 << 40  # training ends by steps, not by data

    def __getitem__(self, step):
        split, batch_size, process_index, process_count = self._args
        return split.batch(int(step), batch_size, process_index, process_count)


class Loader:
    """An endless iterator of batches. `get_state()` is JSON and says where the next one comes from; after `set_state` the same batches follow, bit for bit, on any number of
    processes."""

    def __init__(self, split, batch_size: int, start_step: int, process_index: int, process_count: int, prefetch: int):
        """Raises ConfigError where batch_size does not divide over the processes."""
        import grain

        from llmjax.data.dataset import _share
        _share(batch_size, process_index, process_count)
        source = grain.MapDataset.source(_Steps(split, batch_size, process_index, process_count))
        self._identity = dict(data=split.fingerprint, batch_size=batch_size)
        self._dataset = source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch))
        self._start(start_step)

    def _start(self, step: int):
        self._iterator = iter(self._dataset)
        self._iterator.set_state({"next_index": step})

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._iterator)

    def get_state(self) -> dict:
        """{"step": of the next batch, "data": which contents and order, "batch_size"}."""
        return dict(step=int(self._iterator.get_state()["next_index"]), **self._identity)

    def set_state(self, state: dict) -> None:
        """Raises DataError where the state belongs to other data, another order or another batch size."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                what = "other data, another seed or another context" if name == "data" else f"batch_size {state.get(name)}"
                raise DataError(f"the saved loader state belongs to {what} (now {name} {value}): go on with the configuration of the run that saved it")
        self._start(int(state["step"]))
