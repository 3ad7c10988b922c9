"""Settings of what the proxy tells about itself."""

from __future__ import annotations

from proxy.settings import Section


class ObservabilitySettings(Section):
    """Logs and metrics."""

    scrub_secrets: bool = True
    """Replace secrets in log lines: by key name, by shape and by known value."""
    metrics_public: bool = False
    """Serve /metrics beyond loopback without the admin key."""
