from tests.support.job_fixtures import *  # noqa: F403
