"""A node's key and certificate: made once, kept, and never replaced."""

from __future__ import annotations

import os
import ssl
import stat
import threading

import pytest
from fakes.group.nodes import Machine

from shoal.comm.errors import KeyFileError
from shoal.comm.group.node_identity import NodeIdentity, check_certificate, fingerprint, node_name


def test_it_is_made_once_for_this_user_alone(tmp_path):
    first = NodeIdentity.of(tmp_path / "keys", "here")
    again = NodeIdentity.of(tmp_path / "keys", "elsewhere")
    assert (again.certificate, again.fingerprint) == (first.certificate, first.fingerprint)
    assert len(first.fingerprint) == 64
    assert stat.S_IMODE(first.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(first.file.parent.stat().st_mode) == 0o700
    assert [path.name for path in first.file.parent.iterdir()] == ["node.pem"]
    assert "PRIVATE" not in repr(first)


def test_it_is_self_signed_and_valid_also_on_a_machine_without_a_clock(tmp_path):
    from cryptography import x509

    certificate = NodeIdentity.of(tmp_path).certificate
    assert check_certificate(certificate) == certificate
    parsed = x509.load_der_x509_certificate(certificate)
    assert (parsed.not_valid_before_utc.year, parsed.not_valid_after_utc.year) == (1970, 9999)
    assert not parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_threads_that_make_it_at_once_have_the_same(tmp_path):
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(NodeIdentity.of(tmp_path).certificate)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(set(found)) == 1


BEGIN = "-----BEGIN CERT"
DAMAGE = {
    "empty": lambda text, other: "",
    "cut off": lambda text, other: text[:-40],
    "no certificate": lambda text, other: text.split(BEGIN)[0],
    "no key": lambda text, other: BEGIN + text.split(BEGIN)[1],
    "two certificates": lambda text, other: text + BEGIN + text.split(BEGIN)[1],
    "another's certificate": lambda text, other: text.split(BEGIN)[0] + BEGIN + other.split(BEGIN)[1],
    "rubbish": lambda text, other: "\x00rubbish\n",
    "not ASCII": lambda text, other: text + "é",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_told_of_and_kept(tmp_path, kind):
    file, other = NodeIdentity.of(tmp_path / "a").file, NodeIdentity.of(tmp_path / "b").file
    damaged = DAMAGE[kind](file.read_text(), other.read_text())
    file.write_text(damaged, encoding="utf-8")
    with pytest.raises(KeyFileError, match=r"node\.pem"):
        NodeIdentity.of(tmp_path / "a")
    assert file.read_text(encoding="utf-8") == damaged


def test_an_encrypted_key_is_refused_and_not_asked_about(tmp_path):
    from cryptography.hazmat.primitives import serialization

    file = NodeIdentity.of(tmp_path).file
    key = serialization.load_pem_private_key(file.read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    file.write_text(locked.decode() + file.read_text()[file.read_text().index("-----BEGIN CERT") :])
    with pytest.raises(KeyFileError, match="cannot be used"):
        NodeIdentity.of(tmp_path)


def test_a_file_that_others_may_read_is_refused(tmp_path):
    NodeIdentity.of(tmp_path).file.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        NodeIdentity.of(tmp_path)


def test_a_directory_in_which_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot write"):
        NodeIdentity.of(tmp_path / "file" / "keys")


@pytest.mark.parametrize(
    ("text", "name"),
    [("pi3", "pi3"), ("Old laptop (3)", "Old-laptop-3"), ("a.b-c", "a.b-c"), ("küche", "k-che"), ("", "node"),
     ("\x1b[31m", "31m"), ("日本", "node"), ("x" * 100, "x" * 64)],
)  # fmt: skip
def test_names_are_plain(text, name):
    assert node_name(text) == name


def test_a_machine_has_its_hosts_name_if_it_is_given_none(tmp_path):
    assert NodeIdentity.of(tmp_path).name == node_name(os.uname().nodename)


def test_only_certificates_as_nodes_have_them_are_taken(tmp_path):
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def signed(key, by, name="x") -> bytes:
        named = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder().subject_name(named).issuer_name(named).public_key(key.public_key())
        )
        builder = builder.serial_number(1).not_valid_before(datetime.datetime(2020, 1, 1))
        done = builder.not_valid_after(datetime.datetime(2120, 1, 1)).sign(by, hashes.SHA256())
        return done.public_bytes(serialization.Encoding.DER)

    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
    assert check_certificate(signed(key, key))
    good = Machine.at(tmp_path, "a").identity.certificate
    for bad in (
        signed(other, other),
        signed(key, other),
        signed(key, key, "x" * 60)[:-1],
        b"",
        b"rubbish",
        good * 9,
    ):
        with pytest.raises(ValueError):
            check_certificate(bad)
    assert len(fingerprint(good)) == 64
    assert ssl.DER_cert_to_PEM_cert(good) in (tmp_path / "a" / "node.pem").read_text()
