"""What is computed: transformer, families, checkpoints, tokenizer, chat template, sampling."""
