"""Every test runs on eight fake CPU devices, refuses implicit rank promotion, compiles cheaply and keeps compiled programs on disk: compile time is most of the time."""
import os
import pathlib
import re

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
if "XLA_FLAGS" not in os.environ:              # a program of a thousand lines compiles in a third of the time; newer versions know the first of the two alone
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0" + (" --xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 11) else "")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


SLOW = [re.compile(".*".join(map(re.escape, line.split("*")))) for line in (pathlib.Path(__file__).parent / "slow.txt").read_text().splitlines() if not line.startswith("#")]


def pytest_collection_modifyitems(items):
    for item in items:
        if any(pattern.match(item.nodeid) for pattern in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """A file's programs are let go after it: each holds some hundred memory maps, of which a Linux process may have 65,530."""
    yield
    jax.clear_caches()
