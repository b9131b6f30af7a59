"""Every option, in one frozen tree that is validated once.

The tree is the `args` of both Serve applications in a YAML file under configs/. Python defaults are those published
for Wan2.2-T2V-A14B; a YAML file states what differs. Knows nothing of Ray: `serve_app.app` turns the tree into
deployments.
"""

from serve_app.config.file import load_file, variables
from serve_app.config.finisher import FinisherConfig
from serve_app.config.gateway import AuthConfig, GatewayConfig, is_loopback
from serve_app.config.jobs import (
    AdmissionConfig,
    Ageing,
    CanaryConfig,
    DegradeConfig,
    DispatcherConfig,
    QueueConfig,
    RetentionConfig,
    StoreConfig,
)
from serve_app.config.model import LONGEST_SIDE, Defaults, Limits, ModelConfig
from serve_app.config.notifications import MailConfig, WebhooksConfig, is_mail_address
from serve_app.config.paths import below, home_of, placed
from serve_app.config.stages import (
    Autoscaling,
    DecoderConfig,
    DenoiserConfig,
    EncoderConfig,
    ParallelConfig,
    PipelineConfig,
    Resources,
)
from serve_app.config.storage import StorageConfig
from serve_app.config.tree import Config, validate
from serve_app.parameters import WAN_NEGATIVE_PROMPT, Priority

__all__ = [
    "LONGEST_SIDE",
    "WAN_NEGATIVE_PROMPT",
    "AdmissionConfig",
    "Ageing",
    "AuthConfig",
    "Autoscaling",
    "CanaryConfig",
    "Config",
    "DecoderConfig",
    "Defaults",
    "DegradeConfig",
    "DenoiserConfig",
    "DispatcherConfig",
    "EncoderConfig",
    "FinisherConfig",
    "GatewayConfig",
    "Limits",
    "MailConfig",
    "ModelConfig",
    "ParallelConfig",
    "PipelineConfig",
    "Priority",
    "QueueConfig",
    "Resources",
    "RetentionConfig",
    "StorageConfig",
    "StoreConfig",
    "WebhooksConfig",
    "below",
    "home_of",
    "is_loopback",
    "is_mail_address",
    "load_file",
    "placed",
    "validate",
    "variables",
]
