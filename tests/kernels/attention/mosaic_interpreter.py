"""JAX's interpreter of Mosaic GPU kernels, taught two things that jax 0.10 leaves out.

Matrix products take factors that are transposed in shared memory, or lie in registers; and the program of a kernel's threads is
compiled once, and not for every thread of every block.
"""

import contextlib
import threading

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, params
from jax._src.state.types import TransposeTransform


@contextlib.contextmanager
def interpreted():
    """Runs the kernels called inside on the CPU, and fails where two threads race for shared memory."""
    before = gpu_callbacks.wgmma, thread_map._run_jaxpr
    gpu_callbacks.wgmma, thread_map._run_jaxpr = _wgmma, _run_thread
    try:
        with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
            yield
        assert not interpret_pallas_call.get_races().races_found
    finally:
        gpu_callbacks.wgmma, thread_map._run_jaxpr = before


_threads = {}
_compiling = threading.Lock()


def _run_thread(jaxpr, consts, *args):
    with _compiling:
        if id(jaxpr) not in _threads:
            program = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
            # The jaxpr is kept, so that no other gets its id.
            _threads[id(jaxpr)] = jaxpr, program.lower(consts, *args).compile()
    _threads[id(jaxpr)][1](consts, *args)


def _wgmma(*, token, device_id, grid_point_coords, thread_id, acc_dtype, source_info=None, **refs):
    memory = gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))
    where = gpu_callbacks.interpret_utils.GPULoggingInfo(
        device_id=int(device_id),
        grid_point_coords=tuple(int(x) for x in grid_point_coords),
        thread_id=int(thread_id),
        source_info=source_info,
    )

    def place(name):
        transforms = gpu_callbacks._remove_noop_transforms(refs[f"{name}_transforms"])
        turns = [t for t in transforms if isinstance(t, TransposeTransform)]
        others = tuple(t for t in transforms if not isinstance(t, TransposeTransform))
        key = gpu_callbacks.HostAllocationKey.from_array(refs[f"{name}_allocation_key_as_array"])
        return key, gpu_callbacks.interpret_utils.to_range(jax.tree.map(int, others)), turns

    def read(name):
        array = np.asarray(refs[f"{name}_allocation_key_as_array"])
        if array.ndim == 1:  # The key of an allocation; else the factor itself.
            key, part, turns = place(name)
            array = memory.get_buffer_content(key, part, thread, logging_info=where)[0]
            for turn in turns:
                array = np.transpose(array, turn.permutation)
        return array.astype(acc_dtype)

    key, part, _ = place("acc")
    sums = read("acc") + read("a") @ read("b")
    memory.store_buffer_content(key, part, sums, thread, logging_info=where)
    return token
