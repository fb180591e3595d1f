"""XLM-R (Conneau et al. 2020) and what says model_type "xlm-roberta": multilingual E5, BGE-M3. RoBERTa on a hundred languages, under other class names."""
from llmjax.checkpoint.families import roberta

FAMILY = roberta.family("xlm-roberta", "XLMRoberta")
