"""What text and rows look like: the Reka chat format, tokenizer loading, row sources. Imports no torch."""
