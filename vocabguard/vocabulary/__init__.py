"""What a tokenizer's ids are: script groups, special, reachable and padded rows."""
