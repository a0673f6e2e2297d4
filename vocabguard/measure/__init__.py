"""Pure numbers: drift, exposure, never-trained rows, probe. They know no trainer and no tokenizer."""
