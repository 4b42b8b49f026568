# ruff: noqa: D102 - TensorRT documents its methods
"""The part of TensorRT's Python API that is used here, as types: nothing else may be.

TensorRT 10, TensorRT 11 and TensorRT for RTX all have it; a test compares every name below with
what their bindings hold. With these types a use of anything else does not pass the type check, on
machines too where none of them can be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, SupportsInt

Shape = Sequence[int]


class Logger(Protocol):
    """``ILogger``: derived from, to hear what TensorRT says."""

    def log(self, severity: SupportsInt, msg: str) -> None: ...


class ProgressMonitor(Protocol):
    """``IProgressMonitor``: derived from, to watch a build and to stop it."""

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool: ...
    def phase_finish(self, phase_name: str) -> None: ...


class HostMemory(Protocol):
    """``IHostMemory``: ``bytes(…)`` copies it."""

    @property
    def nbytes(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


class NetworkTensor(Protocol):
    """``ITensor``: a tensor of a network's definition."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> object: ...


class NetworkDefinition(Protocol):
    """``INetworkDefinition``: what the parser fills."""

    @property
    def num_inputs(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    def get_input(self, index: int) -> NetworkTensor: ...
    def get_output(self, index: int) -> NetworkTensor: ...


class ParserError(Protocol):
    """``ParserError``: why a graph was not understood."""

    def desc(self) -> str: ...


class OnnxParser(Protocol):
    """``OnnxParser``: from an ONNX model to a network's definition."""

    @property
    def num_errors(self) -> int: ...
    def parse(self, model: bytes) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class OptimizationProfile(Protocol):
    """``IOptimizationProfile``: the shapes that an engine is made for."""

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None: ...  # noqa: A002


class TimingCache(Protocol):
    """``ITimingCache``: how long each kernel took; the next build need not measure it again."""

    def serialize(self) -> HostMemory: ...


class BuilderConfig(Protocol):
    """``IBuilderConfig``: how an engine is built."""

    progress_monitor: ProgressMonitor

    def clear_flag(self, flag: object) -> None: ...
    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...


class Builder(Protocol):
    """``Builder``: makes everything above, and the engine."""

    def create_network(self, flags: int) -> NetworkDefinition: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network(
        self, network: NetworkDefinition, config: BuilderConfig
    ) -> HostMemory | None: ...


class ExecutionContext(Protocol):
    """``IExecutionContext``: an engine ready to run at one shape."""

    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class CudaEngine(Protocol):
    """``ICudaEngine``: a plan that was loaded."""

    @property
    def num_io_tensors(self) -> int: ...
    @property
    def num_optimization_profiles(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_dtype(self, name: str) -> object: ...
    def get_tensor_shape(self, name: str) -> Shape: ...
    def create_execution_context(self) -> ExecutionContext | None: ...


class Runtime(Protocol):
    """``Runtime``: loads plans."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None: ...


class NetworkDefinitionCreationFlag(Protocol):
    """``NetworkDefinitionCreationFlag``: how a network's types are meant."""

    STRONGLY_TYPED: SupportsInt


class BuilderFlag(Protocol):
    """``BuilderFlag``: what the builder may do."""

    TF32: object


class DataType(Protocol):
    """``DataType``: of a tensor."""

    FLOAT: object
    HALF: object


class Module(Protocol):
    """The module itself: ``tensorrt`` or ``tensorrt_rtx``."""

    __version__: str
    # Any: both are derived from, which no type checker allows of what it cannot see
    ILogger: Any
    IProgressMonitor: Any
    NetworkDefinitionCreationFlag: NetworkDefinitionCreationFlag
    BuilderFlag: BuilderFlag
    DataType: DataType

    def Builder(self, logger: Logger) -> Builder: ...  # noqa: N802
    def OnnxParser(self, network: NetworkDefinition, logger: Logger) -> OnnxParser: ...  # noqa: N802
    def Runtime(self, logger: Logger) -> Runtime: ...  # noqa: N802


# What TensorRT for RTX has alone.


class RtxRuntimeConfig(Protocol):
    """``IRuntimeConfig``: how an engine runs."""

    cuda_graph_strategy: object
    dynamic_shapes_kernel_specialization_strategy: object


class RtxCudaEngine(Protocol):
    """``ICudaEngine`` with it."""

    def create_runtime_config(self) -> RtxRuntimeConfig: ...
    def create_execution_context(
        self, runtime_config: RtxRuntimeConfig
    ) -> ExecutionContext | None: ...


class CudaGraphStrategy(Protocol):
    """``CudaGraphStrategy``: whether TensorRT for RTX records CUDA graphs by itself."""

    WHOLE_GRAPH_CAPTURE: object


class DynamicShapesKernelSpecializationStrategy(Protocol):
    """``DynamicShapesKernelSpecializationStrategy``: when it compiles kernels for a shape."""

    EAGER: object


class RtxModule(Protocol):
    """The module ``tensorrt_rtx``."""

    ComputeCapability: object
    CudaGraphStrategy: CudaGraphStrategy
    DynamicShapesKernelSpecializationStrategy: DynamicShapesKernelSpecializationStrategy
