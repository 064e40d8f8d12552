"""Meshes and the rules that place every array on them."""

from smoljax.parallel.mesh import AXES, MeshConfig, make_mesh
from smoljax.parallel.rules import (
    RULES,
    active,
    batch_sharding,
    check_batch,
    check_sequence,
    local_rows,
    param_shardings,
    put_batch,
)

__all__ = [
    "AXES",
    "RULES",
    "MeshConfig",
    "active",
    "batch_sharding",
    "check_batch",
    "check_sequence",
    "local_rows",
    "make_mesh",
    "param_shardings",
    "put_batch",
]
