"""The server answers with files of its folder, to its own name only."""

import http.client
import threading

import pytest

from sparseclt.atlas.server import AtlasServer


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "atlas"
    (folder / "data").mkdir(parents=True)
    (folder / "index.html").write_text("pages")
    (folder / "data" / "run.json.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "atlas-2").mkdir()
    (tmp_path / "atlas-2" / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "out").symlink_to(tmp_path)
    with AtlasServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.putrequest(method, path, skip_host=True)
    for name in [host or f"127.0.0.1:{server.server_port}"] if not isinstance(host, list) else host:
        connection.putheader("Host", name)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


@pytest.mark.parametrize("path", ["/", "/index.html", "/?x=1", "/data/../index.html"])
def test_files_of_the_folder(server, path):
    answer, body = ask(server, path)
    assert (answer.status, body) == (200, b"pages")
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert answer.getheader("Content-Encoding") is None


def test_localhost_is_its_name_too(server):
    assert ask(server, "/", f"localhost:{server.server_port}")[0].status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "//../secret.txt", "/link.txt", "/out/secret.txt",
        "/../atlas-2/secret.txt", "/data/%2e%2e/%2e%2e/secret.txt", "/etc/passwd", "//etc/passwd", "/data", "/nothing",
        "/%00", "/%ff", "/" + "a" * 5000, "http://127.0.0.1/../secret.txt",
    ],
)  # fmt: skip
def test_paths_outside_the_folder_are_not_there(server, path):
    answer, body = ask(server, path)
    assert answer.status == 404 and b"secret" not in body


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", "[::1]", []])
def test_other_hosts_are_refused(server, host):
    answer, body = ask(server, "/", host)
    assert answer.status == 403 and b"pages" not in body


def test_two_hosts_are_refused(server):
    own = f"127.0.0.1:{server.server_port}"
    assert ask(server, "/", [own, "evil.example"])[0].status == 403


def test_head_has_no_body_and_nothing_can_be_posted(server):
    answer, body = ask(server, "/", method="HEAD")
    assert (answer.status, body, answer.getheader("Content-Length")) == (200, b"", "5")
    assert ask(server, "/", method="POST")[0].status == 501


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


def test_a_taken_port_is_named(server, tmp_path):
    with pytest.raises(ValueError, match=f"port: expected a free one, got {server.server_port}"):
        AtlasServer(tmp_path, server.server_port)
