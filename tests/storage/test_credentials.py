"""Settings of object stores from the environment."""

from __future__ import annotations

from functional_ckpt.storage.buckets import credentials


def test_a_message_hides_secrets_and_stays_readable() -> None:
    text = credentials.redact("Store says: key abcdefgh is refused", ("s", "abcdefgh"))
    assert text == "Store says: key *** is refused"


def test_gcs_by_an_hmac_key_has_no_conditional_writes() -> None:
    assert credentials.gcs_credentials({}) is None
    found = credentials.gcs_credentials({"GCS_KEY": "k", "GCS_SECRET": "s"})
    assert found is not None
    assert (found.key_id, found.secret, found.conditional) == ("k", "s", False)
