"""mBART and mBART-50 (Liu et al. 2020; Tang et al. 2020): BART on many languages, with its norms before the sublayers."""
from llmjax.checkpoint.families import bart

FAMILY = bart.family("mbart", "MBart", before=True)
