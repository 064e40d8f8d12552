"""Questions that take several runs to answer, with their statistics.

statistics.py      mean and interval over seeds
data_ablation.py   what each filter of a curation preset is worth: `python -m smoljax.curate --only=ablation`
"""
