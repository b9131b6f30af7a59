"""Every metric of the service, each with its name, kind, labels, buckets and a sentence.

A new metric is one more entry here and the call that records it. The reference page, the test of a live deployment and
the check of dashboards and alerts follow from this file. No label holds an id, a prompt, a key or a URL.
"""

from __future__ import annotations

from typing import get_args

from serve_app.metrics.metric import OTHER, Counter, Gauge, Histogram, Metric
from serve_app.parameters import Priority

PRIORITIES: tuple[str, ...] = get_args(Priority)
STAGES = ("encode", "denoise", "decode", "store", "finish")
COMPLETED = "completed"
# Error codes of jobs, as the reference page of errors lists them; a test compares the two.
ERROR_CODES = (
    "cancelled",
    "deadline_exceeded",
    "encode_failed",
    "encoder_lost",
    "step_failed",
    "not_finite",
    "out_of_memory",
    "group_lost",
    "poisonous",
    "no_latents",
    "decode_failed",
    "decoder_lost",
    "store_failed",
    "worker_lost",
    "lease_expired",
    "duplicate",
    "deleted",
    "internal_error",
)
REFUSALS = (
    "invalid_value",
    "unsupported",
    "idempotency_conflict",
    "queue_full",
    "queued_jobs",
    "gpu_seconds",
    "unavailable",
    OTHER,
)
# Sizes by the smallest standard frame that has as many pixels.
_SIZES = {"240p": 426 * 240, "360p": 640 * 360, "480p": 832 * 480, "720p": 1280 * 720, "1080p": 1920 * 1080}
SIZES = (*_SIZES, "larger")
# Routes whose answers last as long as a file or a job takes are counted, not timed.
ROUTES = ("create", "get", "list", "change", "content", "events", "webhooks", "models", "health", "page", OTHER)
STREAMED = ("content", "events")
STORAGE_CALLS = ("read", "write", "delete", "check")
# Ranks of a group beyond this many share the last label.
_RANKS = tuple(str(rank) for rank in range(64))

_JOB_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 21600)
_STEP_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
_STAGE_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)
_HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

# Jobs
jobs_created = Counter(
    "wan_jobs_created_total", "Jobs taken into the queue.", ["gateway"], {"priority": PRIORITIES, "size": SIZES}
)
jobs_refused = Counter(
    "wan_jobs_refused_total",
    "Create requests that were refused, by the error code of the answer.",
    ["gateway"],
    {"reason": REFUSALS},
)
jobs_ended = Counter(
    "wan_jobs_ended_total",
    "Jobs that ended for good: completed, or with this error code.",
    ["dispatcher", "gateway"],
    {"reason": (COMPLETED, *ERROR_CODES, OTHER), "priority": PRIORITIES},
)
attempts_failed = Counter(
    "wan_attempts_failed_total",
    "Attempts that failed with this error code, whether the job is tried again or not.",
    ["dispatcher"],
    {"reason": (*ERROR_CODES, OTHER)},
)
job_wait_seconds = Histogram(
    "wan_job_wait_seconds",
    "Seconds from a job's creation, or requested start, to its first attempt.",
    ["dispatcher"],
    _JOB_SECONDS,
    {"priority": PRIORITIES},
)
job_run_seconds = Histogram(
    "wan_job_run_seconds",
    "Seconds from the start of the last attempt of a completed job to its end.",
    ["dispatcher"],
    _JOB_SECONDS,
    {"size": SIZES},
)
stage_seconds = Histogram(
    "wan_stage_seconds",
    "Seconds that each stage of a completed job took.",
    ["dispatcher"],
    _STAGE_SECONDS,
    {"stage": STAGES, "size": SIZES},
)
gpu_seconds = Counter(
    "wan_gpu_seconds_total", "Seconds of denoising of completed jobs, times the ranks of a group.", ["dispatcher"]
)

# Queue
queued_jobs = Gauge("wan_queued_jobs", "Jobs that wait and could begin.", ["dispatcher"], {"priority": PRIORITIES})
queued_work_tflop = Gauge(
    "wan_queued_work_tflop", "TFLOP of denoising of the jobs that wait.", ["dispatcher"], {"priority": PRIORITIES}
)
oldest_wait_seconds = Gauge(
    "wan_oldest_wait_seconds",
    "Seconds that the oldest waiting job has waited; 0 if none waits.",
    ["dispatcher"],
    {"priority": PRIORITIES},
)
queued_work_seconds = Gauge(
    "wan_queued_work_seconds",
    "Seconds until the jobs that wait or run are done at the pace of the last ones; absent before the first is.",
    ["dispatcher"],
)
running_jobs = Gauge("wan_running_jobs", "Jobs that dispatchers work on.", ["dispatcher"])
paused = Gauge("wan_paused", "1 while an operator has paused the queue, else 0.", ["dispatcher"])

