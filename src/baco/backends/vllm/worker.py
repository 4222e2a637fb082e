"""vLLM's workers with a pair's model runner; `baco.backends.vllm.configuration` sets them."""

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from baco.backends.vllm.runner import PairRunner


class GpuPairRunner(PairRunner, GPUModelRunner):
    """On accelerators."""


class PairWorker(Worker):
    """On accelerators."""

    def init_device(self) -> None:
        """As in vLLM; the model runner becomes a pair's."""
        super().init_device()
        # vLLM fixes the class of its runner inside this method; a subclass without attributes of
        # its own can be set afterwards.
        self.model_runner.__class__ = GpuPairRunner
        self.model_runner.init_pair()


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker

    class CpuPairRunner(PairRunner, CPUModelRunner):
        """On CPUs."""

    class CpuPairWorker(CPUWorker):
        """On CPUs."""

        def init_device(self) -> None:
            """As `PairWorker.init_device`."""
            super().init_device()
            self.model_runner.__class__ = CpuPairRunner
            self.model_runner.init_pair()
