"""The dashboards: overview for whoever is on call, queue, engine, API."""

from __future__ import annotations

from cluster.observability.expressions import (
    by_reason,
    failed_share,
    increase,
    largest,
    mean,
    of,
    quantile,
    rate,
    total,
)
from cluster.observability.panels import Dashboard, Panel, Row, Target, lines, number

_BY_CLASS = "{{priority}}"
_HOST = "{{NodeAddress}}"

_ended = lines(
    "Jobs ended per hour, by reason",
    (by_reason(3600, "wan_jobs_ended_total"), "{{reason}}"),
    sentence="Everything but completed, cancelled and deadline_exceeded is a fault of the service.",
)
_waiting = lines("Jobs that wait", (largest("wan_queued_jobs", "priority"), _BY_CLASS), stack=True)
_oldest = lines(
    "Longest wait",
    (largest("wan_oldest_wait_seconds", "priority"), _BY_CLASS),
    unit="s",
    sentence="Grows by a second each second while the oldest job of a class does not begin.",
)
_stages = lines(
    "Mean seconds of each stage",
    (mean("wan_stage_seconds", "stage"), "{{stage}}"),
    unit="s",
    stack=True,
    sentence="Of the videos that were completed.",
)
_deliveries = lines(
    "Deliveries per minute",
    (f"60 * {rate('wan_deliveries_total', 'kind', 'outcome')}", "{{kind}} {{outcome}}"),
    sentence="Webhooks and mails. given_up: nobody will be told any more.",
)
_refused = lines(
    "Refused creates per minute, by reason",
    (by_reason(60, "wan_jobs_refused_total"), "{{reason}}"),
)
_attempts = lines(
    "Failed attempts per hour, by reason",
    (by_reason(3600, "wan_attempts_failed_total"), "{{reason}}"),
    sentence="Most are tried again. group_lost and worker_lost are processes that died.",
)
_replicas = lines(
    "Processes of each deployment",
    ("sum by (deployment) (ray_serve_deployment_replica_healthy)", "{{deployment}}"),
    sentence="Healthy replicas as Serve's controller sees them.",
)


def _alive(title: str, expression: str, sentence: str) -> Panel:
    return number(title, expression, sentence=sentence, red_below=1)


OVERVIEW = Dashboard(
    "serve-app-overview",
    "serve_app: overview",
    "Is the service well, and if not, which part of it?",
    (
        Row(
            "Now",
            (
                number(
                    "Completed in the last hour", increase(of("wan_jobs_ended_total", reason="completed"), window="1h")
                ),
                number(
                    "Failed by us, last hour",
                    f"({failed_share('1h')}) >= 0 or vector(0)",
                    "percentunit",
                    red_above=0.01,
                    sentence="Share of the jobs that ended, without those that their owner or deadline ended.",
                ),
                number("Jobs that wait", f"sum({largest('wan_queued_jobs', 'priority')})"),
                number("Jobs that run", largest("wan_running_jobs")),
                number("Denoiser groups", "count(ray_wan_resident_samples)", red_below=1),
                number("Longest wait", f"max({largest('wan_oldest_wait_seconds', 'priority')})", "s"),
                _alive("Job store", largest("wan_store_reachable"), "1 while a dispatcher reaches the database."),
                _alive("Storage", largest("wan_storage_usable"), "1 while videos could be stored."),
                _alive("Intake", "min(ray_wan_intake_open)", "1 while every gateway accepts jobs."),
                number(
                    "Paused", largest("wan_paused"), red_above=1, sentence="1 while an operator has paused the queue."
                ),
                number("Free storage", "min(ray_wan_free_storage_bytes)", "bytes", sentence="Empty for a bucket."),
                number(
                    "Work before us",
                    f"{largest('wan_queued_work_seconds')} or vector(0)",
                    "s",
                    sentence="Seconds until all waiting and running jobs are done, at the pace of the last ones.",
                ),
            ),
        ),
        Row("Jobs", (_ended, _waiting, _oldest, _stages, _attempts, _refused)),
        Row("Surroundings", (_replicas, _deliveries)),
    ),
)

QUEUE = Dashboard(
    "serve-app-queue",
    "serve_app: queue and admission",
    "How much work waits, how long does it wait, and who is turned away?",
    (
        Row(
            "Waiting",
            (
                _waiting,
                lines("Work that waits", (largest("wan_queued_work_tflop", "priority"), _BY_CLASS), stack=True),
                _oldest,
                lines(
                    "Seconds of work",
                    (f"{largest('wan_queued_work_seconds')} or vector(0)", "waiting and running"),
                    unit="s",
                    sentence="At the pace of the last 50 jobs; 0 before the first has completed.",
                ),
                lines(
                    "Wait until the first attempt",
                    (quantile(0.5, "wan_job_wait_seconds", "priority"), "p50 {{priority}}"),
                    (quantile(0.95, "wan_job_wait_seconds", "priority"), "p95 {{priority}}"),
                    unit="s",
                ),
                lines("Jobs that run", (largest("wan_running_jobs"), "running")),
            ),
        ),
        Row(
            "Coming and going",
            (
                lines(
                    "Created per minute",
                    (f"60 * {rate('wan_jobs_created_total', 'priority')}", _BY_CLASS),
                    stack=True,
                ),
                lines("Created per minute, by size", (f"60 * {rate('wan_jobs_created_total', 'size')}", "{{size}}")),
                _ended,
                _refused,
                _attempts,
                lines(
                    "Run time of completed jobs",
                    (quantile(0.5, "wan_job_run_seconds", "size"), "p50 {{size}}"),
                    (quantile(0.95, "wan_job_run_seconds", "size"), "p95 {{size}}"),
                    unit="s",
                ),
            ),
        ),
    ),
)

