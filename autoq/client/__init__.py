"""A Python client of the service: the same searches and plans, on a machine of somebody else's.

Loads neither torch nor the search; replies are the types of `autoq.wire`, refusals the exceptions
of `autoq.errors`.
"""

from autoq.client._client import Client
from autoq.client._failures import JobCancelledError, UnreachableError
from autoq.client._job import JobHandle

__all__ = ["Client", "JobCancelledError", "JobHandle", "UnreachableError"]
