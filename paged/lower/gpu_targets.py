"""Public facts of GPUs that programs are compiled for ahead of time, and how XLA's compiler is told them."""

import dataclasses

GPU_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
}
"""Options for ``jax.jit(step, compiler_options=paged.GPU_GRAPHS)``: XLA's default on one GPU, and loops.

On a GPU, a loop whose turns follow the batch is then a part of a CUDA graph: the GPU counts its turns, and the host
launches it once and waits for nothing. It was compiled, and never run on a GPU.
"""

# Facts that these GPUs share: threads of a warp and of a block, and the sizes of a grid.
_COMMON = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
"""


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """A GPU, as the compiler is told of it.

    * ``device_kinds``: the names that ``jax.Device.device_kind`` has for it.
    * ``capability``: its compute capability.
    * ``is_accelerated``: whether code may use what only this capability has, as ``sm_90a`` does.
    * ``multiprocessors``, ``lanes``: and the float32 units of each.
    * ``clock``: in GHz.
    * ``bytes_per_second``, ``l2_bytes``, ``memory_bytes``: of its memory.
    * ``shared_bytes``, ``shared_of_block``: shared memory of a multiprocessor, and the most of one block of threads.

    Source: openxla/xla, ``xla/backends/gpu/target_config/specs``: ``a100_sxm_80``, ``h100_sxm``, ``h200`` and ``b200``.
    """

    name: str
    device_kinds: tuple[str, ...]
    capability: tuple[int, int]
    is_accelerated: bool
    multiprocessors: int
    lanes: int
    clock: float
    bytes_per_second: int
    l2_bytes: int
    memory_bytes: int
    shared_bytes: int
    shared_of_block: int

    @property
    def text(self) -> str:
        """The facts as the text form of XLA's ``GpuTargetConfigProto``."""
        major, minor = self.capability
        extension = "ACCELERATED_FEATURES" if self.is_accelerated else "NONE"
        return f"""gpu_device_info {{{_COMMON}  shared_memory_per_core: {self.shared_bytes}
  shared_memory_per_block_optin: {self.shared_of_block}
  core_count: {self.multiprocessors}
  fpus_per_core: {self.lanes}
  memory_bandwidth: {self.bytes_per_second}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  platform_version: "Compute Capability {major}.{minor}"
  model_str: "sm_{major}.{minor} with {self.memory_bytes}B RAM, {self.multiprocessors} cores"
  name: "{self.device_kinds[0]}"
}}
platform_name: "CUDA"
device_description_str: "{self.device_kinds[0]}"
"""


GPU_TARGETS: dict[str, GpuTarget] = {
    target.name: target
    for target in (
        GpuTarget(
            *("a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-40GB"), (8, 0), False),
            *(108, 64, 1.41, 2_039_040_000_000, 41_943_040, 85_100_068_864, 167_936, 166_912),
        ),
        GpuTarget(
            *("h100", ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"), (9, 0), True),
            *(132, 128, 1.98, 3_352_320_000_000, 52_428_800, 84_942_979_072, 233_472, 232_448),
        ),
        GpuTarget(
            *("h200", ("NVIDIA H200",), (9, 0), True),
            *(132, 128, 1.98, 4_800_000_000_000, 52_428_800, 151_397_597_184, 233_472, 232_448),
        ),
        GpuTarget(
            *("b200", ("NVIDIA B200",), (10, 0), True),
            *(148, 128, 1.965, 7_672_320_000_000, 132_644_864, 191_514_411_008, 233_472, 232_448),
        ),
    )
}
