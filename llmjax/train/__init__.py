"""The train state, the one step, the one loop, optimisers, metrics."""
from llmjax.train.evaluate import evaluate
from llmjax.train.flops import flops_per_token, peak_flops
from llmjax.train.guard import TrainingStopped, Watch
from llmjax.train.loggers import Console, JsonLines, TensorBoard, read_rows
from llmjax.train.loop import Loop, run
from llmjax.train.optimizers import make_optimizer, make_schedule
from llmjax.train.plots import plot_losses
from llmjax.train.state import State, abstract, init
from llmjax.train.step import make_step

__all__ = ["Console", "JsonLines", "Loop", "State", "TensorBoard", "TrainingStopped", "Watch", "abstract", "evaluate", "flops_per_token", "init", "make_optimizer", "make_schedule",
           "make_step", "peak_flops", "plot_losses", "read_rows", "run"]
