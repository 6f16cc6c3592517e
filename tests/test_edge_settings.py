from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mambamic.edge.settings import EdgeSettings, Upstream, read_tokens, render
from mambamic.errors import UsageError

ONE, TWO = Upstream("127.0.0.1", 8080), Upstream("127.0.0.1", 8090, 16)
SETTINGS = EdgeSettings((ONE, TWO))


def test_an_upstream_is_a_host_and_a_port() -> None:
    assert Upstream.parse("server-1.lab:8080") == Upstream("server-1.lab", 8080)
    assert Upstream.parse("127.0.0.1:8080").resolved() == ONE
    assert Upstream.parse("localhost:8080").resolved() == ONE
    for wrong in (
        "8080",
        ":8080",
        "host:",
        "host:port",
        "host:0",
        "host:70000",
        "::1:8080",
        "a b:1",
    ):
        with pytest.raises(UsageError, match=r"--upstream"):
            Upstream.parse(wrong)
    # What would end a line of nginx's configuration, and begin another.
    for wrong in ("a;b:1", "a}:1", "a\nb:1", "$host:1", '"a:1'):
        with pytest.raises(UsageError, match="HOST:PORT"):
            Upstream.parse(wrong)
    with pytest.raises(UsageError, match="name is not known"):
        Upstream("nowhere.invalid", 8080).resolved()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"upstreams": ()}, "no --upstream"),
        ({"upstreams": (ONE, ONE)}, "each server once"),
        ({"port": 0}, "--port 0"),
        ({"host": "localhost; root /"}, "an IP address"),
        ({"certificate": Path("a.pem")}, "--key"),
        ({"client_rate": 0}, "--client-rate 0"),
        ({"max_body": 257}, "--max-body 257"),
        ({"timeout": 0}, "--timeout 0"),
        ({"model": "a b"}, "model name"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(SETTINGS, **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--in-flight"):
        Upstream("127.0.0.1", 8080, 0)


def test_each_server_has_its_limit_and_its_others() -> None:
    written = render(SETTINGS)["settings.conf"]
    assert "server 127.0.0.1:8080 max_fails=0 max_conns=6;" in written
    assert "server 127.0.0.1:8090 max_fails=0 max_conns=16;" in written
    others = written.split("upstream without_0 {")[1].split("}")[0]
    assert "8090" in others
    assert "8080" not in others
    assert "without_" not in render(replace(SETTINGS, upstreams=(ONE,)))["settings.conf"]


def test_a_single_server_may_have_a_name_that_is_known_elsewhere() -> None:
    named = Upstream("server.invalid", 8080)
    assert "server server.invalid:8080 " in render(EdgeSettings((named,)))["settings.conf"]
    with pytest.raises(UsageError, match=r"server\.invalid"):
        render(EdgeSettings((named, ONE)))


def test_logs_go_to_files_or_to_the_console() -> None:
    assert "access_log logs/access.log edge;" in render(SETTINGS)["settings.conf"]
    console = render(replace(SETTINGS, console=True))["settings.conf"]
    assert "access_log /dev/stdout edge;" in console
    assert "error_log stderr crit;" in console


def test_tls_and_addresses(tmp_path: Path) -> None:
    assert render(SETTINGS)["listen.conf"].endswith("listen 127.0.0.1:8000;\n")
    assert "listen [::]:8000;" in render(replace(SETTINGS, host="::"))["listen.conf"]
    pem = tmp_path / "a b.pem"
    pem.touch()
    written = render(replace(SETTINGS, certificate=pem, key=pem))["listen.conf"]
    assert "listen 127.0.0.1:8000 ssl;" in written
    assert f'ssl_certificate_key "{pem}";' in written
    for wrong in (tmp_path / "none.pem", tmp_path / 'a";.pem', tmp_path / "$host.pem"):
        if "none" not in wrong.name:
            wrong.touch()
        with pytest.raises(UsageError, match="PEM"):
            render(replace(SETTINGS, certificate=wrong, key=pem))


def test_a_file_of_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# lab\n0123456789abcdef\n\n  Other-token~with.all+of/it==\n")
    tokens = read_tokens(path)
    assert tokens == ("0123456789abcdef", "Other-token~with.all+of/it==")
    written = render(replace(SETTINGS, tokens=tokens))["tokens.conf"]
    assert '"0123456789abcdef" "0123456789abcdef";' in written
    assert "default $edge_bearer;" not in written
    assert "default $edge_bearer;" in render(SETTINGS)["tokens.conf"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "# nothing\n",
        "short\n",
        "0123456789abcdef with a space\n",
        '0123456789abcdef";\n',
        "$http_authorization00\n",
        "0123456789abcdef\n0123456789ABCDEF\n",
        "x" * 513,
        "~0123456789abcdef\n",
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(UsageError, match="--tokens") as caught:
        read_tokens(path)
    assert "0123456789" not in str(caught.value)
    with pytest.raises(UsageError, match="none"):
        read_tokens(tmp_path / "none")
