from tests.jobs.notice.sending import endpoints, notify

__all__ = ["endpoints", "notify"]
