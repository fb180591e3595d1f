"""What a run will take before a chip is paid for: figures of a model, memory and traffic of a run on chips, its time and cost, scaling laws, the TPU compiler's own word."""
