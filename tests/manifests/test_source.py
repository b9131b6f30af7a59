"""Files that cannot work in Pods are refused in one line, and the command says what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.errors import ConfigError
from serve_app.manifests.source import read

Content = dict[str, Any]
Change = Callable[[Content, Content], object]


def put(section: str, **options: Any) -> Change:
    return lambda content, args: args.setdefault(section, {}).update(options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("store", url=""), "store.url has value '', expected PostgreSQL"),
        (put("store", url="postgresql://wan:secret@db/wan"), "store.url has value 'postgresql://wan:***@db/wan'"),
        (put("store", url="postgresql://db/wan?password=secret"), "it belongs into the Secret, as PGPASSWORD"),
        (put("queue", url="amqp://wan:secret@mq/wan"), "queue.url has value 'amqp://wan:***@mq/wan', expected no"),
        (lambda content, args: args.update(storage={}), "storage.url has value '', expected s3://bucket/prefix"),
        (put("model", path="models/a14b"), "model.path has value 'models/a14b', expected an absolute path"),
        (put("model", path="/a14b"), "model.path has value '/a14b', expected a folder below another"),
        (lambda content, args: content.update(proxy_location="Disabled"), "proxy_location has value 'Disabled'"),
        (lambda content, args: content["applications"].pop(), "applications are serve_app.app:wan, expected"),
        (lambda content, args: content["applications"][0].update(import_path="x:y"), "import_path has value 'x:y'"),
    ],
)  # fmt: skip
def test_refused(file: Callable[..., Path], change: Change, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(file(change))
    assert message in str(refused.value) and "secret" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_gateway_without_keys_is_refused(file: Callable[..., Path]) -> None:
    def change(content: Content, args: Content) -> None:
        content["http_options"]["host"] = "127.0.0.1"
        args["auth"] = {"mode": "none"}

    with pytest.raises(ConfigError, match=r"auth\.mode has value 'none', expected 'keys'"):
        read(file(change))


def test_files_of_certificates_are_named(file: Callable[..., Path]) -> None:
    notes = read(file(put("webhooks", ca_file="/etc/ours.pem"))).notes
    assert "webhooks.ca_file has value '/etc/ours.pem': mount it into all Pods, or build it into the image" in notes


def test_mail_needs_its_password(file: Callable[..., Path]) -> None:
    mail = {"host": "smtp.internal", "sender": "wan@example.com", "user": "wan"}
    secrets = read(file(lambda content, args: args.update(mail=mail))).secrets
    assert "WAN_SERVE_MAIL_PASSWORD" in [one.variable for one in secrets]


def test_the_command_says_what_it_wrote(file: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = CliRunner().invoke(cli, ["manifests", "--config", str(file()), "--gpus-per-node", "8", "-o", str(out)])
    assert said.exit_code == 0, said.output
    assert "gpu: 1 to 2 Pods of 32 CPUs, 144 GiB, 8 GPUs: Denoiser, Decoder" in said.output
    assert "the Secret wan-secrets holds PGPASSWORD (optional), WAN_SERVE_QUEUE_URL" in said.output
    assert (out / "overlays/production/kustomization.yaml").exists()
