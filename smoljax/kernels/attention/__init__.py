"""Causal, segmented, grouped-query attention: reference.py, one file per backend, api.py picks."""
