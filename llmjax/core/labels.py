"""One label per weight: which axes it has and which of them are summed over.

    "embed -> heads head_dim"      a matrix from embed to heads × head_dim
    "expert | embed -> mlp"        one such matrix per expert
    "norm"                         a vector: no contraction

Initialisation fan-in, sharding, LoRA's split, quantisation axes, Muon's matrix view and weight decay all read it; there is no second table.
"""
from __future__ import annotations

import dataclasses as dc
import functools


@dc.dataclass(frozen=True)
class Label:
    """Axis names in the order of the array's dimensions: batch axes (one matrix per index), contracted axes, produced axes."""
    batch: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        return self.batch + self.inputs + self.outputs

    @property
    def is_matrix(self) -> bool:
        return bool(self.inputs)

    def dims(self, role: str) -> tuple[int, ...]:
        """Dimension numbers of 'batch', 'inputs' or 'outputs'."""
        names = getattr(self, role)
        start = {"batch": 0, "inputs": len(self.batch), "outputs": len(self.batch) + len(self.inputs)}[role]
        return tuple(range(start, start + len(names)))

    def stacked(self, axis: str = "layer") -> Label:
        """The label of the same weight with one more leading batch axis."""
        return dc.replace(self, batch=(axis, *self.batch))

    def __str__(self):
        lead = f"{' '.join(self.batch)} | " if self.batch else ""
        return lead + (f"{' '.join(self.inputs)} -> {' '.join(self.outputs)}" if self.inputs else " ".join(self.outputs))


@functools.cache
def parse(text: str) -> Label:
    """"layer expert | embed -> mlp" -> Label(batch=("layer", "expert"), inputs=("embed",), outputs=("mlp",))."""
    lead, _, rest = text.rpartition("|")
    inputs, arrow, outputs = rest.partition("->")
    if not arrow:
        inputs, outputs = "", rest
    return Label(tuple(lead.split()), tuple(inputs.split()), tuple(outputs.split()))