ENGINE = Dashboard(
    "serve-app-engine",
    "serve_app: engine and GPUs",
    "What do the denoiser groups do, how fast, and in how much memory?",
    (
        Row(
            "Steps",
            (
                lines("Steps per second", (rate("wan_step_seconds_count", "expert"), "{{expert}}"), stack=True),
                lines(
                    "Seconds of a step",
                    (quantile(0.5, "wan_step_seconds", "size"), "p50 {{size}}"),
                    (quantile(0.95, "wan_step_seconds", "size"), "p95 {{size}}"),
                    unit="s",
                ),
                lines(
                    "Samples in a step",
                    (f"{rate('wan_stepped_samples_total')} / {rate('wan_step_seconds_count')}", "batch size"),
                ),
                lines(
                    "TFLOP/s",
                    (rate("wan_work_tflop_total"), "all groups"),
                    sentence="Divided by the peak of the GPUs it is their utilisation.",
                ),
                lines(
                    "Time between steps",
                    (
                        f"{rate('wan_step_overhead_seconds_total')} / ({rate('wan_step_overhead_seconds_total')}"
                        f" + {rate('wan_step_seconds_sum')})",
                        "share of the loop",
                    ),
                    unit="percentunit",
                ),
                _stages,
            ),
        ),
        Row(
            "Samples",
            (
                lines("Samples with a place", (total("wan_resident_samples", "WorkerId"), "{{WorkerId}}"), stack=True),
                lines("Samples that wait for a place", (total("wan_waiting_samples", "WorkerId"), "{{WorkerId}}")),
                lines("State off the device", (total("wan_parked_samples", "WorkerId"), "{{WorkerId}}")),
            ),
        ),
        Row(
            "Memory and health",
            (
                lines(
                    "Memory of the largest rank",
                    (largest("wan_rank_memory_bytes", "component"), "{{component}}"),
                    unit="bytes",
                    sentence="process: host memory; tensors: on the GPU; weights: the experts' part of them.",
                ),
                lines(
                    "Steps that did not fit, per hour",
                    (f"3600 * {rate('wan_steps_out_of_memory_total')}", "out of memory"),
                ),
                lines("GPU-seconds per second", (rate("wan_gpu_seconds_total"), "of completed jobs")),
                lines(
                    "GPU utilisation",
                    Target("avg by (NodeAddress) (ray_node_gpus_utilization)", _HOST, gpu=True),
                    unit="percent",
                    sentence="As the driver tells it: the share of time in which any kernel ran.",
                ),
                lines(
                    "GPU memory",
                    Target("sum by (NodeAddress) (ray_node_gram_used) * 1048576", _HOST, gpu=True),
                    unit="bytes",
                ),
                lines("Host memory", ("sum by (NodeAddress) (ray_node_mem_used)", _HOST), unit="bytes"),
                lines("Host CPU", ("avg by (NodeAddress) (ray_node_cpu_utilization)", _HOST), unit="percent"),
                _replicas,
            ),
        ),
    ),
)

API = Dashboard(
    "serve-app-api",
    "serve_app: API",
    "What do clients ask, how long do they wait for an answer, and what do they get?",
    (
        Row(
            "Requests",
            (
                lines(
                    "Requests per second, by route", (rate("wan_http_requests_total", "route"), "{{route}}"), stack=True
                ),
                lines(
                    "Requests per second, by status",
                    (rate("wan_http_requests_total", "status"), "{{status}}"),
                    stack=True,
                ),
                lines(
                    "Share of 5xx",
                    (
                        f"({rate(of('wan_http_requests_total', status='5xx'))} or vector(0))"
                        f" / {rate('wan_http_requests_total')}",
                        "5xx",
                    ),
                    unit="percentunit",
                ),
                lines(
                    "Seconds until an answer",
                    (quantile(0.5, "wan_http_seconds"), "p50"),
                    (quantile(0.95, "wan_http_seconds"), "p95"),
                    (quantile(0.99, "wan_http_seconds"), "p99"),
                    unit="s",
                    sentence="Without files and streams of events, which last as long as they last.",
                ),
                lines("p95 by route", (quantile(0.95, "wan_http_seconds", "route"), "{{route}}"), unit="s"),
                _refused,
            ),
        ),
        Row(
            "Around it",
            (
                lines(
                    "Requests inside of the gateways",
                    ('sum(ray_serve_replica_processing_queries{deployment="gateway"})', "gateway"),
                    sentence="Serve's count, open streams included.",
                ),
                _deliveries,
                lines(
                    "Storage errors per minute",
                    (f"60 * {rate('wan_storage_errors_total', 'call')}", "{{call}}"),
                ),
                lines("Intake", ("min(ray_wan_intake_open)", "open")),
            ),
        ),
    ),
)

CANARY = Dashboard(
    "serve-app-canary",
    "serve_app: canary",
    "How many users does the canary have, and how did trials and copies end?",
    (
        Row(
            "Trial",
            (
                number("Share of the users", largest("wan_canary_percent"), "percent", sentence="0: no canary."),
                lines("Share of the users over time", (largest("wan_canary_percent"), "canary"), unit="percent"),
                lines(
                    "Trials ended per day",
                    (f"86400 * {rate('wan_canaries_ended_total', 'end')}", "{{end}}"),
                    sentence="By the dispatchers themselves; `wan-serve canary status` has the reason.",
                ),
                lines(
                    "Copies per hour, by how they compare",
                    (f"3600 * {rate('wan_shadows_total', 'outcome')}", "{{outcome}}"),
                    sentence="different: the pictures are not those of the stable pipeline although the revision is.",
                ),
                _attempts,
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, QUEUE, ENGINE, API, CANARY)
