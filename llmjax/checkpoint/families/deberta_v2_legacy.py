"""DeBERTa's masked language model under BERT's tensor names, as transformers writes it unless told otherwise ("legacy")."""
from dataclasses import replace

from llmjax.checkpoint.families import deberta_v2

FAMILY = replace(deberta_v2.FAMILY, name=deberta_v2.LEGACY, table=deberta_v2.LEGACY_TABLE)