# Canaries
canary_percent = Gauge(
    "wan_canary_percent", "Share of owners whose new jobs a canary gets, in per cent; 0 without one.", ["dispatcher"]
)
canaries_ended = Counter(
    "wan_canaries_ended_total",
    "Trials of canaries that dispatchers have ended by themselves.",
    ["dispatcher"],
    {"end": ("aborted", "promoted")},
)
shadows = Counter(
    "wan_shadows_total",
    "Copies of jobs that a canary made, by how they compare with the originals.",
    ["dispatcher"],
    {"outcome": ("equal", "different", "other_revision", "failed")},
)

# Engine
step_seconds = Histogram(
    "wan_step_seconds",
    "Seconds of a denoising step on the ranks, which all samples in it share.",
    ["coordinator"],
    _STEP_SECONDS,
    {"size": SIZES, "expert": ("high_noise", "low_noise")},
)
stepped_samples = Counter(
    "wan_stepped_samples_total",
    "Samples in the steps that were made. Divided by the steps it is the batch size.",
    ["coordinator"],
)
step_overhead_seconds = Counter(
    "wan_step_overhead_seconds_total", "Seconds of the engine's loop between steps.", ["coordinator"]
)
work_tflop = Counter(
    "wan_work_tflop_total",
    "TFLOP of the steps that were made. Its rate over the peak of the group's GPUs is their utilisation.",
    ["coordinator"],
)
steps_out_of_memory = Counter(
    "wan_steps_out_of_memory_total", "Steps that did not fit into device memory.", ["coordinator"]
)
resident_samples = Gauge("wan_resident_samples", "Samples inside a denoiser group.", ["coordinator"])
parked_samples = Gauge(
    "wan_parked_samples",
    "Samples inside a denoiser group whose state left the device for the latest step.",
    ["coordinator"],
)
waiting_samples = Gauge("wan_waiting_samples", "Samples that wait for a place in a denoiser group.", ["coordinator"])
rank_memory_bytes = Gauge(
    "wan_rank_memory_bytes",
    "Memory of a rank: its process, its tensors on the GPU, and the weights among them.",
    ["coordinator"],
    {"rank": (*_RANKS, OTHER), "component": ("process", "tensors", "weights")},
)

# Surroundings
http_requests = Counter(
    "wan_http_requests_total",
    "Answers of the API, by kind of route and class of status.",
    ["gateway"],
    {"route": ROUTES, "status": ("2xx", "3xx", "4xx", "5xx", OTHER)},
)
http_seconds = Histogram(
    "wan_http_seconds",
    "Seconds until an answer of the API was complete. Files and streams of events are left out.",
    ["gateway"],
    _HTTP_SECONDS,
    {"route": tuple(route for route in ROUTES if route not in STREAMED)},
)
intake_open = Gauge(
    "wan_intake_open", "1 while a gateway accepts jobs, 0 while storage or the job store's disk forbid it.", ["gateway"]
)
store_reachable = Gauge("wan_store_reachable", "1 while a dispatcher reaches the job store, else 0.", ["dispatcher"])
storage_usable = Gauge("wan_storage_usable", "1 while videos could be stored, else 0.", ["dispatcher"])
free_storage_bytes = Gauge(
    "wan_free_storage_bytes",
    "Free space where videos are stored; absent for a bucket.",
    ["dispatcher"],
)
storage_errors = Counter(
    "wan_storage_errors_total",
    "Calls of the storage that it refused or did not answer, without files that are missing.",
    ["gateway", "dispatcher", "coordinator", "decoder"],
    {"call": STORAGE_CALLS},
)
deliveries = Counter(
    "wan_deliveries_total",
    "Tries to deliver a webhook or a mail: delivered, to be tried again, or given up.",
    ["dispatcher"],
    {"kind": ("webhook", "mail"), "outcome": ("delivered", "again", "given_up")},
)

METRICS: tuple[Metric, ...] = tuple(one for one in list(globals().values()) if isinstance(one, Metric))


def size_of(width: int, height: int) -> str:
    """Return the label of a video's size: the smallest standard frame with as many pixels, `480p` for 832x480."""
    pixels = width * height
    return next((name for name, most in _SIZES.items() if pixels <= most), "larger")
