"""What a run will take before a chip is paid for: figures of a model, memory and traffic of a run on chips, its time and cost, scaling laws, the TPU compiler's own word."""
from llmjax.plan.chips import CHIPS, Chip, Topology, topology
from llmjax.plan.laws import Chinchilla, Kaplan
from llmjax.plan.report import Report, compiled, of_model, of_run
from llmjax.plan.runs import fit

__all__ = ["CHIPS", "Chinchilla", "Chip", "Kaplan", "Report", "Topology", "compiled", "fit", "of_model", "of_run", "topology"]
