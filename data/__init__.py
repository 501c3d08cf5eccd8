"""Text and rows: the Reka chat format, tokenizer loading, row sources and layouts. Imports no torch."""
