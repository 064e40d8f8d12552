"""Tokenizer and token shards: the one contract that curation and the input pipeline share."""
