"""A cookie jar that keeps nothing."""

from http.cookiejar import CookieJar, DefaultCookiePolicy


def no_cookies() -> CookieJar:
    """For clients of endpoints: no cookie is wanted, and one of broken bytes would break the next request."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))
