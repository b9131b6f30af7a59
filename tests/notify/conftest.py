from tests.support.job_fixtures import *  # noqa: F403
from tests.support.sending import endpoints, notify

__all__ = ["endpoints", "notify"]
