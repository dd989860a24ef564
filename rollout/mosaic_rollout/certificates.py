"""Which certificates clients of https endpoints trust."""

import os
import ssl
from functools import cache

import httpx

from mosaic_rollout.errors import UserError


@cache
def certificates(*, by_environment: bool = True) -> ssl.SSLContext:
    """What httpx would load for each client anew: 20 ms, for http as well, so that one is made for all.

    by_environment: honour SSL_CERT_FILE and SSL_CERT_DIR. UserError where what they name cannot be read.
    """
    try:
        return httpx.create_ssl_context(trust_env=by_environment)
    except OSError as error:  # ssl.SSLError is one
        named = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), "certifi")
        raise UserError(
            f"the certificates of {named} cannot be read ({error}); name PEM certificates there, or unset it"
        ) from None
