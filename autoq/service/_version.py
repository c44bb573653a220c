"""autoq's version; the package itself would bring the client along, which the service must not know."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("autoq")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "0+unknown"
