"""The chips a plan may be made for, and the topologies they come in. Published figures; nothing here was measured.

Memory and bandwidths are the makers' (cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each version; NVIDIA's data sheets of A100 80 GB SXM,
H100 SXM, H200 SXM, B200). `link` is what one chip can send, one way, over all its links: of a TPU "How to scale your model" (jax-ml.github.io/scaling-book, chapter 2: 4.5e10 or 9e10 B/s a
link, 4 links in a plane, 6 in space), of a GPU half of NVLink's two-way figure. `network` is the way out of the slice or the node. `price` is Google's list price in US dollars a
chip-hour on demand (cloud.google.com/tpu/pricing, us regions, 2025); where prices are the provider's affair there is none, and `--price` gives it.
"""
from __future__ import annotations

import dataclasses as dc
import math
import re

from llmjax.core import ConfigError, nearest
from llmjax.train.flops import PEAKS


@dc.dataclass(frozen=True)
class Chip:
    """One chip. flops: dense bfloat16 FLOP/s; hbm: bytes; bandwidth: of HBM, bytes/s; link, network: see the module; pod: the longest torus, or () where chips stand in nodes of `node`.
    devices: how many devices jax sees of a chip, each with its part of everything. ask: how libtpu's topologies call it."""
    flops: float
    hbm: float
    bandwidth: float
    link: float
    network: float
    pod: tuple[int, ...] = ()
    node: int = 4
    devices: int = 1
    price: float | None = None
    ask: str | None = None

    def share(self, what: str) -> float:
        """`what` of one device."""
        return getattr(self, what) / self.devices


GIB = 2.0 ** 30
CHIPS: dict[str, Chip] = {
    "v4": Chip(PEAKS["TPU v4"], 32 * GIB, 1.2e12, 6 * 4.5e10, 6.25e9, (16, 16, 16), price=3.22, ask="v4"),
    "v5e": Chip(PEAKS["TPU v5e"], 16 * GIB, 8.1e11, 4 * 4.5e10, 3.125e9, (16, 16), price=1.20, ask="v5e"),
    "v5p": Chip(PEAKS["TPU v5p"], 95 * GIB, 2.76e12, 6 * 9e10, 6.25e9, (16, 16, 24), price=4.20, ask="v5"),
    "v6e": Chip(PEAKS["TPU v6e"], 32 * GIB, 1.64e12, 4 * 9e10, 1.25e10, (16, 16), price=2.70, ask="v6e"),
    "7x": Chip(2 * PEAKS["TPU7x"], 192 * GIB, 7.38e12, 6 * 9e10, 1.25e10, (16, 16, 36), devices=2, ask="tpu7x"),
    "a100": Chip(PEAKS["A100"], 80e9, 2.04e12, 3.0e11, 2.5e10, node=8),
    "h100": Chip(PEAKS["H100"], 80e9, 3.35e12, 4.5e11, 5.0e10, node=8),
    "h200": Chip(PEAKS["H200"], 141e9, 4.8e12, 4.5e11, 5.0e10, node=8),
    "b200": Chip(PEAKS["B200"], 180e9, 8.0e12, 9.0e11, 5.0e10, node=8),
}
PLANE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))                    # v5e and v6e are let in these shapes
SMALL = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))                                 # of a torus in space, below its cubes of 4 × 4 × 4


@dc.dataclass(frozen=True)
class Topology:
    """chip: its name. shape: the torus, or (nodes, GPUs in each). slices: how many such tori there are, joined by the network alone."""
    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * CHIPS[self.chip].devices

    @property
    def is_tpu(self) -> bool:
        return bool(CHIPS[self.chip].pod)

    @property
    def name(self) -> str:
        return (f"{self.slices}x" if self.slices > 1 else "") + f"{self.chip}:{'x'.join(map(str, self.shape))}"


def shapes(chip: str) -> list[tuple[int, ...]]:
    """The slices a TPU is let in, the smallest first: of a torus in space every a ≤ b ≤ c of fours within the pod."""
    pod = CHIPS[chip].pod
    if len(pod) == 2:
        return list(PLANE)
    cubes = [(a, b, c) for a in range(4, pod[0] + 1, 4) for b in range(a, pod[1] + 1, 4) for c in range(b, pod[2] + 1, 4)]
    return [*SMALL, *sorted(cubes, key=lambda s: (math.prod(s), s[2] - s[0]))]


def topology(text: str) -> Topology:
    """"v5p:4x4x8", or by count as the cloud names slices: "v5e-256" (chips), "v5p-128" (cores: two in a chip of v4 and v5p); "2xv5e-256", two of them; "h100:8", "h100:4x8" (nodes × GPUs) -> Topology.
    Raises ConfigError for one that does not exist, with the names of those that do."""
    found = re.fullmatch(r"(?:([0-9]+)x(?=[a-z0-9]))?([a-z0-9]+?)(?::([0-9]+(?:x[0-9]+)*)|-([0-9]+))", text.strip().lower())
    slices, chip, given, many = found.groups() if found else ("", text.split(":")[0].split("-")[0], "", "")
    chip = chip.removeprefix("tpu")
    if chip not in CHIPS:
        raise ConfigError(f"--topology={text}: there is no chip {chip!r} in the table" + nearest(chip, CHIPS) + f"; topologies: {names()}")
    if not found:
        raise ConfigError(f"--topology={text}: a chip and a shape are wanted, as in v5p:4x4x8 or h100:2x8; topologies: {names(chip)}")
    if slices is not None and (int(slices) < 1 or not CHIPS[chip].pod):
        raise ConfigError(f"--topology={text}: {slices}x says how many slices of TPUs; of GPUs give nodes, as in {names(chip)}" if int(slices) else f"--topology={text}: 0 slices")
    if not CHIPS[chip].pod:
        return gpus(text, chip, [int(n) for n in (given or many or "").split("x")])
    known = shapes(chip)
    if many:
        count = int(many) // (2 if chip in ("v4", "v5p") else 1)
        shape = next((s for s in known if math.prod(s) == count), ())
    else:
        shape = tuple(int(n) for n in (given or "").split("x"))
        shape += (1,) * (len(CHIPS[chip].pod) - len(shape))
    if shape not in known:
        raise ConfigError(f"--topology={text}: there is no such slice of {chip}; {names(chip)}")
    return Topology(chip, shape, int(slices or 1))


def gpus(text: str, chip: str, numbers: list[int]) -> Topology:
    node = CHIPS[chip].node
    if len(numbers) == 1:
        numbers = [1, numbers[0]] if numbers[0] < node else [numbers[0] // node, node] if numbers[0] % node == 0 else []
    if len(numbers) != 2 or numbers[0] < 1 or numbers[1] not in (1, 2, 4, 8):
        raise ConfigError(f"--topology={text}: {names(chip)}")
    return Topology(chip, (numbers[0], numbers[1]))


def names(chip: str | None = None) -> str:
    """What there is, for an error message."""
    if chip is None:
        return "; ".join(f"{c}: " + names(c) for c in CHIPS)
    if not CHIPS[chip].pod:
        return f"{chip}:1, {chip}:2, {chip}:4, {chip}:8 and whole nodes, {chip}:NODESx{CHIPS[chip].node}"
    known = shapes(chip)
    listed = ", ".join("x".join(map(str, s)) for s in known[:10])
    return listed + (f" and larger ones of fours up to {'x'.join(map(str, CHIPS[chip].pod))}" if len(known) > 10 else "")
